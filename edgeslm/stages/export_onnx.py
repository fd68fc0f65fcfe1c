"""A classifier as an ONNX file, and the tokenizer beside it as the device reads it.

    OUT                  input_ids, attention_mask [B, S] int64 (or readings [B, R, C] float32) -> logits [B, L]
    tokenizer.json       beside OUT, for text: the tokenizer as training used it, without padding or cutting
    model.ort, required_operators.config     beside OUT, for mobile builds: see edgeslm.stages.onnx_mobile

The float32 graph is checked by onnx, then run by ONNX Runtime on a padded batch and compared with what torch
makes of each row alone: a wrong mask, or a size that was frozen into the graph, stops the export.  Fewer bits
come after that: see edgeslm.stages.onnx_int8.

B batch, S sequence, R rows of a window, C channels, L labels.
"""

from __future__ import annotations

import io
import json
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import atomic_write, replacing, write_flushed
from edgeslm.errors import ModelError, first_line
from edgeslm.progress import Quiet
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import onnx_feeds, onnx_int8, onnx_mobile
from edgeslm.stages.onnx_proof import Traced, bare, describe, prove, prove_quantized, quantized_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.stages.checkpoint import Checkpoint

OPSET = 17
"""The oldest with LayerNormalization as one operator: every ONNX Runtime since 1.13 runs it."""
MAX_TOKENS = 512
"""Tokens of a text unless the model or the caller says less."""
MAX_FILE_BYTES = 2**31 - 1
"""What a protobuf message may have at most."""
TOKENIZER_NAME = "tokenizer.json"
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Families whose position numbers begin behind the padding token's: so many texts' tokens fit less."""
OPERATORS = {"aten::asinh": "Asinh"}
"""Functions of one tensor that ONNX has and torch's exporter does not translate."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written ONNX file; plan and model as a bundle's manifest keeps them (quantization and model)."""

    path: Path
    plan: dict[str, Any]
    model: dict[str, Any]
    warnings: list[str]

    @property
    def files(self) -> dict[str, Path]:
        """What goes into the bundle: name inside to file."""
        tokenizer = self.path.with_name(TOKENIZER_NAME)
        needed = [self.path, *([tokenizer] if self.model["preprocessing"]["kind"] == "text" else [])]
        if (self.plan.get("onnx") or {}).get("mobile"):
            needed += [self.path.with_name(name) for name in onnx_mobile.NAMES]
        return {path.name: path for path in needed}


def run(
    checkpoint: Checkpoint,
    out: Path,
    *,
    spec: QuantizeSpec | None = None,
    max_tokens: int | None = None,
    calibration: Sequence[str | NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a classifier directory as the ONNX file `out`, and what goes with it beside.

    checkpoint: a sequence classifier of transformers, an encoder with a head, a recurrent student or a
    sensor network.  spec: None: F32.  max_tokens: where texts are cut, as in training; None: the model's
    limit, at most 512.  calibration: texts, or windows [R, C] in physical units, on which ranges of
    activations and the loss of fewer bits are measured.
    Raises ModelError for what can't be exported or computes something else afterwards, DataError for
    calibration that is missing or unfit, RecipeError for a scheme that there is not.
    """
    progress, config = progress or Quiet(), checkpoint.config()
    spec = spec or QuantizeSpec(format="onnx", scheme="F32")
    with progress.task("writing ONNX", total=3, unit="steps") as advance:
        if config.get("model_type") == "edgeslm-sensor":
            traced, tokenizer = _open_sensor(checkpoint, config), None
        else:
            traced, tokenizer = _open_text(checkpoint, config, max_tokens)
        advance(1)
        data = to_onnx(traced, checkpoint.name)
        advance(1)
        prove(data, traced, checkpoint.name)
        advance(1)
    plan, interface = describe(data)
    parameters = sum(of["parameters"] for name, of in plan["types"].items() if not name.startswith("I"))
    found: list[str] = []
    if spec.scheme != "F32":
        feeds = onnx_feeds.prepare(calibration or (), traced, tokenizer)
        data, facts, found = onnx_int8.quantize_classifier(data, spec.scheme, spec.onnx, feeds, progress)
        prove_quantized(data, traced, checkpoint.name)
        plan, interface = quantized_plan(plan, spec.scheme, facts), describe(data)[1]
    with replacing(out) as beside:
        write_flushed(beside, data)
        if tokenizer is not None:
            atomic_write(out.with_name(TOKENIZER_NAME), tokenizer)
        if spec.onnx.mobile:
            onnx_mobile.write(data, out.parent, target=spec.onnx.target)
            plan["onnx"] = plan.get("onnx", {}) | {"mobile": True}
    model = {
        "architecture": config.get("model_type"),
        "parameters": parameters,
        "context_length": traced.preprocessing.get("max_tokens"),
        "vocab_size": config.get("vocab_size"),
        "tokenizer": json.loads(tokenizer)["model"].get("type") if tokenizer else None,
        "source": checkpoint.source,
        "source_sha256": checkpoint.digest,
        "labels": list(traced.labels),
        "class_shares": config.get("class_shares"),
        "preprocessing": traced.preprocessing,
        **interface,
    }
    return Exported(path=out, plan=plan, model=model, warnings=found)


# --- the kinds of classifier ---


def _open_text(
    checkpoint: Checkpoint, config: Mapping[str, Any], max_tokens: int | None
) -> tuple[Traced, str]:
    from edgeslm.stages.classifier import load_classifier, pad_token

    module, labels, tokenizer = load_classifier(checkpoint)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{checkpoint.name}: its tokenizer runs in Python only, which no device does",
            hint="save it with a fast tokenizer (tokenizer.json)",
        )
    limit = text_limit(config, tokenizer.model_max_length, max_tokens)
    pad = pad_token(tokenizer)
    rows = [[1 + (7 * i + 3 * j) % max(len(tokenizer) - 1, 1) for j in range(size)]
            for i, size in enumerate((min(11, limit), min(5, limit), 1))]  # fmt: skip
    return Traced(
        module=module,
        labels=tuple(labels),
        preprocessing={"kind": "text", "max_tokens": limit, "pad_id": pad},
        probe=padded(rows, pad),
        axes={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
    ), plain_tokenizer(backend)


def _open_sensor(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Traced:
    from edgeslm.stages import sensor_net

    module = sensor_net.load(checkpoint.path)
    channels, rows = list(config["channels"]), int(config["rows"])
    random = np.random.default_rng(0)
    return Traced(
        module=module,
        labels=tuple(config["labels"]),
        preprocessing={
            "kind": "sensors",
            "channels": channels,
            "rows": rows,
            "stride": config.get("stride"),
            "max_missing": config.get("max_missing"),
            "normalization": config["normalization"],
        },
        probe=(random.standard_normal((3, rows, len(channels))).astype(np.float32),),
        axes={"readings": {0: "batch"}},
    )  # fmt: skip


def text_limit(config: Mapping[str, Any], tokenizer_limit: float, asked: int | None) -> int:
    """Tokens at which texts are cut: what is asked for, within what the model has positions for."""
    limits = [asked or MAX_TOKENS]
    if positions := config.get("max_position_embeddings"):
        offset = (config.get("pad_token_id") or 0) + 1 if config.get("model_type") in OFFSET_POSITIONS else 0
        limits.append(positions - offset)
    if tokenizer_limit < 1e6:  # transformers writes 1e30 for "unknown"
        limits.append(int(tokenizer_limit))
    return min(limits)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids [B, S] with `pad` on the right, and their mask [B, S], 1 where there is a token."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def plain_tokenizer(backend: Any) -> str:
    """tokenizer.json that neither pads nor cuts: those are the device's doing, by the manifest."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return str(copy.to_str())


# --- the file ---


def to_onnx(traced: Traced, name: str) -> bytes:
    """The module as an ONNX file; ModelError for an operation that ONNX has no word for."""
    import torch

    inputs = tuple(torch.from_numpy(array) for array in traced.probe)
    axes = {**traced.axes, "logits": {0: "batch"}}
    buffer: Any = io.BytesIO()
    try:
        with warnings.catch_warnings(), traceable(traced.module), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                bare(traced.module), inputs, buffer, dynamo=False, opset_version=OPSET,
                input_names=list(traced.axes), output_names=["logits"], dynamic_axes=axes,
            )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ModelError(
            f"{name}: torch can't export it to ONNX: {first_line(error)}",
            hint="distill it into a recurrent or smaller student, or classify with another encoder",
        ) from error
    data: bytes = buffer.getvalue()
    if len(data) > MAX_FILE_BYTES:
        raise ModelError(
            f"{name}: an ONNX file holds at most 2 GiB, this model needs {len(data) / 2**30:.1f} GiB",
            hint="prune it, or distill it into a smaller student",
        )
    return data


@contextmanager
def traceable(module: Any) -> Iterator[None]:
    """transformers builds causal masks with vmap, which tracing can't follow: by plain broadcasting meanwhile.

    The same functions of (batch, head, query, key) give the mask, so sliding windows and padding stay.
    Caches are off: they are no part of a classifier.  Operators that torch has no translation for get theirs.
    """
    import torch
    from transformers import masking_utils

    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    exporter: Any = torch.onnx
    functions = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    for config in cached:
        config.use_cache = False
    functions["sdpa"], functions["eager"] = _boolean_mask, _additive_mask
    for name, operator in OPERATORS.items():
        exporter.register_custom_op_symbolic(name, lambda g, x, word=operator: g.op(word, x), OPSET)
    try:
        yield
    finally:
        del functions["sdpa"], functions["eager"]
        for name in OPERATORS:
            exporter.unregister_custom_op_symbolic(name, OPSET)
        for config in cached:
            config.use_cache = True


def _boolean_mask(
    batch_size: int, cache_position: Any, kv_length: int, *, kv_offset: int = 0, mask_function: Any = None,
    attention_mask: Any = None, **_: Any,
) -> Any:  # fmt: skip
    """[B, 1, S, S], True where a query sees a key."""
    import torch
    from transformers import masking_utils as masks

    function = mask_function or masks.causal_mask_function
    padding = masks.prepare_padding_mask(attention_mask, kv_length, kv_offset, _slice=False)
    if padding is not None:
        function = masks.and_masks(function, masks.padding_mask_function(padding))
    seen = function(
        torch.arange(batch_size)[:, None, None, None],
        torch.arange(1)[None, :, None, None],
        cache_position[None, None, :, None],
        torch.arange(kv_length)[None, None, None, :] + kv_offset,
    )
    return seen.expand(batch_size, -1, cache_position.shape[0], kv_length)


def _additive_mask(*arguments: Any, dtype: Any = None, **named: Any) -> Any:
    """The same as 0 and the lowest number of the type."""
    import torch

    dtype = dtype or torch.float32
    seen = _boolean_mask(*arguments, **named)
    return torch.where(seen, torch.tensor(0.0, dtype=dtype), torch.finfo(dtype).min)
