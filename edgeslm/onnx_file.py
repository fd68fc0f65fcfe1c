"""The structure of an ONNX file, read without the onnx package and before an engine sees it.

ONNX is a protobuf message (onnx/onnx.proto): fields of (number, wire type) one after the other.  Only
what is needed is read: versions, operators, inputs and outputs, and where every stored tensor lies.

Weights may lie in other files beside it (onnx/docs/ExternalData.md), within bounds that are checked here, since
an engine opens whatever path it is told: the name of a plain file of the same folder, a range inside of it,
as long as the tensor is and aligned to its elements.  Only initializers of the main graph may be kept so.
"""

from __future__ import annotations

import mmap
import stat
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
DEFAULT_DOMAIN = "ai.onnx"
MAX_DEPTH = 16
"""Graphs within graphs (branches, loops)."""
MAX_TENSORS = 2**20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1
_VALUE_FIELDS = {4: 4, 5: 1, 7: 1, 10: 8, 11: 1}
"""Repeated fields that hold values where raw_data does not, to the bytes that a value takes at least."""
_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")


@dataclass(frozen=True, kw_only=True)
class OnnxTensor:
    """A stored tensor: shape with the fastest axis last; nbytes of its values.

    path, offset: where they lie, one after the other; offset None: as numbers of the message.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    path: Path
    offset: int | None

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class OnnxNode:
    """A node of the main graph; its attributes as far as they are whole numbers."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """What an ONNX file declares."""

    path: Path
    opset: int | None
    """Of the default domain, ai.onnx."""
    opsets: dict[str, int]
    """Domain to version; the default domain is ai.onnx."""
    ir_version: int | None
    producer: str
    nodes: tuple[OnnxNode, ...]
    operators: tuple[str, ...]
    """Every "domain:Operator" that is used, in branches, loops and functions too; sorted."""
    functions: tuple[str, ...]
    """Operators that the file itself defines by others."""
    data_files: tuple[Path, ...]
    """Files beside it that hold weights."""
    tensors: dict[str, OnnxTensor]
    """Initializers by name: the weights, and constants such as shapes."""
    inputs: tuple[str, ...]
    """What a caller must give."""
    optional_inputs: tuple[str, ...]
    """What a caller may give: inputs with a stored default."""
    outputs: tuple[str, ...]


def data_file(path: Path) -> Path:
    """Where a graph's weights lie that are not in its own file."""
    return path.with_name(f"{path.name}.data")


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
        self._nodes: list[OnnxNode] = []
        self._operators: set[str] = set()
        self._sizes: dict[Path, int] = {}

    def model(self) -> OnnxFile:
        ir_version, producer, graph, functions = None, "", None, []
        opsets: dict[str, int] = {}
        for number, kind, value in self._fields((0, len(self._data))):
            if number == 1 and kind == _VARINT:
                ir_version = value[0]
            elif kind != _BYTES:
                continue
            elif number == 7:
                graph = value
            elif number == 2:
                producer = self._text(value)
            elif number == 8:
                found = {n: v for n, _, v in self._fields(value)}
                if 2 in found:
                    opsets[self._text(found.get(1, (0, 0))) or DEFAULT_DOMAIN] = found[2][0]
            elif number == 25:
                functions.append(self._function(value))
        if graph is None:
            raise self._error("no ONNX file: it holds no graph", "export the model again")
        tensors: dict[str, OnnxTensor] = {}
        names: dict[int, list[str]] = {11: [], 12: []}
        self._graph(graph, tensors, names, 0)
        return OnnxFile(
            path=self._path, opset=opsets.get(DEFAULT_DOMAIN), opsets=opsets, ir_version=ir_version,
            producer=producer, nodes=tuple(self._nodes), operators=tuple(sorted(self._operators)),
            functions=tuple(functions), data_files=tuple(sorted(self._sizes)), tensors=tensors,
            inputs=tuple(name for name in names[11] if name not in tensors),
            optional_inputs=tuple(name for name in names[11] if name in tensors), outputs=tuple(names[12]),
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
                tensor = self._tensor(value, main=depth == 0)
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
        """A node; its constants and inner graphs may not lead out of the file."""
        texts: dict[int, list[str]] = {1: [], 2: [], 4: [], 7: []}
        attributes: dict[str, int] = {}
        for number, kind, value in self._fields(span):
            if kind == _BYTES and number in texts:
                texts[number].append(self._text(value))
            elif kind == _BYTES and number == 5:
                self._attribute(value, attributes, depth)
        operator = f"{''.join(texts[7][-1:]) or DEFAULT_DOMAIN}:{''.join(texts[4][-1:])}"
        self._operators.add(operator)
        if depth == 0:
            if len(self._nodes) >= MAX_TENSORS:
                raise self._error(f"the graph has more than {MAX_TENSORS} nodes")
            self._nodes.append(
                OnnxNode(
                    operator=operator, inputs=tuple(texts[1]), outputs=tuple(texts[2]), attributes=attributes
                )
            )

    def _attribute(self, span: Span, attributes: dict[str, int], depth: int) -> None:
        name = ""
        for number, kind, value in self._fields(span):
            if number == 1 and kind == _BYTES:
                name = self._text(value)
            elif number == 3 and kind == _VARINT:
                attributes[name] = value[0] - (value[0] >> 63 << 64)
            elif kind != _BYTES:
                continue
            elif number in (5, 10):
                self._tensor(value)
            elif number in (6, 11):
                self._graph(value, {}, None, depth + 1)
            elif number in (22, 23):
                self._sparse(value)

    def _function(self, span: Span) -> str:
        """A FunctionProto: its name, once its nodes are known to hold no more than nodes of a graph may."""
        name, domain = "", DEFAULT_DOMAIN
        for number, kind, value in self._fields(span):
            if kind != _BYTES:
                continue
            if number == 1:
                name = self._text(value)
            elif number == 10:
                domain = self._text(value) or DEFAULT_DOMAIN
            elif number == 7:
                self._node(value, 1)
            elif number == 11:
                self._attribute(value, {}, 1)
        return f"{domain}:{name}"

    def _sparse(self, span: Span) -> None:
        """A SparseTensorProto: its values and their places are tensors."""
        for number, kind, value in self._fields(span):
            if number in (1, 2) and kind == _BYTES:
                self._tensor(value)

    def _tensor(self, span: Span, *, main: bool = False) -> OnnxTensor:
        """A TensorProto; main: an initializer of the main graph, which alone may lie in another file."""
        name, kind, shape, raw, values = "", 0, [], None, 0
        external: dict[str, str] | None = None
        for number, wire, value in self._fields(span):
            if number == 1:
                shape += [value[0]] if wire == _VARINT else self._varints(value)
            elif number == 2:
                kind = value[0]
            elif number == 8 and wire == _BYTES:
                name = self._text(value)
            elif number == 9 and wire == _BYTES:
                raw = value
            elif number in _VALUE_FIELDS:
                values += (value[1] - value[0]) // _VALUE_FIELDS[number] if wire == _BYTES else 1
            elif number == 13 or (number == 14 and value[0] == _EXTERNAL):
                external = (external or {}) | self._entry(value if number == 13 else (0, 0))
        label, bits, nbytes = self._extent(name, kind, shape)
        if external is not None:
            if not main or raw is not None or values:
                raise self._error(
                    f"{name[:80]!r} is kept in another file, which only weights of the main graph may be",
                    "export it again as one file, without external data",
                )
            path, offset = self._external(name, external, nbytes, max(1, bits // 8))
            return OnnxTensor(
                name=name, shape=tuple(shape), type=label, nbytes=nbytes, path=path, offset=offset
            )
        if raw is not None and raw[1] - raw[0] != nbytes:
            raise self._error(
                f"the tensor {name[:80]!r} of shape {tuple(shape)} holds {raw[1] - raw[0]} bytes, not {nbytes}"
            )
        if raw is None and values < nbytes // max(1, bits // 8):
            raise self._error(
                f"the tensor {name[:80]!r} of shape {tuple(shape)} holds fewer values than that"
            )
        return OnnxTensor(
            name=name, shape=tuple(shape), type=label, nbytes=nbytes, path=self._path,
            offset=raw[0] if raw is not None else None,
        )  # fmt: skip

    def _entry(self, span: Span) -> dict[str, str]:
        """A StringStringEntryProto; nothing for an empty one."""
        found = {n: self._text(v) for n, k, v in self._fields(span) if k == _BYTES}
        return {found.get(1, ""): found.get(2, "")} if found else {}

    def _extent(self, name: str, kind: int, shape: list[int]) -> tuple[str, int, int]:
        """(type, bits of an element, bytes of all)."""
        if kind not in TYPES and kind != 8:  # 8: text
            raise self._error(f"the tensor {name[:80]!r} has the unknown type {kind}")
        label, bits = TYPES.get(kind, ("STRING", 0))
        if any(extent >= 2**63 for extent in shape) or prod(max(1, extent) for extent in shape) * 8 >= 2**63:
            raise self._error(f"the tensor {name[:80]!r} has a size that can't be represented")
        return label, bits, -(-prod(shape) * bits // 8)

    def _external(self, name: str, entry: dict[str, str], nbytes: int, align: int) -> tuple[Path, int]:
        """(file, first byte) of a tensor that is kept beside the file; ModelError for what leads elsewhere."""
        shown, location = f"the tensor {name[:80]!r}", entry.get("location", "")
        if unknown := [key for key in entry if key not in _EXTERNAL_KEYS]:
            raise self._error(f"{shown} is kept in another file by the unknown key {unknown[0][:80]!r}")
        if location in ("", ".", "..") or any(sign in location for sign in "/\\:\0"):
            raise self._error(
                f"{shown} is kept in {location[:80]!r}, which is no name of a file beside it",
                "don't load it unless you know where it comes from; else export it again",
            )
        numbers = [entry.get("offset", "0"), entry.get("length", str(nbytes))]
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
            raise self._error(f"{shown} is kept at {numbers[0][:40]!r} for {numbers[1][:40]!r} bytes")
        offset, length = map(int, numbers)
        path = self._path.with_name(location)
        size = self._size(path)
        if length != nbytes or offset + length > size:
            raise self._error(
                f"{shown} of {nbytes} bytes is said to be {length} bytes at {offset} of {location}, "
                f"which has {size}",
                f"{location} is cut off, or of another model: get both files again",
            )
        if offset % align:
            raise self._error(
                f"{shown} begins at byte {offset} of {location}, in the middle of an element",
                "export it again with aligned external data",
            )
        return path, offset

    def _size(self, path: Path) -> int:
        """Bytes of a file beside the model; ModelError unless it is a plain file and there in person."""
        if path not in self._sizes:
            try:
                mode = path.lstat()
            except FileNotFoundError:
                raise self._error(
                    f"{path.name}, which holds weights, is missing", "copy it from where the model was"
                ) from None
            if not stat.S_ISREG(mode.st_mode):
                raise self._error(
                    f"{path.name}, which should hold weights, is a link or no file",
                    "put the file itself beside the model",
                )
            self._sizes[path] = mode.st_size
        return self._sizes[path]

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
