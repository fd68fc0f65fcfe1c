"""Whether a model fits a device, and how fast it would be there: arithmetic on a workload and a profile.

A roofline (Williams, Waterman, Patterson 2009) per storage type: decoding reads every weight once for a
token, prefill multiplies it, and whichever takes longer counts.  To that comes the key-value cache that is
read, the attention that is computed, and a fixed time of each layer.  The profile's values are calibrated
on published runs; tests/data/published_runs.toml holds them and others that were kept back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgeslm.device import Device, list_devices, load_device
from edgeslm.errors import GateError
from edgeslm.footprint import UBATCH_TOKENS, Shape, compute_buffer_bytes, kv_cache_bytes
from edgeslm.workload import SCHEMES, Model, Part, Workload, in_scheme, read_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Record = dict[str, Any]

REPACKED = {
    "Q4_0": ("avx2", "dotprod"), "Q4_K": ("avx2", "dotprod"), "IQ4_NL": ("avx2", "dotprod"),
    "Q2_K": ("avx512f",), "Q5_K": ("dotprod",), "Q6_K": ("dotprod",), "Q8_0": ("dotprod",),
}  # fmt: skip
"""Type -> instruction sets with any of which ggml interleaves its rows when it loads them
(ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type, llama-cpp-python 0.3.36)."""

ATTENTION_RATE = 1 / 3
"""Rate of attention, whose operands are floats, over that of plain types; from the published runs on A72."""
DEFAULT_SPREAD = 0.3
"""Where a profile doesn't say how far published runs scatter."""
ONNX_SPREAD = 0.5
"""Profiles are calibrated on llama.cpp; ONNX Runtime's kernels differ."""
RUNTIME_BYTES = {"gguf": 48 * 2**20, "onnx": 56 * 2**20}
"""Python with the engine and no model, resident (x86-64 Linux; llama-cpp-python 0.3.36, onnxruntime 1.31)."""
TOKEN_BYTES = 400
"""Of the tokenizer for each token of the vocabulary: 17.5 MiB for SmolLM2's 49,152."""
ONNX_COPIES = 2
"""ONNX Runtime keeps its weights twice: as mapped, and packed for its kernels."""
SYSTEM_SHARE = 0.2
"""Of the memory, for the system, where a profile doesn't say."""
TIGHT_SHARE = 0.9
"""From this share of the free memory on a model fits, but nothing else does."""


def fit(
    source: str | Path,
    device: str | Path | None = None,
    *,
    context: int = 2048,
    prompt_tokens: int = 512,
    scheme: str | None = None,
) -> Record:
    """Record edgeslm.fit/1: `source` against one device, or against all profiles.

    An artifact counts as it is; a model that is not quantized yet, or with `scheme`, as quantizing would
    make it.  Against all profiles, and for a model not quantized yet, every scheme is tried.
    """
    model = read_model(source)
    names: Sequence[str | Path] = list_devices() if device is None else [device]
    works = _workloads(model, scheme, every=device is None)
    devices = [load_device(name) for name in names]
    return {
        "schema": "edgeslm.fit/1",
        "model": {
            "name": model.name,
            "path": str(model.path),
            "architecture": model.architecture,
            "parameters": works[0].parameters,
            "context_length": model.shape.context_length,
        },
        "context": context,
        "prompt_tokens": prompt_tokens,
        "devices": [
            {
                "device": one.name,
                "description": one.description,
                "memory_bytes": one.memory_bytes,
                "free_bytes": free_bytes(one),
                "schemes": [
                    predict(
                        work, one, context=context, prompt_tokens=prompt_tokens, speed=not model.classifier
                    )
                    for work in works
                ],
            }
            for one in devices
        ],
        "notes": _notes(model, works, devices, context),
    }


def raise_for_fit(record: Record) -> None:
    """Raise GateError where the record is of one device and nothing of it fits."""
    if len(record["devices"]) != 1:
        return
    (found,) = record["devices"]
    if not any(each["fits"] for each in found["schemes"]):
        least = min(each["memory"]["total_bytes"] for each in found["schemes"])
        raise GateError(
            f"{record['model']['name']} does not fit {found['device']}: it needs {least / 2**20:,.0f} MiB, "
            f"{found['free_bytes'] / 2**20:,.0f} MiB are free",
            hint="take a shorter --context, a smaller scheme or a smaller model",
        )


def predict(
    work: Workload, device: Device, *, context: int, prompt_tokens: int, speed: bool = True
) -> Record:
    """Memory, verdict, load time, time to first token and rates of one workload on one device.

    speed: False leaves the rates out, for what doesn't write token by token.  Decoding is that of the 128
    tokens after the prompt.  Each rate and time is {value, low, high}, or None where the profile lacks what
    it takes.
    """
    memory = memory_bytes(work, context)
    free = free_bytes(device)
    total = sum(part or 0 for part in memory.values())
    prefill = prefill_s(work, device, prompt_tokens) if speed else None
    decode = decode_s(work, device, prompt_tokens + 64) if speed else None
    wide = ONNX_SPREAD if work.format == "onnx" else 0.0
    spreads = [
        max(spread or DEFAULT_SPREAD, wide) for spread in (device.prefill_spread, device.decode_spread)
    ]
    return {
        "scheme": work.scheme,
        "bits_per_weight": 8 * work.weight_bytes / work.parameters if work.parameters else None,
        "file_bytes": work.file_bytes,
        "memory": {**memory, "total_bytes": total},
        "fits": total <= free,
        "verdict": "no" if total > free else "tight" if total > TIGHT_SHARE * free else "yes",
        "load_s": load_s(work, device),
        "ttft_s": _around(prefill, spreads[0]),
        "prefill_tokens_per_s": _around(prompt_tokens / prefill if prefill else None, spreads[0]),
        "decode_tokens_per_s": _around(1 / decode if decode else None, spreads[1]),
    }


def memory_bytes(work: Workload, context: int) -> dict[str, int | None]:
    """What the model takes with `context` tokens; a part that can't be told is None."""
    shape = work.shape
    if work.format == "onnx":
        weights, cache, compute = ONNX_COPIES * work.weight_bytes, _cache_elements(shape, context), None
        cache = None if cache is None else cache * work.kv_element_bytes
    else:
        weights, cache = work.weight_bytes, kv_cache_bytes(shape, context)
        compute = compute_buffer_bytes(shape, context)
    runtime = RUNTIME_BYTES[work.format] + TOKEN_BYTES * (shape.vocab_size or 0)
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": cache,
        "compute_bytes": compute,
        "runtime_bytes": runtime,
    }


def free_bytes(device: Device) -> int:
    """Memory that the system leaves to a model."""
    system = device.memory_system_bytes
    return device.memory_bytes - (round(SYSTEM_SHARE * device.memory_bytes) if system is None else system)


def family(type_name: str, device: Device) -> str:
    """How a device multiplies a storage type: one of device.FAMILIES, or "plain".

    "repacked": blocks of 32 whose rows ggml interleaves; "repacked_k": K-quants of which it does.
    """
    measured = device.prefill_family_ops_per_s
    if type_name == "Q8_0" and "eight_bit" in measured:
        return "eight_bit"
    packed = "repacked_k" if type_name.endswith("_K") else "repacked"
    able = set(REPACKED.get(type_name, ())) & set(device.instruction_sets)
    if able and device.accelerator is None and packed in measured:
        return packed
    return "codebook" if type_name.startswith("IQ") else "plain"


def decode_s(work: Workload, device: Device, cells: int) -> float | None:
    """Seconds for one token after `cells` others; None without a bandwidth."""
    bandwidth = device.memory_bandwidth_bytes_per_s
    if bandwidth is None:
        return None
    seconds = (device.layer_overhead_s * (work.shape.layers or 0)) + _cache_read(work, cells) / bandwidth
    for part in (*work.blocks, *work.head):
        rate = _rate(part, device) or math.inf
        seconds += part.active * max(part.nbytes / bandwidth, 2 * part.parameters / rate)
    return seconds


def prefill_s(work: Workload, device: Device, tokens: int) -> float | None:
    """Seconds until the first token of an answer to `tokens`; None without a rate or a bandwidth."""
    plain, bandwidth = device.prefill_ops_per_s, device.memory_bandwidth_bytes_per_s
    if plain is None or bandwidth is None:
        return None
    shape, batches = work.shape, math.ceil(tokens / UBATCH_TOKENS)
    seconds = device.layer_overhead_s * (shape.layers or 0) * batches
    for part in work.blocks:
        rate = _rate(part, device) or plain
        read = batches * part.nbytes / bandwidth
        seconds += max(2 * part.active * part.parameters * tokens / rate, read)
    seconds += sum(part.nbytes for part in work.head) / bandwidth
    width = (shape.heads or 0) * ((shape.key_length or 0) + (shape.value_length or 0))
    seen = sum(_seen(tokens, shape.window if windowed else None) for windowed in shape.windowed)
    return seconds + 2 * width * seen * tokens / (ATTENTION_RATE * plain)


def load_s(work: Workload, device: Device) -> float | None:
    """Seconds to read the file once from storage, nothing of it cached, and to put it in order in memory."""
    storage, bandwidth = device.storage_bytes_per_s, device.memory_bandwidth_bytes_per_s
    if storage is None:
        return None
    packed = (part for part in work.parts if family(part.type, device).startswith("repacked"))
    moved = work.weight_bytes if work.format == "onnx" else sum(part.nbytes for part in packed)
    return work.file_bytes / storage + (2 * moved / bandwidth if bandwidth else 0.0)


def _workloads(model: Model, scheme: str | None, *, every: bool) -> list[Workload]:
    """What is tried: the artifact as it is, and schemes where they are asked for or nothing else is there."""
    if scheme is not None:
        return [in_scheme(model, scheme)]
    planned = every or model.own is None
    schemes = [in_scheme(model, name) for name in SCHEMES] if planned and model.tensors else []
    own = [] if model.own is None else [model.own]
    return own + [work for work in schemes if model.own is None or work.scheme != model.own.scheme]


def _notes(model: Model, works: Sequence[Workload], devices: Sequence[Device], context: int) -> list[str]:
    notes = []
    trained = model.shape.context_length
    if trained is not None and context > trained:
        notes.append(f"the model was trained for {trained} tokens of context; {context} are more")
    if model.classifier:
        notes.append("a classifier: no speed is predicted, measure it with `edgeslm bench`")
    elif any(work.format == "onnx" for work in works):
        notes.append(
            "ONNX Runtime's compute buffer is not counted, and its speed can be half or twice as much"
        )
    if len(devices) == 1:  # the table of all devices shows what there is
        (one,) = devices
        rates = {
            "decode": one.memory_bandwidth_bytes_per_s,
            "prefill": one.prefill_ops_per_s,
            "storage": one.storage_bytes_per_s,
        }
        missing = [what for what, value in rates.items() if value is None]
        if missing:
            notes.append(f"nobody has measured the {' and '.join(missing)} rate of {one.name}")
    return notes


def _rate(part: Part, device: Device) -> float | None:
    return device.prefill_family_ops_per_s.get(family(part.type, device), device.prefill_ops_per_s)


def _seen(tokens: int, window: int | None) -> float:
    """Cells that a token of a prompt attends to, on average."""
    near = tokens if window is None else min(tokens, window)
    return (near * near / 2 + (tokens - near) * near) / max(tokens, 1)


def _cache_elements(shape: Shape, cells: int) -> int | None:
    """Elements of keys and values of all layers for so many cells."""
    if not shape.kv_heads or shape.key_length is None or shape.value_length is None:
        return None
    width = shape.key_length + shape.value_length
    near = min(cells, shape.window) if shape.window is not None else cells
    return width * sum(
        heads * (near if windowed else cells)
        for heads, windowed in zip(shape.kv_heads, shape.windowed, strict=True)
    )


def _cache_read(work: Workload, cells: int) -> int:
    return work.kv_element_bytes * (_cache_elements(work.shape, cells) or 0)


def _around(value: float | None, spread: float) -> dict[str, float] | None:
    """A value with the band that published runs scatter in."""
    return (
        None if value is None else {"value": value, "low": value / (1 + spread), "high": value * (1 + spread)}
    )
