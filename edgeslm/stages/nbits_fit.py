"""How the scale, zero point and codes of blocks are found: pure arrays in, arrays out.

Every function takes blocks [N, G, B] of weights, the weights of their squared errors [1 or N, G, B] and
the bits of a code, and returns what minimizes its own idea of the error of scale * (code - zero point).

N rows, G blocks of a row, B weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

CANDIDATES = np.arange(-9, 10, dtype=np.float32) / 10
"""Steps by which the largest weight lies beside the end of the range (ggml-quants.c, make_qx_quants)."""
REFITS = 2


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Codes [N, G, B] from 0 to 2^bits - 1, scales [N, G], zero points [N, G]."""

    codes: NDArray[np.uint8]
    scales: Array
    zero_points: NDArray[np.uint8]


def round_symmetric(blocks: Array, _weighting: Array, bits: int) -> Fitted:
    """Round to nearest; the weight of largest magnitude gets code 0 (onnxruntime q4_dq.cpp, range2scale)."""
    half = np.float32(2 ** (bits - 1))
    return _symmetric(blocks, _largest(blocks)[..., 0] / -half, bits)


def round_asymmetric(blocks: Array, _weighting: Array, bits: int) -> Fitted:
    """Round to nearest between the least and the largest weight, zero among them (range2scalezp)."""
    low, high = _range(blocks)
    scales = (high - low) / np.float32(2**bits - 1)
    return _asymmetric(blocks, scales, _nearest(-low * inverse_of(scales)), bits)


def search_symmetric(blocks: Array, weighting: Array, bits: int) -> Fitted:
    """The scale of least weighted squared error: candidates on both sides, each with its closed form.

    For codes q (signed) the best scale is sum(w x q) / sum(w q^2), which leaves an error of
    sum(w x^2) - sum(w x q)^2 / sum(w q^2) (ggml-quants.c, make_qx_quants); then rounding and closed form
    in turn, neither of which can raise the error.
    """
    half = np.float32(2 ** (bits - 1))
    inverse = inverse_of(_largest(blocks))
    weighted = blocks * weighting
    best_gain = np.full(blocks.shape[:2], -1, np.float32)
    best = np.zeros(blocks.shape[:2], np.float32)
    steps = CANDIDATES if bits <= 4 else CANDIDATES[::9]  # a tenth of a step of 256 is no difference
    for factor in (*(-half - steps), *(half - 1 + steps)):
        scales, gain = _best_scale(blocks, weighted, weighting, inverse * factor, half)
        better = gain > best_gain
        best[better], best_gain[better] = scales[better], gain[better]
    for _ in range(REFITS):
        best, _ = _best_scale(blocks, weighted, weighting, inverse_of(best)[..., None], half)
    return _symmetric(blocks, best, bits)


def search_asymmetric(blocks: Array, weighting: Array, bits: int) -> Fitted:
    """Scale and whole zero point of least weighted squared error (after ggml-quants.c, make_qkx2_quants).

    A candidate's range gives codes; their regression on the weights a scale and a zero point, which is
    rounded; these give new codes, whose closed-form scale is kept where the error is the least so far.
    """
    top = np.float32(2**bits - 1)
    low, high = _range(blocks)
    weighted = blocks * weighting
    span = inverse_of(high - low)
    best_gain = np.full(blocks.shape[:2], -1, np.float32)
    best, best_zero = np.zeros_like(best_gain), np.zeros_like(best_gain)
    for step in CANDIDATES[:: 2 if bits <= 4 else 9]:
        inverse = span * (top + 2 * step)
        zero = np.clip(_nearest(-low * inverse), 0, top)
        for _ in range(REFITS):
            codes = _codes(blocks, inverse, zero, top)
            inverse, zero = _regression(codes, blocks, weighting, top)
        codes = _codes(blocks, inverse, zero, top) - zero[..., None]
        scales, gain = _closed_form(codes, weighted, weighting)
        better = gain > best_gain
        best[better], best_zero[better], best_gain[better] = scales[better], zero[better], gain[better]
    codes = _codes(blocks, inverse_of(best), best_zero, top) - best_zero[..., None]
    best, _ = _closed_form(codes, weighted, weighting)
    return _asymmetric(blocks, best, best_zero, bits)


def half_quadratic(blocks: Array, _weighting: Array, bits: int) -> Fitted:
    """Half-quadratic quantization: few large errors rather than many small ones, by moving the zero point.

    Badri and Shaji 2023 (mobiusml/hqq, optimize_weights_proximal_legacy: p 0.7, beta 10, kappa 1.01, 20 steps).
    Zero points are rounded at the end, since a float zero point has no int8 kernel in ONNX Runtime.
    """
    top = np.float32(2**bits - 1)
    low, high = _range(blocks)
    scales = (high - low) / top
    inverse = inverse_of(scales)[..., None]
    zero = -low[..., None] * inverse
    best_zero, best_error = zero, np.full(zero.shape, np.inf, np.float32)
    beta = np.float32(10)
    for _ in range(20):
        codes = np.clip(np.rint(blocks * inverse + zero), 0, top)
        error = blocks - (codes - zero) * scales[..., None]
        size = np.abs(error)
        mean = size.mean(axis=-1, keepdims=True)
        best_zero, best_error = np.where(mean < best_error, zero, best_zero), np.minimum(mean, best_error)
        shrunk = np.sign(error) * np.maximum(size - np.power(size + 1e-8, -0.3) / beta, 0)
        zero = (codes - (blocks - shrunk) * inverse).mean(axis=-1, keepdims=True)
        beta *= np.float32(1.01)
    return _asymmetric(blocks, scales, np.clip(np.rint(best_zero[..., 0]), 0, top), bits)


def k_quant(blocks: Array, _weighting: Array, bits: int) -> Fitted:
    """ONNX Runtime's own k-quant (onnxruntime.quantization.neural_compressor, quant_tensor_k_quant_cpu).

    It weighs errors by the size of the weights, knows of no importance, and rounds the zero point last.
    """
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    rows, groups, size = blocks.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        codes, scales, zero_points = quant_tensor_k_quant_cpu(blocks.reshape(-1, size), bits, size)
    usable = np.isfinite(scales) & (scales != 0)
    return Fitted(
        codes=np.where(usable, np.nan_to_num(codes), 0).astype(np.uint8).reshape(blocks.shape),
        scales=np.where(usable, scales, 0).astype(np.float32).reshape(rows, groups),
        zero_points=np.where(usable, zero_points, 0).astype(np.uint8).reshape(rows, groups),
    )


def _symmetric(blocks: Array, scales: Array, bits: int) -> Fitted:
    half = 2 ** (bits - 1)
    return _asymmetric(blocks, scales, np.full(scales.shape, half, np.float32), bits)


def _asymmetric(blocks: Array, scales: Array, zero_points: Array, bits: int) -> Fitted:
    """Codes of blocks for scales and whole zero points [N, G]."""
    top = np.float32(2**bits - 1)
    zero_points = np.clip(zero_points, 0, top)
    values = blocks * inverse_of(scales)[..., None]
    values += zero_points[..., None]
    codes = np.clip(_nearest(values), 0, top)
    return Fitted(
        codes=codes.astype(np.uint8),
        scales=scales.astype(np.float32),
        zero_points=zero_points.astype(np.uint8),
    )


def _best_scale(
    blocks: Array, weighted: Array, weighting: Array, inverse: Array, half: np.float32
) -> tuple[Array, Array]:
    """Scale [N, G] and gain for the codes that `inverse` [N, G, 1] gives."""
    codes = blocks * inverse
    np.rint(codes, out=codes)
    np.clip(codes, -half, half - 1, out=codes)
    return _closed_form(codes, weighted, weighting)


def _closed_form(codes: Array, weighted: Array, weighting: Array) -> tuple[Array, Array]:
    """The best scale [N, G] of signed codes, and by how much it lowers the error from that of zeros."""
    product = np.einsum("ngb,ngb->ng", codes, weighted)
    squares = np.einsum("ngb,ngb->ng", codes * codes, np.broadcast_to(weighting, codes.shape))
    scales = product * inverse_of(squares)
    return scales, scales * product


def _regression(codes: Array, blocks: Array, weighting: Array, top: np.float32) -> tuple[Array, Array]:
    """1 / scale and the whole zero point [N, G] of the weighted regression of weights on codes."""
    total = weighting.sum(axis=-1)
    weights = np.broadcast_to(weighting, codes.shape)
    mean_code = np.einsum("ngb,ngb->ng", codes, weights) / total
    mean = np.einsum("ngb,ngb->ng", blocks, weights) / total
    centred = codes - mean_code[..., None]
    weights = centred * weights
    scales = np.einsum("ngb,ngb->ng", weights, blocks) * inverse_of(
        np.einsum("ngb,ngb->ng", weights, centred)
    )
    inverse = inverse_of(scales)
    return inverse, np.clip(np.rint(mean_code - mean * inverse), 0, top)


def _codes(blocks: Array, inverse: Array, zero: Array, top: np.float32) -> Array:
    values = blocks * inverse[..., None]
    values += zero[..., None]
    np.rint(values, out=values)
    return np.clip(values, 0, top, out=values)


def _largest(blocks: Array) -> Array:
    """[N, G, 1] the value of largest magnitude with its sign; of two, the least one."""
    low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    largest: Array = np.where(np.abs(high) > np.abs(low), high, low)
    return largest


def _range(blocks: Array) -> tuple[Array, Array]:
    """Least and largest value [N, G] with zero among them."""
    return np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)


def inverse_of(values: Array) -> Array:
    """1 / values, and 0 where they are 0 or too small to be inverted."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    usable: Array = np.where(np.isfinite(inverse), inverse, np.float32(0))
    return usable


def _nearest(values: Array) -> Array:
    """Halves away from zero, as C's roundf; the values are not negative."""
    rounded: Array = np.floor(values + np.float32(0.5))
    return rounded
