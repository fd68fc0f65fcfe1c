"""What an ONNX decoder takes and gives, held against its manifest before anything is computed.

The names are those of onnxruntime-genai's model builder and of optimum: input_ids [1, S], attention_mask
[1, P + S], maybe position_ids [1, S], past_key_values.L.key and .value [1, N, P, D] of each layer L; out come
logits [1, S, V] and present.L.key and .value [1, N, P + S, D].  Where a graph also takes first_logit [1], its
logits begin at that row.

S tokens, P tokens before them, V vocabulary size, N key-value heads, D size of a head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import BundleError
from edgeslm.runtime.runner import ModelFacts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgeslm.bundle import Bundle
    from edgeslm.onnx_file import OnnxFile

TEMPLATE_NAME = "chat_template.jinja"
FIRST_LOGIT = "first_logit"
SHARING = "com.microsoft:GroupQueryAttention"
"""The operator that takes one buffer as past and present (onnxruntime, docs/ContribOperators.md)."""
ELEMENTS: dict[str, tuple[str, Any]] = {
    "tensor(float)": ("f32", np.float32),
    "tensor(float16)": ("f16", np.float16),
}
"""Type of a graph's tensor to its name in KV_TYPES and in numpy."""
_NUMBERS = ("input_ids", "attention_mask", "position_ids")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_AGAIN = "build the bundle again"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One input of the graph that is the past, and the output that becomes the next one: [1, heads, P, size]."""

    past: str
    present: str
    heads: int
    size: int


@dataclass(frozen=True, kw_only=True)
class DecoderGraph:
    """How a graph is run."""

    slots: tuple[Slot, ...]
    kv_type: str
    """Of the past, one of KV_TYPES."""
    kv_element: Any
    logits_element: Any
    takes_positions: bool
    takes_first_logit: bool
    shares: bool
    """Whether past and present may be one buffer."""

    def cache_bytes(self, context: int) -> int:
        """Of a key-value cache of `context` tokens."""
        width = sum(slot.heads * slot.size for slot in self.slots)
        return width * context * int(np.dtype(self.kv_element).itemsize)


def read_graph(session: Any, file: OnnxFile, bundle: Bundle, facts: ModelFacts) -> DecoderGraph:
    """How to run a loaded session.  Raises BundleError for a graph of other inputs and outputs."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    model = (bundle.manifest or {}).get("model") or {}
    logits = outputs.get("logits")
    if logits is None or logits.type not in ELEMENTS or "input_ids" not in inputs:
        raise _unfit(
            bundle.path, f"its graph takes {_some(inputs)} and gives {_some(outputs)}: no language model"
        )
    for name in _NUMBERS:
        if name in inputs and inputs[name].type != "tensor(int64)":
            raise _unfit(bundle.path, f"its graph takes {name} as {inputs[name].type}, not tensor(int64)")
    if isinstance(logits.shape[-1], int) and logits.shape[-1] != facts.vocab_size:
        raise _unfit(bundle.path, f"its graph has {logits.shape[-1]} tokens, its manifest {facts.vocab_size}")
    pasts = [name for name in inputs if _PAST.fullmatch(name)]
    others = sorted(set(inputs) - set(pasts) - {*_NUMBERS, FIRST_LOGIT})
    if others or "attention_mask" not in inputs:
        raise _unfit(
            bundle.path, f"its graph takes {_some(inputs)}; {others[0] if others else 'a mask'} is not known"
        )
    slots = tuple(_slot(name, inputs[name], outputs, model, bundle.path) for name in pasts)
    kinds = {inputs[name].type for name in pasts}
    if len(kinds) != 1 or not kinds <= set(ELEMENTS):
        raise _unfit(bundle.path, f"its key-value cache has the types {', '.join(sorted(kinds)) or 'none'}")
    kv_type, kv_element = ELEMENTS[kinds.pop()]
    return DecoderGraph(
        slots=slots, kv_type=kv_type, kv_element=kv_element, logits_element=ELEMENTS[logits.type][1],
        takes_positions="position_ids" in inputs, shares=SHARING in file.operators,
        takes_first_logit=FIRST_LOGIT in inputs or FIRST_LOGIT in file.optional_inputs,
    )  # fmt: skip


def read_facts(bundle: Bundle) -> ModelFacts:
    """What a bundle's manifest says of its language model.  Raises BundleError for what makes no sense."""
    manifest = bundle.manifest or {}
    model = manifest.get("model") or {}
    for key in ("vocab_size", "context_length", "parameters"):
        if not _is_count(model.get(key)):
            raise _unfit(bundle.path, f"{key} of the model in its manifest is {model.get(key)!r}")
    bos, eos, stops = (model.get(key) for key in ("bos_token", "eos_token", "stop_tokens"))
    ends = [*(stops if isinstance(stops, list) else ["none"]), *([] if eos is None else [eos])]
    for token in [*ends, *([] if bos is None else [bos])]:
        if type(token) is not int or not 0 <= token < model["vocab_size"]:
            raise _unfit(bundle.path, f"its manifest names {token!r} as a token that begins or ends a text")
    template = bundle.path / TEMPLATE_NAME
    scheme = (manifest.get("quantization") or {}).get("scheme")
    return ModelFacts(
        architecture=str(model.get("architecture")),
        description=f"{model.get('architecture')} {model['parameters'] / 1e6:.0f}M {scheme or ''}".strip(),
        parameters=model["parameters"],
        weight_bytes=bundle.weights_bytes,
        vocab_size=model["vocab_size"],
        context_length=model["context_length"],
        bos_token=bos,
        eos_token=eos,
        adds_bos=model.get("adds_bos") is True,
        stop_tokens=frozenset(ends),
        chat_template=template.read_text(encoding="utf-8", errors="replace") if template.is_file() else None,
    )


def _slot(name: str, value: Any, outputs: Mapping[str, Any], model: Mapping[str, Any], where: Path) -> Slot:
    """Heads and their size as the graph declares them, or the manifest where it leaves them open."""
    present = name.replace("past_key_values", "present")
    shape = value.shape if len(value.shape) == 4 else [None] * 4
    heads: Any = shape[1] if isinstance(shape[1], int) else model.get("kv_heads")
    size: Any = shape[3] if isinstance(shape[3], int) else model.get("head_dim")
    if present not in outputs or not _is_count(heads) or not _is_count(size):
        raise _unfit(where, f"its graph takes {name} {value.shape} and gives no {present} of that shape")
    return Slot(past=name, present=present, heads=int(heads), size=int(size))


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**40


def _some(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _unfit(where: Path, what: str) -> BundleError:
    return BundleError(f"{where}: {what}", hint=_AGAIN)
