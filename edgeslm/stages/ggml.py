"""ggml's own quantizers, one block of rows at a time, out of llama-cpp-python's libggml-base.

R rows, I elements in a row, B bytes in a quantized row.  The calls release the GIL, so threads
quantize side by side.  Reference: ggml_quantize_chunk and ggml_get_type_traits of ggml/src/ggml.c.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeslm.errors import EngineError, ModelError
from edgeslm.gguf_file import GGML_TYPES, row_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOATS = ctypes.POINTER(ctypes.c_float)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """libggml-base, loaded once.  Raises EngineError when llama-cpp-python is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EngineError(
            "quantizing to GGUF needs ggml, which llama-cpp-python carries",
            hint="pip install 'edgeslm[workstation]'",
        )
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    name = "ggml-base.dll" if sys.platform == "win32" else f"libggml-base{suffix}"
    path = Path(spec.origin).parent / "lib" / name
    try:
        ggml = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(
            f"{path.name} of llama-cpp-python does not load: {error}",
            hint="pip install --force-reinstall --no-cache-dir llama-cpp-python",
        ) from error
    ggml.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS,
    )  # fmt: skip
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return ggml


def quantize(
    type_name: str, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize whole rows; what llama-quantize writes for the same rows, bit for bit.

    rows: [R, I] float32, finite, I a multiple of the type's block.  importance: [I] mean squared
    activation of each input channel, or None.  Returns [R, B] bytes.
    Raises ModelError when the result holds a scale that is not finite (an overflow of 16 bits).
    """
    count, length = rows.shape
    if importance is not None and importance.shape != (length,):
        raise ValueError(f"importance of shape {importance.shape} for rows of {length}")
    source = np.ascontiguousarray(rows, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    out = np.empty((count, row_bytes(type_name, length)), dtype=np.uint8)
    ggml, type_id = library(), GGML_TYPES[type_name].id
    written = ggml.ggml_quantize_chunk(
        type_id, source.ctypes.data_as(_FLOATS), out.ctypes.data, 0, count, length,
        None if weights is None else weights.ctypes.data_as(_FLOATS),
    )  # fmt: skip
    if written != out.nbytes:
        raise EngineError(f"ggml wrote {written} bytes of {type_name} where {out.nbytes} were expected")
    if not ggml.ggml_validate_row_data(type_id, out.ctypes.data, out.nbytes):
        raise ModelError(
            f"a weight is too large for {type_name}: its 16-bit scale overflows",
            hint="keep this tensor in BF16 or F32 with --type",
        )
    return out


def dequantize(type_name: str, data: NDArray[np.uint8], length: int) -> NDArray[np.float32]:
    """[R, B] bytes of a type as [R, length] float32, with ggml's own decoder."""
    if type_name == "F32":
        return data.view(np.float32).reshape(-1, length)
    traits = library().ggml_get_type_traits(GGML_TYPES[type_name].id).contents
    source = np.ascontiguousarray(data)
    out = np.empty((source.shape[0], length), dtype=np.float32)
    traits.to_float(source.ctypes.data, out.ctypes.data, out.size)
    return out
