"""Blocks of 4 and 8 bits: ONNX Runtime's quantizer, its operators and brute force are the oracles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edgeslm.errors import ModelError, RecipeError
from edgeslm.stages import nbits, nbits_fit


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (rows, columns)) * np.exp(rng.standard_normal((1, columns)))
    weight = weight.astype(np.float32)
    weight[3, :40] = 0
    weight[4], weight[5] = np.abs(weight[4]), -np.abs(weight[5])
    return weight


@pytest.mark.workstation
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("block", "columns"), [(16, 144), (32, 96), (32, 84), (64, 192), (128, 130)])
def test_rtn_is_onnx_runtimes_bit_for_bit(bits: int, symmetric: bool, block: int, columns: int) -> None:
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    quantize = {4: state.quantize_matmul_4bits, 8: state.quantize_matmul_8bits}[bits]
    weight = matrix(24, columns)
    groups = -(-columns // block)
    data = np.zeros((24, groups, block * bits // 8), np.uint8)
    scales = np.zeros((24, groups), np.float32)
    zero_points = np.zeros((24, -(-groups * bits // 8)), np.uint8)
    padded = np.ascontiguousarray(np.pad(weight.T, ((0, groups * block - columns), (0, 0))))
    quantize(data, padded, scales, zero_points, block, 24, columns, symmetric)
    blocks = nbits.quantize(weight, bits=bits, block=block, symmetric=symmetric, algorithm="rtn")
    np.testing.assert_array_equal(blocks.data, data)
    np.testing.assert_array_equal(blocks.scales, scales)
    if symmetric:
        assert blocks.zero_points is None
    else:
        assert blocks.zero_points is not None
        np.testing.assert_array_equal(blocks.zero_points, zero_points)


def run_operator(blocks: nbits.Blocks, x: np.ndarray) -> np.ndarray:
    """MatMulNBits of x [M, K] by the engine."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    arrays = {"q": blocks.data, "s": blocks.scales, "z": blocks.zero_points}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=x.shape[1],
        N=len(blocks.scales), bits=blocks.bits, block_size=blocks.block,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


@pytest.mark.workstation
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("algorithm", "symmetric"), list(nbits.FITS))
@pytest.mark.parametrize("columns", [96, 80])
def test_the_operator_multiplies_with_what_dequantize_says(
    bits: int, algorithm: str, symmetric: bool, columns: int
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    weight = matrix(24, columns)
    blocks = nbits.quantize(weight, bits=bits, block=32, symmetric=symmetric, algorithm=algorithm)
    assert (blocks.zero_points is None) == symmetric
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    expected = x @ nbits.dequantize(blocks).T
    np.testing.assert_allclose(run_operator(blocks, x), expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize(("algorithm", "symmetric"), list(nbits.FITS))
def test_the_error_is_at_most_a_few_steps(algorithm: str, symmetric: bool) -> None:
    if algorithm == "k-quant":
        pytest.importorskip("onnxruntime.quantization")
    weight = matrix(16, 256)
    for bits in (4, 8):
        blocks = nbits.quantize(weight, bits=bits, block=32, symmetric=symmetric, algorithm=algorithm)
        span = nbits.blocked(np.abs(weight), 32).max(axis=-1).repeat(32, axis=1)
        assert (np.abs(nbits.dequantize(blocks) - weight) <= 4 * span / 2**bits + 1e-7).all()


def weighted_error(blocks: nbits.Blocks, weight: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """[N] squared errors of rows."""
    result: np.ndarray = ((nbits.dequantize(blocks) - weight) ** 2 * importance).sum(axis=1)
    return result


def test_search_is_near_the_best_of_all_scales() -> None:
    """Brute force: 20,000 scales for each of 40 blocks, each with the codes that round to nearest."""
    rng = np.random.default_rng(5)
    weight = rng.standard_t(4, (40, 32)).astype(np.float32)
    importance = np.exp(rng.standard_normal(32)).astype(np.float32)
    blocks = nbits.quantize(weight, bits=4, block=32, importance=importance)
    ours = weighted_error(blocks, weight, importance)
    best = np.full(40, np.inf)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    for factor in np.concatenate([np.linspace(0.03, 0.2, 10_000), -np.linspace(0.03, 0.2, 10_000)]):
        scales = largest * factor
        rounded = np.clip(np.rint(weight / scales), -8, 7) * scales
        best = np.minimum(best, ((rounded - weight) ** 2 * importance).sum(axis=1))
    assert (ours >= best * (1 - 1e-5)).all()
    assert ours.mean() <= 1.02 * best.mean()


def test_asymmetric_search_is_near_the_best_of_all_scales_and_zero_points() -> None:
    rng = np.random.default_rng(6)
    weight = (rng.standard_normal((12, 32)) + rng.standard_normal((12, 1))).astype(np.float32)
    importance = np.exp(rng.standard_normal(32)).astype(np.float32)
    blocks = nbits.quantize(weight, bits=4, block=32, symmetric=False, importance=importance)
    ours = weighted_error(blocks, weight, importance)
    best = np.full(12, np.inf)
    span = weight.max(axis=1, keepdims=True) - np.minimum(weight.min(axis=1, keepdims=True), 0)
    for factor, zero in itertools.product(np.linspace(0.03, 0.12, 600), range(16)):
        scales = span * factor
        rounded = (np.clip(np.rint(weight / scales) + zero, 0, 15) - zero) * scales
        best = np.minimum(best, ((rounded - weight) ** 2 * importance).sum(axis=1))
    assert ours.mean() <= 1.1 * best.mean()


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_errs_less_than_rounding_where_it_matters(symmetric: bool) -> None:
    weight = matrix(64, 256)
    importance = np.exp(2 * np.random.default_rng(2).standard_normal(256)).astype(np.float32)
    errors = {
        algorithm: weighted_error(
            nbits.quantize(
                weight, bits=4, block=32, symmetric=symmetric, algorithm=algorithm, importance=importance
            ),
            weight,
            importance,
        ).sum()
        for algorithm in ("rtn", "search")
    }
    assert errors["search"] < 0.9 * errors["rtn"]


def test_rows_and_threads_are_independent() -> None:
    weight = matrix(300, 256)
    importance = np.linspace(0, 2, 256).astype(np.float32)
    options: dict[str, Any] = {"bits": 4, "block": 32, "importance": importance}
    whole = nbits.dequantize(nbits.quantize(weight, threads=2, **options))
    parts = [nbits.dequantize(nbits.quantize(weight[i : i + 100], **options)) for i in range(0, 300, 100)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("bits", [7, 8])
def test_rows_have_one_scale(bits: int) -> None:
    weight = matrix(20, 100)
    codes, scales = nbits.quantize_rows(weight, bits=bits)
    assert codes.shape == weight.shape
    assert codes.max() < 2**bits
    rounded = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[:, None]
    assert (np.abs(rounded - weight) <= 2.1 * np.abs(weight).max(axis=1, keepdims=True) / 2**bits).all()


def test_zeros_stay_zeros_and_tiny_values_do_not_overflow() -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1] = 1e-42
    weight[2, 0] = 3e38
    for algorithm, symmetric in nbits.FITS:
        if algorithm == "k-quant":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            blocks = nbits.quantize(weight, bits=4, block=32, symmetric=symmetric, algorithm=algorithm)
        values = nbits.dequantize(blocks)
        assert np.isfinite(values).all(), (algorithm, symmetric)
        assert not values[0].any()


def test_nearest_is_roundf() -> None:
    np.testing.assert_array_equal(
        nbits_fit._nearest(np.array([0.5, 1.5, 2.49, 2.5], np.float32)), [1, 2, 2, 3]
    )


def test_mistakes_are_named() -> None:
    weight = matrix(8, 64)
    with pytest.raises(RecipeError, match="3 bits"):
        nbits.quantize(weight, bits=3, block=32)
    with pytest.raises(RecipeError, match="blocks of 24"):
        nbits.quantize(weight, bits=4, block=24)
    with pytest.raises(RecipeError, match="magic"):
        nbits.quantize(weight, bits=4, block=32, algorithm="magic")
    with pytest.raises(ModelError, match="32 columns"):
        nbits.quantize(weight, bits=4, block=32, importance=np.ones(32, np.float32))
    weight[5, 7] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        nbits.quantize(weight, bits=4, block=32)
