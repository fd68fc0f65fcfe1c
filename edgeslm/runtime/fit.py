"""Runner options against the model and the machine: what is left open, what can't be, what can't fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgeslm.errors import EngineError, RecipeError
from edgeslm.gguf_file import GGML_TYPES
from edgeslm.runtime.host import usable_cores
from edgeslm.runtime.runner import KV_TYPES

if TYPE_CHECKING:
    from edgeslm.gguf_file import GgufFile
    from edgeslm.runtime.runner import RunnerOptions

DEFAULT_CONTEXT = 4096
"""Most tokens of context unless asked for: a KV cache that small devices can hold."""
MAX_THREADS = 512
"""ggml's GGML_MAX_N_THREADS; it aborts the process above."""
DEFAULT_KV_TYPE = "f16"
"""Of llama.cpp's KV cache, unless asked for another."""
PLAIN_KV_TYPES = ("f32", "f16", "bf16")
"""KV cache types that work without flash attention."""
_INT32_MAX = 2**31 - 1


def completed(options: RunnerOptions, file: GgufFile) -> RunnerOptions:
    """`options` with what they leave open of threads, context and KV type.  Raises RecipeError for nonsense."""
    kv_type = options.kv_type or DEFAULT_KV_TYPE
    if kv_type not in KV_TYPES:
        raise RecipeError(f"unknown KV cache type {kv_type!r}", hint=f"one of {', '.join(KV_TYPES)}")
    if options.flash_attention is False and kv_type not in PLAIN_KV_TYPES:
        raise RecipeError(
            f"a KV cache of type {kv_type} needs flash attention, which is switched off",
            hint="leave flash attention on auto, or use the KV type f16",
        )
    if options.provider not in (None, "cpu"):
        raise RecipeError(
            f"llama.cpp has no execution provider {options.provider!r}",
            hint="providers are for bundles in the format onnx: leave it out",
        )
    sized = with_sizes(options, _number(file, "context_length") or DEFAULT_CONTEXT)
    return replace(sized, kv_type=kv_type, provider="cpu")


def with_sizes(options: RunnerOptions, trained_context: int) -> RunnerOptions:
    """`options` with the threads and the context that they leave open.  Raises RecipeError for nonsense."""
    for name in ("threads", "context", "batch", "ubatch"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= _INT32_MAX:
            raise RecipeError(f"{name} is {value}", hint=f"give a whole number from 1 to {_INT32_MAX}")
    if options.threads is not None and options.threads > MAX_THREADS:
        raise RecipeError(f"threads is {options.threads}, more than ggml's {MAX_THREADS}", hint="use fewer")
    return replace(
        options,
        threads=options.threads or min(usable_cores(), MAX_THREADS),
        context=options.context or min(trained_context, DEFAULT_CONTEXT),
    )


def kv_cache_bytes(file: GgufFile, context: int, kv_type: str) -> int:
    """Bytes that a KV cache of `context` tokens takes at least: a sliding window counts for every layer."""
    heads = _per_layer(file, "attention.head_count")
    kv_heads = _per_layer(file, "attention.head_count_kv") or heads
    most = max(heads, default=0)
    head = _number(file, "embedding_length") // most if most else 0
    width = (_number(file, "attention.key_length") or head) + (
        _number(file, "attention.value_length") or head
    )
    tokens = min(context, _number(file, "attention.sliding_window") or context)
    kind = GGML_TYPES[kv_type.upper()]
    return width * sum(kv_heads) * tokens * kind.block_bytes // kind.block_elements


def check_memory(file: GgufFile, options: RunnerOptions, total_bytes: int) -> None:
    """Raise EngineError, with the numbers, for a model that can't fit.

    Mapped weights count too: what exceeds memory would be read from the disk for every token.
    """
    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    cache = kv_cache_bytes(file, options.context or 0, options.kv_type or DEFAULT_KV_TYPE)
    check_fits(
        file.path.name, (weights, cache), options.context or 0, total_bytes, instead=", or --kv-type q8_0"
    )


def check_fits(
    name: str, needed: tuple[int, int], context: int, total_bytes: int, *, instead: str = ""
) -> None:
    """Raise EngineError where the bytes of weights and of a KV cache of `context` tokens exceed memory."""
    weights, cache = needed
    if weights + cache > total_bytes:
        raise EngineError(
            f"{name} needs {_mib(weights + cache)} (weights {_mib(weights)}, KV cache of "
            f"{context} tokens {_mib(cache)}), this machine has {_mib(total_bytes)}",
            hint=f"use a shorter --context{instead}"
            if weights <= total_bytes
            else "use a smaller model or a smaller quantization",
        )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _number(file: GgufFile, key: str) -> int:
    """A whole number of the model's metadata; 0 where it is missing or something else."""
    value = file.get(f"{file.architecture}.{key}")
    return value if isinstance(value, int) else 0


def _per_layer(file: GgufFile, key: str) -> list[int]:
    """A number that counts for every layer, or an array with one for each."""
    value = file.get(f"{file.architecture}.{key}")
    if isinstance(value, int):
        return [value] * min(_number(file, "block_count"), _INT32_MAX)
    return [item for item in value if isinstance(item, int)] if isinstance(value, list | tuple) else []
