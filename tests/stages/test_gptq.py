"""GPTQ: against a literal loop of the paper's algorithm, and by the outputs that it is meant to keep."""

from __future__ import annotations

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.stages import gptq, nbits, nbits_fit


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """[T, K] inputs with strong correlations."""
    rng = np.random.default_rng(seed)
    x: np.ndarray = rng.standard_normal((400, columns)) @ rng.standard_normal((columns, columns)) / 4
    return x.astype(np.float32)


def literal(weight: np.ndarray, hessian: np.ndarray, block: int) -> np.ndarray:
    """Algorithm 1 of the paper without lazy batches: after each column the inverse Hessian loses it."""
    left = weight.astype(np.float64).copy()
    damped = hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    rounded = np.zeros_like(left)
    inverse = np.linalg.inv(damped)
    scales = None
    for column in range(left.shape[1]):
        if column % block == 0:
            part = left[:, column : column + block].astype(np.float32)
            weighting = np.diag(hessian)[column : column + block].astype(np.float32)
            scales = nbits_fit.search_symmetric(part[:, None], weighting[None, None], 4).scales[:, 0]
        rounded[:, column] = np.clip(np.rint(left[:, column] / scales), -8, 7) * scales
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= np.outer(error, inverse[0])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return rounded


def test_it_is_the_papers_algorithm() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((6, 64)).astype(np.float32)
    x = correlated(64)
    hessian = x.T @ x
    ours = nbits.dequantize(gptq.quantize(weight, hessian, bits=4, block=32, symmetric=True))
    theirs = literal(weight, hessian, 32)
    assert (np.abs(ours - theirs) < 1e-3).mean() > 0.98  # a tie may round the other way


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [96, 80])
def test_outputs_change_less_than_by_search(symmetric: bool, columns: int) -> None:
    weight = np.random.default_rng(2).standard_normal((48, columns)).astype(np.float32)
    x = correlated(columns, 3)
    hessian = x.T @ x
    options = {"bits": 4, "block": 32, "symmetric": symmetric}
    ours = gptq.quantize(weight, hessian, threads=2, **options)
    plain = nbits.quantize(weight, importance=np.diag(hessian).astype(np.float32), **options)
    errors = [float(((x @ (nbits.dequantize(blocks) - weight).T) ** 2).sum()) for blocks in (ours, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_dead_inputs_and_damage() -> None:
    weight = np.random.default_rng(4).standard_normal((8, 64)).astype(np.float32)
    x = correlated(64)
    x[:, 5] = 0
    blocks = gptq.quantize(weight, x.T @ x, bits=4, block=32, symmetric=True)
    assert np.isfinite(nbits.dequantize(blocks)).all()
    with pytest.raises(ModelError, match="not finite"):
        gptq.quantize(weight, np.full((64, 64), np.nan, np.float32), bits=4, block=32, symmetric=True)
