"""Quantized classifiers against numpy, against their own float graph, and on models that 8 bits destroy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, ModelError, RecipeError
from edgeslm.specs import OnnxSpec, QuantizeSpec
from edgeslm.stages import nbits, onnx_int8
from edgeslm.stages.onnx_int8 import compare, quantize_classifier
from edgeslm.stages.onnx_rewrite import COLUMNS, Rewriter, scale_of

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.workstation
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

VOCABULARY, WIDTH = 256, 64
SPEC = OnnxSpec(block=32, symmetric=True)


def arrays(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    return {
        "table": 8 * drawn(VOCABULARY, WIDTH), "first": drawn(WIDTH, WIDTH), "second": drawn(WIDTH, WIDTH),
        "head": drawn(WIDTH, 3).T.copy(), "bias": drawn(3),
    }  # fmt: skip


def encoder(held: dict[str, NDArray[np.float32]]) -> bytes:
    """logits = Gemm(mean over tokens of relu(table[ids] @ first) @ second)."""
    node, info, float32, int64 = onnx.helper.make_node, onnx.helper.make_tensor_value_info, 1, 7
    nodes = [
        node("Gather", ["table", "input_ids"], ["vectors"], "embed"),
        node("MatMul", ["vectors", "first"], ["hidden"], "one"),
        node("Relu", ["hidden"], ["positive"], "relu"),
        node("MatMul", ["positive", "second"], ["mixed"], "two"),
        node("Cast", ["attention_mask"], ["mask"], "cast", to=float32),
        node("Unsqueeze", ["mask", "last"], ["wide"], "unsqueeze"),
        node("Mul", ["mixed", "wide"], ["kept"], "mul"),
        node("ReduceMean", ["kept"], ["pooled"], "mean", axes=[1], keepdims=0),
        node("Gemm", ["pooled", "head", "bias"], ["logits"], "gemm", transB=1),
    ]
    stored = held | {"last": np.array([-1], np.int64)}
    graph = onnx.helper.make_graph(
        nodes, "g", [info(name, int64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")],
        [info("logits", float32, ["batch", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def feeds(count: int = 12, tokens: int = 9, seed: int = 1) -> list[dict[str, NDArray[Any]]]:
    random = np.random.default_rng(seed)
    rows = [random.integers(0, VOCABULARY, (1, tokens)) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in rows]


def run(data: bytes, feed: dict[str, NDArray[Any]], *names: str) -> list[NDArray[Any]]:
    model = onnx.load_from_string(data)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(list(names), feed)
    return found


def operators(data: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


# --- what each type computes ---


def rounded(
    values: NDArray[np.float32], scale: NDArray[Any], zero: int, low: int, high: int
) -> NDArray[np.float64]:
    """round(x / scale) + zero, clipped, and back."""
    codes = np.clip(np.round(values / np.float32(scale)) + zero, low, high)
    return (codes - zero) * np.float64(scale)


@pytest.mark.parametrize("target", list(COLUMNS))
def test_dynamic_products_are_those_of_the_specification(target: str | None) -> None:
    """ONNX's DynamicQuantizeLinear on activations, one scale for each output on weights, whole numbers between."""
    held = arrays()
    data = Rewriter(encoder(held), replace(SPEC, target=target), {}).build({"first": "int8-dynamic"})
    feed = feeds(1)[0]
    hidden, vectors = run(data, feed, "hidden", "vectors")
    scale = (max(vectors.max(), 0) - min(vectors.min(), 0)) / 255
    zero = np.clip(np.round(-min(vectors.min(), 0) / scale), 0, 255)
    inputs = rounded(vectors, scale, int(zero), 0, 255)
    bits = COLUMNS[target][1]
    codes, scales = nbits.quantize_rows(held["first"].T, bits=bits)
    weight = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[:, None]
    np.testing.assert_allclose(hidden, inputs @ weight.T, atol=2e-4)
    assert "MatMulInteger" in operators(data)
    assert np.abs(codes.astype(int) - 2 ** (bits - 1)).max() <= 2 ** (bits - 1)


@pytest.mark.parametrize("target", [None, "arm64"])
def test_static_products_use_the_measured_range(target: str | None) -> None:
    held, span = arrays(), (-1.5, 2.0)
    data = Rewriter(encoder(held), replace(SPEC, target=target), {"vectors": span}).build(
        {"first": "int8-static"}
    )
    hidden, vectors = run(data, feeds(1)[0], "hidden", "vectors")
    signed = target == "arm64"
    scale, zero = scale_of(span, signed=signed)
    assert float(scale) == pytest.approx(3.5 / 255)
    assert int(zero) == round(1.5 / float(scale)) - (128 if signed else 0)
    low, high = (-128, 127) if signed else (0, 255)
    inputs = rounded(vectors, scale, int(zero), low, high)
    bits = COLUMNS[target][1]
    codes, scales = nbits.quantize_rows(held["first"].T, bits=bits)
    weight = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[:, None]
    np.testing.assert_allclose(hidden, inputs @ weight.T, atol=2e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tables_give_the_rows_that_were_fitted(kind: str) -> None:
    held = arrays()
    data = Rewriter(encoder(held), SPEC, {}).build({"table": kind})
    feed = feeds(1)[0]
    (vectors,) = run(data, feed, "vectors")
    if kind == "int8":
        codes, scales = nbits.quantize_rows(held["table"], bits=8)
        expected = (codes.astype(np.float32) - 128) * scales[:, None]
    else:
        blocks = nbits.quantize(held["table"], bits=4, block=SPEC.block, algorithm=SPEC.algorithm)
        expected = nbits.dequantize(blocks)
    np.testing.assert_allclose(vectors, expected[feed["input_ids"]], atol=1e-6)
    assert ("GatherBlockQuantized" in operators(data)) == (kind == "int4")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weight_only_products_are_of_blocks(kind: str) -> None:
    held, spec = arrays(), replace(SPEC, accuracy_level=1)
    data = Rewriter(encoder(held), spec, {}).build({"first": kind})
    hidden, vectors = run(data, feeds(1)[0], "hidden", "vectors")
    blocks = nbits.quantize(held["first"].T, bits=int(kind[-1]), block=32, algorithm="search")
    np.testing.assert_allclose(hidden, vectors @ nbits.dequantize(blocks).T, atol=1e-5)
    assert "MatMulNBits" in operators(data)


@pytest.mark.parametrize("layer", ["GRU", "LSTM"])
def test_recurrent_weights_are_stored_in_8_bits(layer: str) -> None:
    """The graph computes what the float graph does with the rounded weights put in."""
    random = np.random.default_rng(0)
    gates = {"GRU": 3, "LSTM": 4}[layer] * 24
    held = {
        name: random.standard_normal((2, gates, size)).astype(np.float32) / 5
        for name, size in (("W", 20), ("R", 24))
    }
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node(
            layer, ["readings", "W", "R"], ["states", "last"], "r", hidden_size=24, direction="bidirectional"
        ),
        onnx.helper.make_node("Flatten", ["last"], ["logits"], "f", axis=1),
    ]
    graph = onnx.helper.make_graph(
        nodes, "g", [info("readings", 1, [7, 1, 20])], [info("logits", 1, [2, 24])],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip

    def saved() -> bytes:
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        data: bytes = model.SerializeToString()
        return data

    quantized, facts, _ = quantize_classifier(saved(), "int8-dynamic", SPEC, [])
    assert {kind for kind, _, _ in facts["placed"].values()} == {"int8"}
    assert {one["tensor"] for one in facts["fallbacks"]} == {"W", "R"}
    assert len(quantized) < 0.4 * len(saved())
    feed = {"readings": random.standard_normal((7, 1, 20)).astype(np.float32)}
    (found,) = run(quantized, feed, "logits")
    for tensor in graph.initializer:
        values = held[tensor.name]
        codes, scales = nbits.quantize_rows(values.reshape(-1, values.shape[-1]), bits=8)
        rows = (codes.astype(np.float32) - 128) * scales[:, None]
        tensor.CopyFrom(onnx.numpy_helper.from_array(rows.reshape(values.shape), tensor.name))
    np.testing.assert_allclose(found, run(saved(), feed, "logits")[0], atol=1e-5)


def test_the_float_graph_is_not_changed_by_splitting_gemm() -> None:
    data, feed = encoder(arrays()), feeds(1)[0]
    split = Rewriter(data, SPEC, {}).float_graph()
    assert "Gemm" not in operators(split)
    np.testing.assert_allclose(run(split, feed, "logits")[0], run(data, feed, "logits")[0], atol=1e-6)


# --- whole schemes ---


@pytest.mark.parametrize("scheme", list(onnx_int8.SCHEMES))
def test_every_scheme_keeps_the_classes_and_says_what_it_did(scheme: str) -> None:
    data, examples = encoder(arrays()), feeds(24)
    quantized, facts, warnings = quantize_classifier(data, scheme, SPEC, examples)
    onnx.checker.check_model(onnx.load_from_string(quantized))
    assert set(facts["placed"]) == {"table", "first", "second"}  # the head is small: it stays
    held = facts["onnx"]
    assert held["top1_agreement"] >= (0.9 if "4" in scheme else 1.0), warnings
    found = np.concatenate([run(quantized, feed, "logits")[0] for feed in examples]).astype(np.float64)
    exact = np.concatenate([run(data, feed, "logits")[0] for feed in examples]).astype(np.float64)
    assert compare(exact, found).nats == pytest.approx(held["kl_nats"], rel=1e-3)
    assert (facts["accuracy_level"] == 4) == (scheme in ("int8", "int4", "int4-int8"))
    stored = sum(nbytes for _, _, nbytes in facts["placed"].values())
    assert sum(4 * count for _, count, _ in facts["placed"].values()) / stored > (
        3.4 if scheme == "int8" else 3.7
    )


def destroyed() -> bytes:
    """One channel of the hidden states is a thousand times the others, and its weights cancel it."""
    held = arrays()
    held["first"][:, 0] = np.abs(held["first"][:, 0]) * 3000
    held["table"][:, :] = np.abs(held["table"])
    held["second"][0] *= 1e-4
    return encoder(held)


def test_a_model_that_8_bits_destroy_is_mended_by_floats() -> None:
    """Activations in 8 bits lose all channels beside the large one: the product behind it stays float."""
    data, examples = destroyed(), feeds(24)
    lost = compare_to_float(
        data, quantize_classifier(data, "int8-dynamic", replace(SPEC, sensitive=0.0), examples)[0]
    )
    quantized, facts, warnings = quantize_classifier(
        data, "int8-dynamic", replace(SPEC, sensitive=0.3), examples
    )
    assert facts["onnx"]["kept"] == ["second"]
    assert facts["placed"].keys() == {"table", "first"}
    assert facts["onnx"]["kl_nats"] < onnx_int8.ENOUGH_NATS < lost.nats
    assert not warnings
    assert max(facts["onnx"]["sensitivity_kl_nats"], key=facts["onnx"]["sensitivity_kl_nats"].get) == "second"
    assert compare_to_float(data, quantized).agreement == 1.0


def compare_to_float(data: bytes, quantized: bytes) -> onnx_int8.Loss:
    rows = [[run(graph, feed, "logits")[0][0] for feed in feeds(24)] for graph in (data, quantized)]
    return compare(*(np.stack(each).astype(np.float64) for each in rows))


def test_a_classifier_that_became_another_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_int8, "BAD_AGREEMENT", 1.01)
    _, _, warnings = quantize_classifier(encoder(arrays()), "int8-dynamic", SPEC, feeds(4))
    assert "another class than in F32" in warnings[0]
    _, _, warnings = quantize_classifier(encoder(arrays()), "int8-dynamic", SPEC, [])
    assert "nothing was measured" in warnings[0]


def test_what_can_not_be_done_is_refused() -> None:
    data = encoder(arrays())
    with pytest.raises(RecipeError, match="no scheme of an ONNX classifier"):
        quantize_classifier(data, "Q4_K_M", SPEC, [])
    with pytest.raises(DataError, match="from examples"):
        quantize_classifier(data, "int8-static", SPEC, [])
    held = arrays()
    held["first"][3, 5] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        quantize_classifier(encoder(held), "int8-dynamic", SPEC, [])
    small = {name: array[:4] if name == "table" else array for name, array in arrays().items()}
    small = {name: array[..., :8] if name in ("table", "second") else array for name, array in small.items()}
    small["first"], small["head"] = small["first"][:8], small["head"][:, :8]
    with pytest.raises(ModelError, match="worth fewer bits"):
        quantize_classifier(encoder(small), "int8-dynamic", SPEC, [])


def test_compare() -> None:
    logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]])) + 7
    loss = compare(logits, other)
    assert loss.nats == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2)
    assert compare(logits, logits).agreement == 1.0
    assert compare(logits, np.full((2, 2), np.nan)) == (float("inf"), 0.0)


# --- through the export ---


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "int4-int8"])
def test_an_encoder_runs_on_the_device_after_export(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edgeslm.onnx_file import read_onnx
    from edgeslm.runtime.ort import OrtClassifier
    from edgeslm.stages import export_onnx
    from tests.stages.test_export_onnx import TEXTS, bundle_of, checkpoint, hf_classifier

    hf_classifier(tmp_path / "hf", "bert", hidden_size=64, intermediate_size=96)
    plain = export_onnx.run(checkpoint(tmp_path / "hf"), tmp_path / "plain" / "model.onnx")
    spec = QuantizeSpec(format="onnx", scheme=scheme, onnx=replace(SPEC, mobile=scheme == "int8-dynamic"))
    done = export_onnx.run(
        checkpoint(tmp_path / "hf"), tmp_path / "small" / "model.onnx", spec=spec, calibration=TEXTS
    )
    assert done.plan["scheme"] == scheme
    assert done.plan["bits_per_weight"] < 11 < plain.plan["bits_per_weight"]
    counts = [sum(row["parameters"] for row in each.plan["types"].values()) for each in (plain, done)]
    assert counts[0] == counts[1]
    assert done.model["parameters"] == plain.model["parameters"]
    assert done.model["operators"] == list(read_onnx(done.path).operators)
    expected, found = (
        OrtClassifier(bundle_of(each, tmp_path / name), threads=1).predict_texts(TEXTS)
        for name, each in (("a", plain), ("b", done))
    )
    np.testing.assert_allclose(found, expected, atol=0.15 if "4" in scheme else 0.05)
    assert ("model.ort" in done.files) == (scheme == "int8-dynamic")


def test_calibration_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edgeslm.stages import export_onnx
    from tests.stages.test_export_onnx import checkpoint, hf_classifier

    hf_classifier(tmp_path / "hf", "bert")
    spec = QuantizeSpec(format="onnx", scheme="int8-dynamic")
    with pytest.raises(DataError, match="no texts"):
        export_onnx.run(
            checkpoint(tmp_path / "hf"), tmp_path / "m.onnx", spec=spec, calibration=[np.zeros((3, 2))]
        )
