"""GPTQ: weights are rounded one column after the other, and each column's error is made up for by the later ones.

Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with the columns in their own order and the scale of a
block found when its turn comes, on the weights as they then are (IST-DASLab/gptq, gptq.py, groupsize without
act-order).  The Hessian is of the float32 model's activations.

N outputs, K inputs of a weight, G blocks of a row, B weights of a block, T tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import DataError, ModelError
from edgeslm.stages import external_data, nbits, nbits_fit, onnx_session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.stages.onnx_linear import Linear

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
SLAB_ROWS = 1024
TOKENS = 8192
"""Of the calibration text, at most."""
MOST_BYTES = 2**29
"""Hessians kept at once; the text is run again for the next ones."""


def quantize(
    weight: NDArray[np.float32],
    hessian: NDArray[np.float32],
    *,
    bits: int,
    block: int,
    symmetric: bool,
    threads: int = 1,
) -> nbits.Blocks:
    """Quantize [N, K] so that the outputs of the calibration text change the least; hessian: [K, K] sum of x x^T.

    Raises ModelError for weights or a Hessian that are not finite.
    """
    rows, columns = weight.shape
    if not np.isfinite(weight).all() or not np.isfinite(hessian).all():
        raise ModelError("the weight or its inputs are not finite", hint="the model is damaged")
    factor = _factor(hessian)
    groups = -(-columns // block)
    weighting = nbits.blocked(np.diag(hessian)[None].astype(np.float32), block) + np.float32(1e-12)
    codes = np.empty((rows, groups, block), np.uint8)
    scales, zero_points = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.uint8)
    fit = nbits_fit.search_symmetric if symmetric else nbits_fit.search_asymmetric

    def round_slab(start: int) -> None:
        part = slice(start, min(start + SLAB_ROWS, rows))
        left = nbits.blocked(weight[part], block).reshape(-1, groups * block)
        for group in range(groups):
            first, last = group * block, min((group + 1) * block, columns)
            now = left[:, first : first + block].copy()
            found = fit(now[:, None], weighting[:, group : group + 1], bits)
            scales[part, group], zero_points[part, group] = found.scales[:, 0], found.zero_points[:, 0]
            found_codes, errors = _round_block(now, found, factor[first:last, first:last], bits)
            codes[part, group] = found_codes
            left[:, last:columns] -= errors @ factor[first:last, last:]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(round_slab, range(0, rows, SLAB_ROWS)))
    return nbits.packed(codes, scales, None if symmetric else zero_points, bits=bits, columns=columns)


def _round_block(
    now: NDArray[np.float32], found: nbits_fit.Fitted, factor: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [N, B] of a block's weights [N, B], and the errors [N, b] that the later blocks make up for."""
    scale, zero = found.scales[:, 0], found.zero_points[:, 0].astype(np.float32)
    inverse = nbits_fit.inverse_of(scale)
    codes = np.zeros(now.shape, np.uint8)
    errors = np.zeros((len(now), len(factor)), np.float32)
    for column in range(len(factor)):
        code = np.clip(np.rint(now[:, column] * inverse) + zero, 0, 2**bits - 1)
        codes[:, column] = code
        errors[:, column] = (now[:, column] - (code - zero) * scale) / factor[column, column]
        now[:, column + 1 : len(factor)] -= errors[:, column, None] * factor[column, column + 1 :]
    return codes, errors


def _factor(hessian: NDArray[np.float32]) -> NDArray[np.float32]:
    """Upper triangular U [K, K] with U^T U = H^-1, of the damped Hessian."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped).copy()
    diagonal[diagonal <= 0] = diagonal.mean() or 1.0
    np.fill_diagonal(damped, diagonal + DAMPING * diagonal.mean())
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    upper: NDArray[np.float32] = np.ascontiguousarray(lower.T).astype(np.float32)
    return upper


class Hessians:
    """Sums of x x^T over the calibration text for the inputs of weights, some weights at a time.

    path: the float32 graph.  windows: [W, S] token ids.  Raises DataError without text.
    """

    def __init__(
        self, path: Path, weights: Sequence[Linear], windows: NDArray[np.int64] | None, progress: Progress
    ) -> None:
        if windows is None or not windows.size:
            raise DataError(
                "gptq makes up for errors on calibration text, and there is none",
                hint="give [data] calibration (--calibration), or algorithm search",
            )
        self._path, self._progress = path, progress
        self._weights = [weight for weight in weights if weight.products and not weight.lookups]
        rows = max(1, TOKENS // windows.shape[1])
        self._windows = windows[[i * len(windows) // rows for i in range(min(rows, len(windows)))]]
        self._held: dict[str, NDArray[np.float32]] = {}

    def of(self, weight: Linear) -> NDArray[np.float32]:
        """[K, K] of a weight that is no embedding, measured together with those of the following weights."""
        name = weight.products[0].input[0]
        if name not in self._held:
            self._measure(weight)
        return self._held[name]

    def _measure(self, weight: Linear) -> None:
        start = next(i for i, one in enumerate(self._weights) if one.name == weight.name)
        sizes: dict[str, int] = {}
        for one in self._weights[start:]:
            size = one.shape[1]
            if sizes and 4 * (sum(k * k for k in sizes.values()) + size * size) > MOST_BYTES:
                break
            sizes[one.products[0].input[0]] = size
        self._held = {name: np.zeros((size, size), np.float32) for name, size in sizes.items()}
        session = onnx_session.open_session(_with_outputs(self._path, list(sizes)), self._path.parent)
        with self._progress.task("gptq: activations", self._windows.size, "tokens") as done:
            for window in self._windows:
                found = session.run(list(sizes), onnx_session.feeds(session, window[None]))
                for name, values in zip(sizes, found, strict=True):
                    flat = values.reshape(-1, values.shape[-1])
                    self._held[name] += flat.T @ flat
                done(window.size)


def _with_outputs(path: Path, names: Sequence[str]) -> Any:
    """The graph with activations as further outputs."""
    from onnx import TensorProto, helper

    model = external_data.load_graph(path)
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model
