"""The structure of a GGUF file, checked as untrusted data before any native loader or large allocation.

Layout: ggml/include/gguf.h of llama.cpp.  Whatever llama.cpp refuses is refused here too, with the
exception of gaps between tensors, which are harmless to a reader.  Counts and lengths are held
against the bytes that are left before anything of that size is made.
"""

from __future__ import annotations

import mmap
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAX_HEADER_BYTES = 2**27
"""Most bytes of metadata and tensor descriptions: over three times the largest vocabulary published."""
MAX_ARRAY_ITEMS = 2**22
"""Most items of all metadata arrays together: eight times the largest list of merges published."""
MAX_FIELDS = 2**16
MAX_TENSORS = 2**17
MAX_KEY_BYTES = 2**16 - 1
MAX_NAME_BYTES = 63
"""llama.cpp keeps tensor names in 64 bytes, one of them the closing zero (GGML_MAX_NAME)."""
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class GgmlType:
    """A storage type of ggml: rows are made of blocks of `block_elements` values in `block_bytes` bytes."""

    name: str
    id: int
    block_elements: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_elements


# (name, id, elements of a block, bytes of a block) from ggml.h and ggml-common.h.
GGML_TYPES: dict[str, GgmlType] = {
    name: GgmlType(name=name, id=number, block_elements=elements, block_bytes=nbytes)
    for name, number, elements, nbytes in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 36),
        ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2),
        ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
    )
}  # fmt: skip

_TYPES_BY_ID = {kind.id: kind for kind in GGML_TYPES.values()}

# Metadata value types by their number; strings and arrays have no fixed size.
_KINDS = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "array", "u64", "i64", "f64")
_NUMPY_KINDS = {
    "u8": "<u1", "i8": "<i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "f32": "<f4",
    "bool": "<i1", "u64": "<u8", "i64": "<i8", "f64": "<f8",
}  # fmt: skip


def type_by_id(number: int) -> GgmlType:
    """The type that a file calls `number`; ModelError for one that ggml doesn't have (any more)."""
    try:
        return _TYPES_BY_ID[number]
    except KeyError:
        raise ModelError(f"no ggml type has the number {number}") from None


def row_bytes(type_name: str, n: int) -> int:
    """Bytes of a row of `n` values; ModelError where they don't fill whole blocks."""
    kind = GGML_TYPES.get(type_name)
    if kind is None:
        raise ModelError(f"no ggml type is called {type_name}", hint="use one of " + " ".join(GGML_TYPES))
    if n < 0 or n % kind.block_elements:
        raise ModelError(
            f"a row of {n} values does not fill whole {type_name} blocks of {kind.block_elements}"
        )
    return n // kind.block_elements * kind.block_bytes


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies.  shape is in numpy's order: the last number is the row's length (ggml's ne[0])."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    """From the beginning of the file."""
    nbytes: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One metadata value; an array is a list whose items have the kind item_kind."""

    kind: str
    item_kind: str | None
    value: Any


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file whose structure is sound; nothing is said of its weights' values."""

    path: Path
    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    size_bytes: int

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key."""
        field = self.fields.get(key)
        return default if field is None else field.value

    @property
    def architecture(self) -> str:
        """general.architecture, such as "llama"; "" where the file names none."""
        name = self.get("general.architecture")
        return name if isinstance(name, str) else ""


def read_gguf(path: Path | str) -> GgufFile:
    """Read and check everything but the weights' values; ModelError says what is wrong with the file."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a file")
        if status.st_size < 24:
            raise ModelError(f"{path} is not a GGUF file: it has only {status.st_size} bytes")
        mapped = min(status.st_size, MAX_HEADER_BYTES)
        with path.open("rb") as file, _map(file, mapped) as data:
            return _parse(path, _Cursor(path, data, cut=mapped < status.st_size), status.st_size)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


def tensor_bytes(file: GgufFile, info: TensorInfo) -> NDArray[np.uint8]:
    """[rows, row bytes] the tensor's blocks, mapped read-only.  ModelError if the file has changed since."""
    length = info.shape[-1] if info.shape else 1
    shape = (prod(info.shape[:-1]), row_bytes(info.type, length))
    if info.nbytes == 0:
        return np.empty(shape, np.uint8)
    try:
        return np.memmap(file.path, np.uint8, "r", offset=info.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.path}: can't map tensor {info.name}: {error}") from error


def _map(file: BinaryIO, length: int) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
    except ValueError as error:  # the file has shrunk since it was measured
        raise ModelError(f"{file.name}: {error}") from error


class _Cursor:
    """Takes one value after the other and never steps beyond the mapped part of the file."""

    def __init__(self, path: Path, data: mmap.mmap, *, cut: bool) -> None:
        self.path = path
        self.data = data
        self.cut = cut
        self.at = 0
        self.end = len(data)
        self.items_left = MAX_ARRAY_ITEMS

    def error(self, text: str, hint: str = "") -> ModelError:
        return ModelError(f"{self.path}: {text}", hint=hint)

    def reserve(self, nbytes: int, what: str) -> int:
        """Where the next `nbytes` begin, after checking that they are there."""
        if nbytes > self.end - self.at:
            if self.cut:
                raise self.error(f"{what} goes beyond {MAX_HEADER_BYTES} bytes of metadata")
            raise self.error(f"the file ends inside {what}", hint="it is cut off or damaged: get it again")
        start = self.at
        self.at += nbytes
        return start

    def integer(self, form: str, what: str) -> int:
        return int(struct.unpack_from(form, self.data, self.reserve(struct.calcsize(form), what))[0])

    def string(self, limit: int, what: str) -> str:
        length = self.integer("<Q", what)
        if length > limit:
            raise self.error(f"{what} has {length} bytes; at most {limit} are possible")
        start = self.reserve(length, what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None

    def numbers(self, kind: str, count: int, what: str) -> list[Any]:
        form = np.dtype(_NUMPY_KINDS[kind])
        start = self.reserve(count * form.itemsize, what)
        values = np.frombuffer(self.data[start : self.at], form)
        items: list[Any] = (values != 0 if kind == "bool" else values).tolist()
        return items

    def strings(self, count: int, what: str) -> list[str]:
        """A plain loop over offsets: vocabularies make this the only hot spot of the module."""
        self.reserve(8 * count, what)
        self.at -= 8 * count
        data, at, end, length_at = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        items = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at > end:
                    self.at = start
                    self.reserve(at - start, what)
                items.append(data[start:at].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise self.error(f"item {len(items)} of {what} is not UTF-8: {error.reason}") from None
        except struct.error:
            self.reserve(self.end - self.at + 1, what)
        self.at = at
        return items


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    version = _check_magic_and_version(cursor)
    tensor_count = _count(cursor, "tensors", 24, MAX_TENSORS)
    field_count = _count(cursor, "metadata keys", 13, MAX_FIELDS)
    fields: dict[str, Field] = {}
    for index in range(field_count):
        key = cursor.string(MAX_KEY_BYTES, f"metadata key {index}")
        if not key or key in fields:
            raise cursor.error(f"metadata key {index} is {'a second ' + repr(key[:80]) if key else 'empty'}")
        fields[key] = _read_field(cursor, key)
    _refuse_split(cursor, fields)
    alignment = _alignment(cursor, fields)
    tensors: dict[str, TensorInfo] = {}
    for index in range(tensor_count):
        info = _read_tensor_info(cursor, index)
        if info.name in tensors:
            raise cursor.error(f"two tensors are called {info.name!r}")
        tensors[info.name] = info
    data_offset = cursor.at if not tensors else -(-cursor.at // alignment) * alignment
    tensors = {
        name: _placed(cursor, info, data_offset=data_offset, alignment=alignment, size=size)
        for name, info in tensors.items()
    }
    _refuse_overlap(cursor, tensors)
    return GgufFile(path=path, version=version, alignment=alignment, fields=fields, tensors=tensors,
                    data_offset=data_offset, size_bytes=size)  # fmt: skip


def _check_magic_and_version(cursor: _Cursor) -> int:
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise cursor.error(f"not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    cursor.reserve(4, "the magic number")
    version = cursor.integer("<I", "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error(
            "a big-endian GGUF file; only little-endian ones can be used here",
            hint="convert it with gguf-py's gguf_convert_endian, or get the little-endian file",
        )
    if version not in (2, 3):
        raise cursor.error(
            f"GGUF version {version}; versions 2 and 3 can be read", hint="convert the model again"
        )
    return version


def _count(cursor: _Cursor, what: str, least_bytes: int, limit: int) -> int:
    """A declared number of things that take at least `least_bytes` of the file each."""
    count = cursor.integer("<Q", f"the number of {what}")
    possible = (cursor.end - cursor.at) // least_bytes
    if count > min(limit, possible):
        reason = f"the file has room for {possible}" if possible < count else f"the most allowed is {limit}"
        raise cursor.error(f"declares {count} {what}; {reason}")
    return count


def _read_field(cursor: _Cursor, key: str) -> Field:
    what = f"metadata {key[:80]!r}"
    kind = _kind(cursor, what)
    if kind == "str":
        return Field(kind=kind, item_kind=None, value=cursor.string(MAX_HEADER_BYTES, what))
    if kind != "array":
        return Field(kind=kind, item_kind=None, value=cursor.numbers(kind, 1, what)[0])
    item_kind = _kind(cursor, what)
    if item_kind == "array":
        raise cursor.error(f"{what} is an array of arrays, which llama.cpp can't read either")
    count = cursor.integer("<Q", what)
    if count > cursor.items_left:
        raise cursor.error(f"{what} declares {count} items; the most allowed in a file is {MAX_ARRAY_ITEMS}")
    cursor.items_left -= count
    items = cursor.strings(count, what) if item_kind == "str" else cursor.numbers(item_kind, count, what)
    return Field(kind=kind, item_kind=item_kind, value=items)


def _kind(cursor: _Cursor, what: str) -> str:
    number = cursor.integer("<I", what)
    if number >= len(_KINDS):
        raise cursor.error(f"{what} has the unknown type {number}")
    return _KINDS[number]


def _refuse_split(cursor: _Cursor, fields: Mapping[str, Field]) -> None:
    field = fields.get("split.count")
    if field is not None and isinstance(field.value, int) and field.value > 1:
        raise cursor.error(
            f"one of {field.value} parts of a split model",
            hint="merge them first: llama-gguf-split --merge NAME-00001-of-0000N.gguf merged.gguf",
        )


def _alignment(cursor: _Cursor, fields: Mapping[str, Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return DEFAULT_ALIGNMENT
    if field.kind != "u32" or field.value.bit_count() != 1:
        raise cursor.error(f"general.alignment is {field.value!r} ({field.kind}), not a u32 power of two")
    return int(field.value)


def _read_tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    """One tensor description; its offset still counts from the beginning of the data."""
    name = cursor.string(MAX_NAME_BYTES, f"the name of tensor {index}")
    if not name or not name.isprintable():
        raise cursor.error(f"tensor {index} has the impossible name {name!r}")
    what = f"the description of tensor {name!r}"
    dimensions = cursor.integer("<I", what)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.error(
            f"tensor {name!r} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are possible"
        )
    shape = tuple(cursor.integer("<Q", what) for _ in range(dimensions))[::-1]
    kind = _TYPES_BY_ID.get(number := cursor.integer("<I", what))
    if kind is None:
        raise cursor.error(f"tensor {name!r} has the unknown type {number}", hint="quantize the model again")
    # Zeros count as ones here: an engine multiplies the dimensions one after the other.
    if prod(max(1, n) for n in shape) * kind.block_bytes >= 2**63:
        raise cursor.error(f"tensor {name!r} of shape {shape} has a size that can't be represented")
    length = shape[-1] if shape else 1
    if length % kind.block_elements:
        raise cursor.error(
            f"tensor {name!r} has rows of {length} values, which don't fill {kind.name} blocks of "
            f"{kind.block_elements}"
        )
    nbytes = prod(shape) // kind.block_elements * kind.block_bytes
    return TensorInfo(
        name=name, shape=shape, type=kind.name, offset=cursor.integer("<Q", what), nbytes=nbytes
    )


def _placed(cursor: _Cursor, info: TensorInfo, *, data_offset: int, alignment: int, size: int) -> TensorInfo:
    """The same tensor with its offset from the beginning of the file, after checking where it lies."""
    if info.offset % alignment:
        raise cursor.error(f"tensor {info.name!r} is at {info.offset}, not a multiple of {alignment}")
    offset = data_offset + info.offset
    if offset + info.nbytes > size:
        raise cursor.error(
            f"tensor {info.name!r} ends at byte {offset + info.nbytes} of a file of {size}",
            hint="it is cut off or damaged: get it again",
        )
    return TensorInfo(name=info.name, shape=info.shape, type=info.type, offset=offset, nbytes=info.nbytes)


def _refuse_overlap(cursor: _Cursor, tensors: Mapping[str, TensorInfo]) -> None:
    ordered = sorted((info for info in tensors.values() if info.nbytes), key=lambda info: info.offset)
    for first, second in pairwise(ordered):
        if first.offset + first.nbytes > second.offset:
            raise cursor.error(f"tensors {first.name!r} and {second.name!r} overlap")
