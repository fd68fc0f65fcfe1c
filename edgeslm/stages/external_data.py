"""Weights of an ONNX model in the file beside it: read without a copy, written one tensor at a time.

ONNX keeps large tensors outside of the protobuf message, as raw little-endian bytes at an offset of a
file in the same folder (onnx.proto, TensorProto.external_data).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

ALIGNMENT = 4096
"""Bytes: a page, so that a mapped file needs no copy."""
INSIDE = 1024
"""Tensors of fewer bytes stay in the message."""


def load_graph(path: Path) -> Any:
    """The ModelProto of an ONNX file without its external data; ModelError for what is none."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise ModelError(
            f"{path.name}: no ONNX file, or a damaged one", hint="export the model again"
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path.name}: no ONNX file: it holds no graph", hint="export the model again")
    return model


def read(tensor: Any, folder: Path) -> NDArray[Any]:
    """An initializer's values; external ones as a read-only map of the file.

    Raises ModelError for a file outside of `folder`, missing or too short.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        inside: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return inside
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = where.get("location", "")
    if not location or location in (".", "..") or "/" in location or "\\" in location:
        raise ModelError(f"{tensor.name} is kept in {location!r}, outside of the model's folder")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    try:
        return np.memmap(folder / location, dtype, "r", int(where.get("offset", "0")), shape)
    except OSError as error:
        raise ModelError(f"{location}: {error.strerror or error}", hint="export the model again") from error
    except ValueError as error:
        raise ModelError(
            f"{location} is too short for {tensor.name}", hint="it is cut off: export again"
        ) from error


class Writer:
    """Appends tensors to an external data file and keeps their places in the graph's initializers."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file = file
        self._location = location
        self.initializers: list[Any] = []
        """TensorProtos, in the order in which they were added."""

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Write a tensor; a small one stays in the message."""
        import onnx

        if values.nbytes < INSIDE:
            self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
            return
        start = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (start - self._file.tell()))
        for part in _parts(values):
            self._file.write(np.ascontiguousarray(part).data)
        tensor = onnx.TensorProto(
            name=name, dims=values.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("location", self._location), ("offset", start), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)


def _parts(values: NDArray[Any], most: int = 2**24) -> Iterator[NDArray[Any]]:
    """Contiguous pieces of an array, so that a map of a large file is never copied whole."""
    if values.flags.c_contiguous and not isinstance(values, np.memmap):
        yield values
        return
    rows = max(1, most * len(values) // max(1, values.nbytes))
    for start in range(0, len(values), rows):
        yield np.ascontiguousarray(values[start : start + rows])
