"""A causal language model as an ONNX file with a KV cache, and what a device needs to know of it.

    OUT, OUT.data           the graph and its weights: see edgeslm.stages.decoder_graph
    tokenizer.json          the tokenizer, without padding or cutting
    chat_template.jinja     where the model has one

The float32 graph is run by ONNX Runtime in two calls, the second through the cache, and compared with torch:
a wrong norm, window or rotation stops the export, before anything is quantized.

B batch, S sequence, P tokens before, K key-value heads, D their width, V vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import atomic_write
from edgeslm.bundle import file_sha256
from edgeslm.errors import ModelError, first_line
from edgeslm.onnx_file import data_file
from edgeslm.progress import Quiet
from edgeslm.stages import decoder_graph
from edgeslm.stages.chats import template_of
from edgeslm.stages.export_onnx import TOKENIZER_NAME, Exported, plain_tokenizer
from edgeslm.stages.graph_writer import save
from edgeslm.stages.onnx_proof import interface
from edgeslm.stages.onnx_session import load_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages.checkpoint import Checkpoint

TEMPLATE_NAME = "chat_template.jinja"
TOLERANCE = 1e-3
"""Largest difference between engine and torch, over the largest logit."""
PROBE_TOKENS = 24
LONGEST_PROBE = 160
"""A sliding window shorter than this is overstepped by the probe, so that its width is proven too."""
_BAR, _BLANK = "\uff5c", "\u2581"
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", f"<{_BAR}end{_BLANK}of{_BLANK}sentence{_BAR}>",
)  # fmt: skip
"""Tokens that end an answer in any vocabulary that has added them: llama.cpp's list (llama-vocab.cpp)."""


def run(
    checkpoint: Checkpoint,
    spec: QuantizeSpec,
    out: Path,
    *,
    importance: Path | None = None,
    windows: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write `checkpoint` as the ONNX file `out` (and OUT.data beside) with the weights that `spec` asks for.

    importance: an importance matrix file (edgeslm.stages.calibrate).  windows: token ids [W, S] of calibration
    text; both serve the schemes that measure.  Raises ModelError for a family that the graph has no form for,
    for a tokenizer that no device runs, and where ONNX Runtime computes something else than torch.
    """
    progress = progress or Quiet()
    tokenizer = checkpoint.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{checkpoint.name}: its tokenizer runs in Python only, which no device does",
            hint="save it with a fast tokenizer (tokenizer.json)",
        )
    model = checkpoint.load()
    graph = decoder_graph.make_graph(model, checkpoint.name)
    facts = _model_facts(checkpoint, model, tokenizer, graph)
    probe = probe_tokens(model)
    expected = torch_logits(model, probe)
    warnings = list(graph.warnings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".float32-") as folder:
        path = Path(folder) / out.name
        save(graph.model, graph.weights, path, progress=progress)
        plan = float_plan(graph)
        del model, graph
        prove(path, probe, expected, checkpoint.name)
        if spec.scheme == "F32":
            for written in (data_file(path), path):
                written.replace(out.with_name(written.name))
        else:
            plan = _quantize(path, out, spec, importance=importance, windows=windows, progress=progress)
            warnings += plan.pop("warnings", [])
    facts |= describe(out)
    atomic_write(out.with_name(TOKENIZER_NAME), plain_tokenizer(backend))
    _write_template(tokenizer, out.with_name(TEMPLATE_NAME))
    return Exported(path=out, plan=plan, model=facts, warnings=warnings)


def _quantize(
    path: Path, out: Path, spec: QuantizeSpec, *, importance: Path | None, windows: NDArray[np.int64] | None,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write the quantized file from the float32 one at `path`; its plan."""
    from edgeslm.stages.calibrate import load_importance
    from edgeslm.stages.onnx_weights import quantize_decoder

    weights = load_importance(importance) if importance else {}
    try:
        plan = quantize_decoder(path, out, spec, importance=weights, windows=windows, progress=progress)
        run_once(out, np.arange(1, 9))
    except BaseException:
        for written in (out, data_file(out)):
            written.unlink(missing_ok=True)
        raise
    return {**plan, "importance": file_sha256(importance) if importance else None}


# --- the proof ---


def probe_tokens(model: Any) -> NDArray[np.int64]:
    """Token ids [S] that differ from each other, enough of them to leave a short sliding window."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = window + PROBE_TOKENS if window + PROBE_TOKENS <= LONGEST_PROBE else PROBE_TOKENS
    count = min(length, config.max_position_embeddings)
    tokens: NDArray[np.int64] = (1 + 7919 * np.arange(count, dtype=np.int64)) % config.vocab_size
    return tokens


def torch_logits(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [S, V] of one text, as torch computes them at once."""
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return logits


def prove(path: Path, tokens: NDArray[np.int64], expected: NDArray[np.float32], name: str) -> None:
    """Raise ModelError unless ONNX Runtime computes the logits `expected` [S, V] for `tokens` [S].

    The first half in one call, then one token, then the rest: prefill, decode, prefill onto a cache.
    """
    half = max(1, len(tokens) // 2)
    chunks = [part for part in (tokens[:half], tokens[half : half + 1], tokens[half + 1 :]) if len(part)]
    found = np.concatenate(run_chunks(path, chunks, name))
    largest = max(float(np.abs(expected).max()), 1e-6)
    worst = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
    if not worst <= TOLERANCE * largest:
        raise ModelError(
            f"{name}: the ONNX file computes something else than the model: logits differ by {worst:.2g} "
            f"where the largest is {largest:.2g}",
            hint="export it as GGUF; a changed configuration (window, rotary scaling) is the usual cause",
        )


def run_once(path: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [S, V] of one call without a past; ModelError where they are not finite."""
    logits = run_chunks(path, [tokens], path.name)[0]
    if not np.isfinite(logits).all():
        raise ModelError(
            f"{path.name}: the quantized file's logits are not finite",
            hint="choose another scheme, or accuracy_level 0",
        )
    return logits


def run_chunks(path: Path, chunks: Sequence[NDArray[np.int64]], name: str) -> list[NDArray[np.float32]]:
    """Logits [S, V] of each chunk of one text, every call going on with the cache of the one before."""
    onnxruntime = load_onnxruntime("what was exported can't be checked")
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: that first_logit may be left out is no warning
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
        cache = {past.name: np.zeros((1, past.shape[1], 0, past.shape[3]), np.float32) for past in pasts}
        outputs, total, found = ["logits", *map(_present, cache)], 0, []
        for chunk in chunks:
            total += len(chunk)
            feeds = {"input_ids": chunk[None], "attention_mask": np.ones((1, total), np.int64), **cache}
            logits, *presents = session.run(outputs, feeds)
            found.append(logits[0])
            cache = dict(zip(cache, presents, strict=True))
    except Exception as error:  # the engine's own errors share no class
        raise ModelError(f"{name}: ONNX Runtime refuses what was written: {first_line(error)}") from error
    return found


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


# --- facts ---


def _model_facts(
    checkpoint: Checkpoint, model: Any, tokenizer: Any, graph: decoder_graph.Graph
) -> dict[str, Any]:
    config = model.config.get_text_config()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bos = tokenizer.bos_token_id
    return {
        "architecture": config.model_type,
        "parameters": sum(array.size for array in graph.trained),
        "context_length": graph.context_length,
        "vocab_size": config.vocab_size,
        "tokenizer": backend["model"].get("type"),
        "bos_token": bos,
        "eos_token": tokenizer.eos_token_id,
        "adds_bos": bos is not None and tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos],
        "stop_tokens": stop_tokens(model, tokenizer),
        "layers": config.num_hidden_layers,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "source": checkpoint.source,
        "source_sha256": checkpoint.digest,
    }


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: of the configuration, of generation's, of the tokenizer, and by name."""
    config, generation = model.config.get_text_config(), getattr(model, "generation_config", None)
    found: set[int] = set()
    for said in (config.eos_token_id, getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        found |= set(said if isinstance(said, list | tuple) else [] if said is None else [said])
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    found |= {added[name] for name in ENDS if name in added}
    return sorted(int(number) for number in found if 0 <= number < config.vocab_size)


def describe(path: Path) -> dict[str, Any]:
    """Opset, IR version, operators, inputs and outputs of an ONNX file, which onnx.checker takes."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path.name}: the ONNX file is not valid: {first_line(error)}") from error
    model = onnx.load(path, load_external_data=False)
    return interface(model)


def float_plan(graph: decoder_graph.Graph) -> dict[str, Any]:
    """The plan of the float32 file; rotary tables are no weights."""
    held, nbytes = (sum(getattr(array, what) for array in graph.trained) for what in ("size", "nbytes"))
    return {
        "scheme": "F32",
        "bits_per_weight": 8 * nbytes / held,
        "importance": None,
        "types": {"F32": {"tensors": len(graph.trained), "parameters": held, "bytes": nbytes}},
        "fallbacks": [],
        "accuracy_level": None,
    }


def _write_template(tokenizer: Any, path: Path) -> None:
    """The chat template beside; of several the one called default."""
    template = template_of(tokenizer)
    if template:
        atomic_write(path, template)
    else:
        path.unlink(missing_ok=True)
