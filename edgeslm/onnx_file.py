"""The structure of an ONNX file, read without the onnx package and before an engine sees it.

ONNX is a protobuf message (onnx/onnx.proto): fields of (number, wire type) one after the other.  Only
what is needed is read: opset, inputs and outputs, and the shape, type and size of every stored tensor.
A file that keeps data outside of itself is refused, since an engine would open whatever path it names.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# onnx.proto, TensorProto.DataType: number to (name, bits of an element).
TYPES = {
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 4: ("U16", 16), 5: ("I16", 16), 6: ("I32", 32), 7: ("I64", 64),
    9: ("BOOL", 8), 10: ("F16", 16), 11: ("F64", 64), 12: ("U32", 32), 13: ("U64", 64), 16: ("BF16", 16),
    17: ("F8_E4M3FN", 8), 19: ("F8_E5M2", 8), 21: ("U4", 4), 22: ("I4", 4),
}  # fmt: skip
MAX_DEPTH = 16
"""Graphs within graphs (branches, loops)."""
MAX_TENSORS = 2**20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1
_DATA_FIELDS = {4: "F32", 5: "I32", 7: "I64", 10: "F64", 11: "U64"}
"""Repeated fields that hold values where raw_data does not."""


@dataclass(frozen=True, kw_only=True)
class OnnxTensor:
    """A stored tensor: shape with the fastest axis last; nbytes of its values."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """What an ONNX file declares."""

    path: Path
    opset: int | None
    producer: str
    tensors: dict[str, OnnxTensor]
    """Initializers by name: the weights, and constants such as shapes."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(path: Path) -> OnnxFile:
    """Read and check the structure of an ONNX file; ModelError for what is damaged or leads elsewhere."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelError(f"{path.name}: an empty file", hint="get it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).model()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error


Span = tuple[int, int]
"""Where a message lies: first byte and the one behind its last."""


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data

    def model(self) -> OnnxFile:
        opset, producer, graph = None, "", None
        for number, kind, value in self._fields((0, len(self._data))):
            if number == 7 and kind == _BYTES:
                graph = value
            elif number == 2 and kind == _BYTES:
                producer = self._text(value)
            elif number == 8 and kind == _BYTES:
                found = {n: v for n, _, v in self._fields(value)}
                if 1 not in found or found[1][0] == found[1][1]:  # the default domain, not an extension
                    opset = found[2][0] if 2 in found else None
        if graph is None:
            raise self._error("no ONNX file: it holds no graph", "export the model again")
        tensors: dict[str, OnnxTensor] = {}
        names: dict[int, list[str]] = {11: [], 12: []}
        self._graph(graph, tensors, names, 0)
        return OnnxFile(
            path=self._path, opset=opset, producer=producer, tensors=tensors,
            inputs=tuple(name for name in names[11] if name not in tensors), outputs=tuple(names[12]),
        )  # fmt: skip

    def _graph(
        self, span: Span, tensors: dict[str, OnnxTensor], names: dict[int, list[str]] | None, depth: int
    ) -> None:
        if depth > MAX_DEPTH:
            raise self._error(f"graphs are nested more than {MAX_DEPTH} deep")
        for number, kind, value in self._fields(span):
            if kind != _BYTES:
                continue
            if number == 5:
                tensor = self._tensor(value)
                if tensor.name in tensors or len(tensors) >= MAX_TENSORS:
                    raise self._error(
                        f"the tensor {tensor.name[:80]!r} is there twice, or there are too many"
                    )
                tensors[tensor.name] = tensor
            elif number == 1:
                self._node(value, depth)
            elif number == 15:
                self._sparse(value)
            elif number in (11, 12) and names is not None:
                names[number] += [self._text(v) for n, k, v in self._fields(value) if n == 1 and k == _BYTES]

    def _node(self, span: Span, depth: int) -> None:
        """Constants and inner graphs of a node: they may not lead out of the file either."""
        for number, kind, attribute in self._fields(span):
            if number != 5 or kind != _BYTES:
                continue
            for inner, inner_kind, value in self._fields(attribute):
                if inner_kind != _BYTES:
                    continue
                if inner in (5, 10):
                    self._tensor(value)
                elif inner in (6, 11):
                    self._graph(value, {}, None, depth + 1)
                elif inner in (22, 23):
                    self._sparse(value)

    def _sparse(self, span: Span) -> None:
        """A SparseTensorProto: its values and their places are tensors."""
        for number, kind, value in self._fields(span):
            if number in (1, 2) and kind == _BYTES:
                self._tensor(value)

    def _tensor(self, span: Span) -> OnnxTensor:
        name, kind, shape, held = "", 0, [], None
        for number, wire, value in self._fields(span):
            if number == 1:
                shape += [value[0]] if wire == _VARINT else self._varints(value)
            elif number == 2:
                kind = value[0]
            elif number == 8 and wire == _BYTES:
                name = self._text(value)
            elif number == 9 and wire == _BYTES:
                held = value[1] - value[0]
            elif number == 13 or (number == 14 and value[0] == _EXTERNAL):
                raise self._error(
                    "its weights are kept in another file",
                    "export it again as one file, without external data",
                )
        if kind not in TYPES and kind != 8:  # 8: text
            raise self._error(f"the tensor {name[:80]!r} has the unknown type {kind}")
        label, bits = TYPES.get(kind, ("STRING", 0))
        if any(extent >= 2**63 for extent in shape) or prod(max(1, extent) for extent in shape) * 8 >= 2**63:
            raise self._error(f"the tensor {name[:80]!r} has a size that can't be represented")
        nbytes = -(-prod(shape) * bits // 8)
        if held is not None and held != nbytes:
            raise self._error(
                f"the tensor {name[:80]!r} of shape {tuple(shape)} holds {held} bytes, not {nbytes}"
            )
        return OnnxTensor(name=name, shape=tuple(shape), type=label, nbytes=nbytes)

    def _fields(self, span: Span) -> Iterator[tuple[int, int, Span]]:
        """(number, wire type, value): for bytes where they lie, else (the number, 0)."""
        at, end = span
        while at < end:
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, at = self._varint(at, end)
                yield number, kind, (value, 0)
                continue
            if kind == _BYTES:
                length, at = self._varint(at, end)
            elif kind in (_FIXED64, _FIXED32):
                length = 8 if kind == _FIXED64 else 4
            else:
                raise self._error(f"byte {at} begins no protobuf field", "is it an ONNX file?")
            if number == 0 or length > end - at:
                raise self._error(f"a field at byte {at} is longer than the file")
            yield number, kind, (at, at + length)
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise self._error(f"the number at byte {at} does not end")

    def _varints(self, span: Span) -> list[int]:
        at, end = span
        values = []
        while at < end:
            value, at = self._varint(at, end)
            values.append(value)
        return values

    def _text(self, span: Span) -> str:
        return self._data[span[0] : span[1]].decode("utf-8", errors="replace")

    def _error(self, what: str, hint: str = "it is cut off or damaged: get it again") -> ModelError:
        return ModelError(f"{self._path.name}: {what}", hint=hint)
