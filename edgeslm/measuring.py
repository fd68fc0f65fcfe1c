"""An artifact against the model it was made of, both through the runtime that ships, and what to call them."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.bundle import Bundle, open_bundle
from edgeslm.errors import DataError
from edgeslm.footprint import compute_buffer_bytes, kv_cache_bytes, shape_of_gguf
from edgeslm.gguf_file import read_gguf
from edgeslm.specs import QuantizeSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgeslm.device import Device
    from edgeslm.progress import Progress
    from edgeslm.runtime.runner import Runner
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.data import Document

UNQUANTIZED = {"F64", "F32", "F16", "BF16"}
TEMPLATE_DATE = datetime(2026, 1, 1, tzinfo=UTC)
"""The day that a chat template which puts in the date sees: equal inputs give equal bytes on any day."""
DEFAULT_CONTEXT = 4096
"""Tokens of context that a runner takes unless told otherwise, if the model has as many."""
SHARE_FOR_A_MODEL = 0.8
"""Of a device's memory; the system and what talks to the model need the rest."""


def measure(
    artifact: Bundle,
    reference: Path | None,
    found: Sequence[Document],
    *,
    context: int,
    max_tokens: int | None,
    threads: int | None,
    progress: Progress,
    seed: int = 0,
) -> dict[str, Any]:
    """Quality of an artifact on documents, against the unquantized file `reference`."""
    from edgeslm.bench.quality import measure_quality
    from edgeslm.runtime.runner import RunnerOptions, open_runner
    from edgeslm.stages.data import render

    options = RunnerOptions(context=context, batch=context, ubatch=min(512, context), threads=threads)
    with ExitStack() as runners:

        def opened(bundle: Bundle) -> Runner:
            runner = open_runner(bundle, options)
            runners.callback(runner.close)
            return runner

        candidate = opened(artifact)
        other = None if reference is None else opened(open_bundle(reference))
        texts = [render(document, lambda messages: artifact_chat(candidate, messages)) for document in found]
        record = measure_quality(
            candidate, other, texts, context=context, max_tokens=max_tokens, seed=seed, progress=progress,
            parse_special=any(document.messages for document in found),
        )  # fmt: skip
    record["artifact"] |= identity(artifact)
    return record


def artifact_chat(runner: Runner, messages: Sequence[Mapping[str, str]]) -> str:
    facts = runner.facts
    if not facts.chat_template:
        raise DataError(
            "the text has conversations and the artifact has no chat template", hint="give plain text"
        )
    bos, eos = (
        "" if token is None else runner.token_bytes(token, special=True).decode("utf-8", errors="replace")
        for token in (facts.bos_token, facts.eos_token)
    )
    return render_messages(facts.chat_template, messages, bos, eos)


def render_messages(template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str) -> str:
    return render_turns(template, messages, bos, eos, False)


def render_turns(
    template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str, add_generation_prompt: bool
) -> str:
    """A conversation as the chat template has it, on a day that does not change."""
    from edgeslm.runtime.template import render_chat

    return render_chat(
        template, messages, bos, eos, add_generation_prompt=add_generation_prompt, now=lambda: TEMPLATE_DATE
    )


def identity(bundle: Bundle) -> dict[str, Any]:
    """What a record calls the artifact that it is about."""
    if bundle.is_classifier:
        from edgeslm.bench.classify_bench import describe_classifier

        return describe_classifier(bundle)
    if bundle.format == "onnx":
        assert bundle.manifest is not None
        bits = bundle.manifest["quantization"]["bits_per_weight"]
    else:
        tensors = read_gguf(bundle.weights).tensors.values()
        bits = 8 * sum(t.nbytes for t in tensors) / sum(t.parameters for t in tensors)
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        "format": bundle.format,
        "digest": bundle.digest,
        "file_bytes": bundle.size_bytes,
        "bits_per_weight": bits,
    }


def reference_weights(checkpoint: Checkpoint, directory: Path, progress: Progress) -> Path:
    """An unquantized GGUF file of the model: its own, or one written to `directory` in F32."""
    from edgeslm.stages import export_gguf

    if checkpoint.kind == "gguf":
        types = {tensor.type for tensor in read_gguf(checkpoint.path).tensors.values()}
        if types <= UNQUANTIZED:
            return checkpoint.path
    spec = QuantizeSpec(scheme="F32", keep_going=True)
    return export_gguf.run(checkpoint, spec, directory / "reference.gguf", progress=progress).path


def memory_warnings(device: Device, weights: Path, context: int | None) -> list[str]:
    """What to say of a file that does not fit a device's memory, by the estimate of `edgeslm inspect`.

    context: tokens of the KV cache; None: what the runner takes by default.
    """
    shape = shape_of_gguf(read_gguf(weights))
    tokens = context or min(shape.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    parts = weights.stat().st_size, kv_cache_bytes(shape, tokens), compute_buffer_bytes(shape, tokens)
    needed = sum(part or 0 for part in parts)
    if needed <= SHARE_FOR_A_MODEL * device.memory_bytes:
        return []
    return [
        f"needs about {wording.size(needed)} of memory with {tokens} tokens of context; {device.name} has "
        f"{wording.size(device.memory_bytes)}: take a smaller scheme or set [bench] context"
    ]
