"""Safetensors files and checkpoints made of them, checked as untrusted data.

Format: github.com/huggingface/safetensors, README and safetensors/src/tensor.rs: eight bytes of
header length, a JSON header, then the tensors' bytes with neither gaps nor overlaps.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
MAX_JSON_ITEMS = 2**22
"""Most lists, objects and commas of a header: what a small JSON text can grow to in memory is bounded too."""
MAX_INDEX_BYTES = MAX_HEADER_BYTES
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of one value of each dtype of the format."""

_NUMPY = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "C64": "<c8", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SafeTensor:
    """Where a tensor lies; offset counts from the beginning of the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)


def read_safetensors(path: Path | str) -> dict[str, SafeTensor]:
    """The tensors of one file, in the order of its header; ModelError says what is wrong with it."""
    path = Path(path)
    size = _regular_file_size(path)
    if size < 8:
        raise ModelError(f"{path} is not a safetensors file: it has only {size} bytes")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelError(
                    f"{path}: declares a header of {length} bytes; the file has {size - 8} more and "
                    f"{MAX_HEADER_BYTES} is the most allowed",
                    hint="it is cut off, damaged or not a safetensors file: get it again",
                )
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    if not text.startswith(b"{"):
        raise ModelError(f"{path} is not a safetensors file: its header does not begin with '{{'")
    header = _parse_json(path, text)
    _check_metadata(path, header.pop("__metadata__", None))
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items()}
    _check_coverage(path, tensors.values(), start=start, size=size)
    return tensors


def read_checkpoint(directory: Path | str) -> dict[str, SafeTensor]:
    """The tensors of a Hugging Face directory: model.safetensors, or an index and its shards."""
    directory = Path(directory)
    try:
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a directory")
        if (directory / SINGLE_NAME).is_file():
            return read_safetensors(directory / SINGLE_NAME)
        if not (directory / INDEX_NAME).is_file():
            raise _no_weights(directory)
        return _read_shards(directory, _read_index(directory / INDEX_NAME))
    except OSError as error:
        raise ModelError(f"{error.filename}: {error.strerror or error}") from error


def load(tensor: SafeTensor) -> NDArray[Any]:
    """The values, mapped read-only, in the tensor's shape; BF16 as its raw uint16."""
    form = _NUMPY.get(tensor.dtype)
    if form is None:
        raise ModelError(
            f"{tensor.path}: {tensor.name!r} is stored as {tensor.dtype}, which can't be used as it is",
            hint="save the model in bfloat16 first",
        )
    if tensor.nbytes == 0:
        return np.empty(tensor.shape, form)
    try:
        return np.memmap(tensor.path, form, "r", offset=tensor.offset, shape=tensor.shape)
    except (OSError, ValueError) as error:
        raise ModelError(f"{tensor.path}: can't map {tensor.name!r}: {error}") from error


def to_float32(tensor: SafeTensor) -> NDArray[np.float32]:
    """The values of a floating-point tensor in float32; F32 stays mapped, all others are copied."""
    if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
        raise ModelError(
            f"{tensor.path}: {tensor.name!r} is stored as {tensor.dtype}, not as floating-point weights",
            hint="save the model in bfloat16 first",
        )
    values = load(tensor)
    if tensor.dtype == "BF16":
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


def _regular_file_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a file")
    return status.st_size


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object with unique keys and no constants beyond the standard (NaN, Infinity)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, item in pairs:
            if name in result:
                raise ValueError(f"{_quote(name)} stands there twice")
            for part in (name, item):
                if isinstance(part, str):
                    part.encode()  # refuses half of a surrogate pair, which JSON's escapes can spell
            result[name] = item
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    if sum(text.count(mark) for mark in (b"{", b"[", b",")) > MAX_JSON_ITEMS:
        raise ModelError(f"{path}: its JSON has more than {MAX_JSON_ITEMS} items")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ModelError(f"{path}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path}: its JSON can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: its JSON is not an object")
    return value


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ is not a mapping of strings to strings")


def _quote(name: str) -> str:
    """A name from the file for a message, however long it is."""
    return repr(name[:100])


def _is_size(value: Any) -> bool:
    """JSON's true is an int to Python, hence the exact type."""
    return type(value) is int and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any, start: int) -> SafeTensor:
    """One entry of the header; offsets there count from the end of the header."""
    if not isinstance(entry, dict):
        raise ModelError(f"{path}: tensor {_quote(name)} is not described by an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ModelError(f"{path}: tensor {_quote(name)} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ModelError(
            f"{path}: tensor {_quote(name)} has the shape {str(shape)[:80]}, not a list of sizes"
        )
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)) or span[0] > span[1]:
        raise ModelError(f"{path}: tensor {_quote(name)} has data_offsets {str(span)[:80]}, not [begin, end]")
    bits = _bits(shape, BITS[dtype])
    if bits is None or bits != 8 * (span[1] - span[0]):
        need = "more bytes than can be counted" if bits is None else f"{bits / 8:g} bytes"
        raise ModelError(
            f"{path}: tensor {_quote(name)} of dtype {dtype} and shape {str(shape)[:80]} needs {need}, "
            f"but spans {span[1] - span[0]}"
        )
    return SafeTensor(name=name, dtype=dtype, shape=tuple(shape), path=path, offset=start + span[0],
                      nbytes=span[1] - span[0])  # fmt: skip


def _bits(shape: Sequence[int], bits: int) -> int | None:
    """Bits of a tensor; None once a product can't be held in 64 bits, zero-sized or not."""
    for size in shape:
        bits *= size
        if bits >= 2**64:
            return None
    return bits


def _check_coverage(path: Path, tensors: Any, *, start: int, size: int) -> None:
    """The tensors must fill the file from the header's end to the last byte."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != at:
            gap = tensor.offset - at
            what = "overlaps the one before" if gap < 0 else f"leaves {gap} bytes unused before it"
            raise ModelError(f"{path}: tensor {_quote(tensor.name)} {what}")
        at += tensor.nbytes
    if at != size:
        raise ModelError(
            f"{path}: its tensors end at byte {at} of a file of {size}",
            hint="it is cut off or damaged: get it again",
        )


def _read_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, SafeTensor]:
    """The tensors of all shards, after checking that index and shards agree on each of them."""
    tensors: dict[str, SafeTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise ModelError(f"{directory}: the shard {shard} is missing", hint="get the model again")
        for name, tensor in read_safetensors(directory / shard).items():
            if weight_map.get(name) != shard:
                place = f"puts it into {weight_map[name]}" if name in weight_map else "does not list it"
                raise ModelError(f"{directory}: {shard} holds {_quote(name)}, but {INDEX_NAME} {place}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ModelError(
                f"{directory}: {INDEX_NAME} puts {_quote(name)} into {shard}, which does not hold it"
            )
    return tensors


def _read_index(path: Path) -> Mapping[str, str]:
    """Tensor name to shard; every shard is a plain file name, so that none leads out of the directory."""
    if _regular_file_size(path) > MAX_INDEX_BYTES:
        raise ModelError(f"{path} is larger than {MAX_INDEX_BYTES} bytes")
    weight_map = _parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ModelError(
                f"{path}: {_quote(name)} points to {str(shard)[:80]!r}, not to a .safetensors file beside it"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    forbidden = set(name) & {"/", "\\", "\0", ":"} or name.startswith(".") or len(name.encode()) > 255
    return name.endswith(".safetensors") and not forbidden


def _no_weights(directory: Path) -> ModelError:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and "training_args" not in name]
    if pickles:
        return ModelError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code when loaded",
            hint="convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW, safe_serialization=True)",
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"; it has {', '.join(others[:3])}" if others else ""
    return ModelError(
        f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}{found}",
        hint="save the model with save_pretrained, or name a .gguf file",
    )
