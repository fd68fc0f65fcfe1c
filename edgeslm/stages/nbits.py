"""Weights in blocks of 4 or 8 bits as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

A row of K weights is cut into G = ceil(K / block) blocks, each with a scale and, where not symmetric, a
zero point: weight = scale * (code - zero point), the zero point being 2^(bits-1) where none is stored.
Codes lie one after the other, two in a byte at 4 bits, the first in the low half (ONNX Runtime,
docs/ContribOperators.md, com.microsoft.MatMulNBits, and onnxruntime/core/mlas/lib/q4_dq.cpp).

N rows (outputs), K columns (inputs), G blocks of a row, B weights of a block.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError, RecipeError
from edgeslm.stages import nbits_fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Fit = Callable[[NDArray[np.float32], NDArray[np.float32], int], "nbits_fit.Fitted"]

SLAB_WEIGHTS = 2**18
"""Weights fitted at once: the few arrays of that size stay in a core's cache."""

# (algorithm, symmetric) to the function that fits blocks.
FITS: dict[tuple[str, bool], Fit] = {
    ("rtn", True): nbits_fit.round_symmetric,
    ("rtn", False): nbits_fit.round_asymmetric,
    ("search", True): nbits_fit.search_symmetric,
    ("search", False): nbits_fit.search_asymmetric,
    ("hqq", False): nbits_fit.half_quadratic,
    ("k-quant", False): nbits_fit.k_quant,
}
ONLY_ASYMMETRIC = frozenset({"hqq", "k-quant"})
"""Algorithms that are about the zero point: their blocks always have one."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A matrix [N, K] in blocks, each array as the operators read it."""

    data: NDArray[np.uint8]
    """[N, G, B * bits / 8] codes."""
    scales: NDArray[np.float32]
    """[N, G]"""
    zero_points: NDArray[np.uint8] | None
    """[N, ceil(G * bits / 8)], packed like the codes; None where symmetric."""
    bits: int
    block: int
    columns: int
    """K: the last block of a row may be filled up with zeros."""

    @property
    def nbytes(self) -> int:
        return (
            self.data.nbytes
            + self.scales.nbytes
            + (0 if self.zero_points is None else self.zero_points.nbytes)
        )


def quantize(
    weight: NDArray[np.float32],
    *,
    bits: int,
    block: int,
    symmetric: bool = True,
    algorithm: str = "search",
    importance: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> Blocks:
    """Quantize a matrix [N, K]; importance: [K] mean squared input of each column, which "search" weighs errors by.

    Where nothing is known of the inputs it weighs by the squared weight, as llama.cpp does: the plain squared
    error cuts off the largest weights, and these matter the most.

    algorithm: rtn (round to nearest, as ONNX Runtime's own quantizer bit for bit), search, hqq or k-quant;
    the last two always store zero points.  Raises RecipeError for bits, block or algorithm that there are
    not, ModelError for weights that are not finite and for importance of another length.
    """
    _check(bits, block)
    fit = fit_of(algorithm, symmetric)
    rows, columns = weight.shape
    weighting = _weighting(importance, columns, block)
    groups = weighting.shape[1]
    codes = np.empty((rows, groups, block), np.uint8)
    scales = np.empty((rows, groups), np.float32)
    zero_points = np.empty((rows, groups), np.uint8)

    def fit_slab(part: slice) -> None:
        blocks = _finite(weight[part], block, part.start)
        fitted = fit(blocks, _emphasis(blocks) if importance is None else weighting, bits)
        codes[part], scales[part], zero_points[part] = fitted.codes, fitted.scales, fitted.zero_points
        codes[part].reshape(len(fitted.codes), -1)[:, columns:] = (
            0  # never read; ONNX Runtime's quantizer has 0
        )

    _by_slabs(fit_slab, rows, groups * block, threads)
    stored = None if symmetric and algorithm not in ONLY_ASYMMETRIC else zero_points
    return packed(codes, scales, stored, bits=bits, columns=columns)


def quantize_rows(
    weight: NDArray[np.float32], *, bits: int, importance: NDArray[np.float32] | None = None, threads: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [N, K] and scales [N] of a matrix with one scale a row: weight = scale * (code - 2^(bits-1)).

    Fitted as "search" does, importance as in `quantize`.  Raises ModelError as `quantize` does.
    """
    rows, columns = weight.shape
    weighting = _weighting(importance, columns, columns)
    codes, scales = np.empty((rows, columns), np.uint8), np.empty(rows, np.float32)

    def fit(part: slice) -> None:
        blocks = _finite(weight[part], columns, part.start)
        fitted = nbits_fit.search_symmetric(
            blocks, _emphasis(blocks) if importance is None else weighting, bits
        )
        codes[part], scales[part] = fitted.codes[:, 0], fitted.scales[:, 0]

    _by_slabs(fit, rows, columns, threads)
    return codes, scales


def dequantize(blocks: Blocks) -> NDArray[np.float32]:
    """The matrix [N, K] that the operators compute with."""
    codes = _unpack(blocks.data, blocks.bits).astype(np.float32)
    rows, groups = blocks.scales.shape
    if blocks.zero_points is None:
        codes -= 2 ** (blocks.bits - 1)
    else:
        codes -= _unpack(blocks.zero_points, blocks.bits)[:, :groups, None]
    codes *= blocks.scales[..., None]
    return codes.reshape(rows, -1)[:, : blocks.columns]


def packed(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    *,
    bits: int,
    columns: int,
) -> Blocks:
    """Blocks out of codes [N, G, B], scales [N, G] and zero points [N, G] (None: symmetric)."""
    return Blocks(
        data=_pack(codes, bits), scales=scales, bits=bits, block=codes.shape[-1], columns=columns,
        zero_points=None if zero_points is None else _pack(zero_points, bits, filling=8),
    )  # fmt: skip


def blocked(weight: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """[N, K] as [N, G, B] in contiguous float32, the last block of each row filled up with zeros."""
    rows, columns = weight.shape
    groups = -(-columns // block)
    full = np.zeros((rows, groups * block), np.float32)
    full[:, :columns] = weight
    return full.reshape(rows, groups, block)


def _finite(weight: NDArray[np.float32], block: int, first: int) -> NDArray[np.float32]:
    blocks = blocked(weight, block)
    if not np.isfinite(blocks).all():
        raise ModelError(
            f"rows {first} to {first + len(weight) - 1} hold values that are not finite",
            hint="the checkpoint is damaged or training diverged",
        )
    return blocks


def _by_slabs(work: Callable[[slice], None], rows: int, columns: int, threads: int) -> None:
    step = max(1, SLAB_WEIGHTS // columns)
    with ThreadPoolExecutor(threads) as pool:  # numpy releases the GIL
        list(pool.map(lambda start: work(slice(start, min(start + step, rows))), range(0, rows, step)))


def fit_of(algorithm: str, symmetric: bool) -> Fit:
    """The function that fits blocks; RecipeError for an algorithm that there is not."""
    fit = FITS.get((algorithm, symmetric and algorithm not in ONLY_ASYMMETRIC))
    if fit is None:
        known = ", ".join(dict.fromkeys(name for name, _ in FITS))
        raise RecipeError(f"no algorithm is called {algorithm!r}", hint=f"there are {known}")
    return fit


def _check(bits: int, block: int) -> None:
    if bits not in (4, 8):
        raise RecipeError(f"{bits} bits for weights in blocks", hint="choose 4 or 8")
    if block < 16 or block & (block - 1):
        raise RecipeError(f"blocks of {block} weights", hint="choose 16, 32, 64 or 128")


def _weighting(importance: NDArray[np.float32] | None, columns: int, block: int) -> NDArray[np.float32]:
    """[1, G, B] weights of squared errors with mean 1; the filling of the last block weighs nothing."""
    if importance is not None and importance.size != columns:
        raise ModelError(
            f"the importance has {importance.size} columns, the weight {columns}",
            hint="it was made for another model",
        )
    given = np.ones(columns, np.float32) if importance is None else importance.reshape(-1).astype(np.float32)
    mean = float(given.mean())
    # A column that saw nothing still weighs a little: the next text may use it.
    given = np.maximum(given / mean, 1e-6) if mean > 0 else np.ones(columns, np.float32)
    return blocked(given[None], block)


def _emphasis(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, G, B] squared weights over the largest of their block."""
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    relative = np.divide(blocks, largest, out=np.zeros_like(blocks), where=largest > 0)
    emphasis: NDArray[np.float32] = relative * relative + np.float32(1e-6)
    return emphasis


def _pack(codes: NDArray[np.uint8], bits: int, filling: int = 0) -> NDArray[np.uint8]:
    """Codes along the last axis into bytes; an odd number of them is filled up."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)], constant_values=filling)
    data: NDArray[np.uint8] = codes[..., ::2] | np.left_shift(codes[..., 1::2], np.uint8(4))
    return data


def _unpack(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return data
    codes: NDArray[Any] = np.stack([data & 15, data >> 4], axis=-1)
    return codes.reshape(*data.shape[:-1], -1)
