"""Quantized decoder graphs: what the engine computes from them against what the quantized arrays say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, ModelError, RecipeError
from edgeslm.specs import OnnxSpec, QuantizeSpec
from edgeslm.stages import nbits
from tests import decoder_graphs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgeslm.stages import external_data, onnx_session  # noqa: E402
from edgeslm.stages.onnx_linear import importance_of, linears  # noqa: E402
from edgeslm.stages.onnx_weights import place, quantize_decoder  # noqa: E402

TOKENS = np.arange(1, 25, dtype=np.int64).reshape(2, 12) * 3
HEAD, UP, DOWN, NORM = decoder_graphs.weights()


def run(path: Path) -> np.ndarray:
    session = onnx_session.open_session(external_data.load_graph(path), path.parent, threads=1)
    return onnx_session.logits(session, TOKENS).reshape(*TOKENS.shape, -1)


def spec(scheme: str, **options: Any) -> QuantizeSpec:
    types = options.pop("types", ())
    return QuantizeSpec(
        format="onnx",
        scheme=scheme,
        types=types,
        onnx=OnnxSpec(**{"accuracy_level": 0, "block": 32, "symmetric": True, **options}),
    )


def by_hand(arrays: dict[str, np.ndarray], table: np.ndarray) -> np.ndarray:
    """The graph's logits in float64."""
    x = table[TOKENS].astype(np.float64)
    hidden = np.maximum(x * arrays[NORM] @ arrays[UP].astype(np.float64), 0)
    result: np.ndarray = (x + hidden @ arrays[DOWN]) @ arrays[HEAD]
    return result


@pytest.mark.parametrize("width", [64, 48])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("scheme", "bits"), [("int4", 4), ("int8", 8)])
def test_blocks_compute_what_the_codes_say(
    tmp_path: Path, scheme: str, bits: int, symmetric: bool, width: int
) -> None:
    arrays = decoder_graphs.weights(width=width)
    source = decoder_graphs.write(tmp_path / "f32" / "model.onnx", arrays)
    out = tmp_path / "out" / "model.onnx"
    plan = quantize_decoder(source, out, spec(scheme, symmetric=symmetric), threads=2)
    rounded = dict(arrays)
    for name in (HEAD, UP, DOWN):
        blocks = nbits.quantize(arrays[name].T, bits=bits, block=32, symmetric=symmetric)
        rounded[name] = nbits.dequantize(blocks).T
    np.testing.assert_allclose(run(out), by_hand(rounded, rounded[HEAD].T), rtol=1e-3, atol=1e-3)
    assert plan["types"][scheme]["tensors"] == 3
    assert plan["accuracy_level"] == 0


def test_the_tied_embedding_is_there_once(tmp_path: Path) -> None:
    import onnx

    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    plan = quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))
    model = external_data.load_graph(tmp_path / "int4.onnx")
    names = [tensor.name for tensor in model.graph.initializer if HEAD in tensor.name and tensor.dims]
    assert [name for name in names if name.endswith("_Q4")] == [f"{HEAD}_Q4"]
    assert "Transpose" not in {node.op_type for node in model.graph.node}
    assert {node.op_type for node in model.graph.node} >= {"MatMulNBits", "GatherBlockQuantized"}
    held = plan["types"]["int4"]["bytes"]
    weights = sum(values.size for values in decoder_graphs.weights().values())
    assert held == (weights - decoder_graphs.WIDTH) * 5 / 8 + 8 * 4  # the shape and the axis of the look-up
    assert plan["bits_per_weight"] == 8 * sum(row["bytes"] for row in plan["types"].values()) / weights
    onnx.checker.check_model(str(tmp_path / "int4.onnx"))


def test_an_untied_embedding_is_quantized_too(tmp_path: Path) -> None:
    arrays = decoder_graphs.weights()
    source = decoder_graphs.write(tmp_path / "f32.onnx", arrays, tied=False)
    plan = quantize_decoder(source, tmp_path / "int8.onnx", spec("int8"))
    assert plan["types"]["int8"]["tensors"] == 4
    table = np.ascontiguousarray(arrays[HEAD].T[::-1])
    np.testing.assert_allclose(run(tmp_path / "int8.onnx"), by_hand(arrays, table), atol=0.05)


@pytest.mark.parametrize("target", [None, "avx2", "avx512-vnni", "arm64"])
def test_dynamic_columns_are_close_and_keep_one_copy(tmp_path: Path, target: str | None) -> None:
    arrays = decoder_graphs.weights()
    source = decoder_graphs.write(tmp_path / "f32.onnx", arrays)
    plan = quantize_decoder(
        source, tmp_path / "dynamic.onnx", spec("int8-dynamic", sensitive=0.0, target=target)
    )
    found, expected = run(tmp_path / "dynamic.onnx"), by_hand(arrays, arrays[HEAD].T)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert {kind: row["tensors"] for kind, row in plan["types"].items()} == {
        "F32": 1,
        "int8": 1,
        "int8-dynamic": 2,
    }
    assert plan["bits_per_weight"] < 9.5
    model = external_data.load_graph(tmp_path / "dynamic.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = external_data.read(stored[f"{UP}_I8"], tmp_path)
    assert codes.dtype == (np.uint8 if target is None else np.int8)
    if target == "avx2":
        assert np.abs(codes.astype(int)).max() <= 64


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-int8"])
def test_the_most_sensitive_weights_stay_one_precision_up(tmp_path: Path, scheme: str) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    plan = quantize_decoder(source, tmp_path / "q.onnx", spec(scheme, sensitive=0.4), windows=TOKENS)
    measured = plan["onnx"]["sensitivity_kl_nats"]
    assert set(measured) == ({UP, DOWN} if scheme == "int8-dynamic" else {HEAD, UP, DOWN})
    assert all(value > 0 for value in measured.values())
    better = {"int8-dynamic": "F32", "int4-int8": "int8"}[scheme]
    assert plan["types"][better]["parameters"] >= decoder_graphs.WIDTH * decoder_graphs.VOCABULARY
    run(tmp_path / "q.onnx")
    with pytest.raises(DataError, match="calibration text"):
        quantize_decoder(source, tmp_path / "q.onnx", spec(scheme))


def test_placing_fills_the_share_with_the_most_nats_for_a_weight(tmp_path: Path) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    weights = linears(external_data.load_graph(source))
    total = sum(weight.parameters for weight in weights)
    share = 2 * decoder_graphs.WIDTH * decoder_graphs.HIDDEN / total
    types = place(weights, spec("int4-int8", sensitive=share), {HEAD: 9.0, UP: 5.0, DOWN: 14.0})
    assert types == {HEAD: "int8", UP: "int4", DOWN: "int8"}
    said = place(weights, spec("int4", types=(("down", "F32"), ("head", "Q8_0"))), None)
    assert said == {HEAD: "int8", UP: "int4", DOWN: "F32"}
    with pytest.raises(RecipeError, match="Q4_K"):
        place(weights, spec("int4", types=(("down", "Q4_K"),)), None)
    with pytest.raises(RecipeError, match="int8-static"):
        place(weights, spec("int8-static"), None)


def test_importance_is_found_by_gguf_names(tmp_path: Path) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    weights = {weight.name: weight for weight in linears(external_data.load_graph(source))}
    given = {
        "blk.0.ffn_gate.weight": np.full(decoder_graphs.WIDTH, 2, np.float32),
        "blk.0.ffn_down.weight": np.full(decoder_graphs.HIDDEN, 3, np.float32),
        "token_embd.weight": np.full(decoder_graphs.WIDTH, 4, np.float32),
    }
    found = {name: importance_of(weight, given) for name, weight in weights.items()}
    assert {name: float(values[0]) for name, values in found.items() if values is not None} == {
        UP: 2, DOWN: 3, HEAD: 4,
    }  # fmt: skip
    with pytest.raises(ModelError, match="another model"):
        importance_of(weights[UP], {"blk.0.ffn_gate.weight": np.ones(8, np.float32)})


def test_importance_changes_the_codes(tmp_path: Path) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    quantize_decoder(source, tmp_path / "plain.onnx", spec("int4"))
    given = {"blk.0.ffn_down.weight": np.exp(np.linspace(-3, 3, decoder_graphs.HIDDEN)).astype(np.float32)}
    quantize_decoder(source, tmp_path / "weighed.onnx", spec("int4"), importance=given)
    assert np.abs(run(tmp_path / "plain.onnx") - run(tmp_path / "weighed.onnx")).max() > 0


def test_gptq_keeps_the_outputs_of_its_text(tmp_path: Path) -> None:
    """The layers alone: their inputs are correlated, which rounding by itself knows nothing of."""
    arrays = decoder_graphs.weights()
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((decoder_graphs.WIDTH, 12)) / 4
    arrays[HEAD] = (basis @ rng.standard_normal((12, decoder_graphs.VOCABULARY))).astype(np.float32)
    source = decoder_graphs.write(tmp_path / "f32.onnx", arrays)
    text = rng.integers(0, decoder_graphs.VOCABULARY, (8, 64))
    types = (("lm_head", "F32"),)
    plan = quantize_decoder(
        source, tmp_path / "gptq.onnx", spec("int4", algorithm="gptq", types=types), windows=text
    )
    assert plan["onnx"]["algorithm"] == "gptq"
    quantize_decoder(source, tmp_path / "search.onnx", spec("int4", types=types))
    expected = run(source)
    errors = [float(((run(tmp_path / f"{name}.onnx") - expected) ** 2).mean()) for name in ("gptq", "search")]
    assert errors[0] < 0.8 * errors[1]
    with pytest.raises(DataError, match="gptq"):
        quantize_decoder(source, tmp_path / "gptq.onnx", spec("int4", algorithm="gptq"))


def test_values_that_are_not_finite_stop_it_or_stay_float(tmp_path: Path) -> None:
    arrays = decoder_graphs.weights()
    arrays[DOWN][3, 5] = np.nan
    source = decoder_graphs.write(tmp_path / "f32.onnx", arrays)
    with pytest.raises(ModelError, match=r"down_proj.*not finite"):
        quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))
    assert not (tmp_path / "int4.onnx").exists()
    assert not (tmp_path / "int4.onnx.data").exists()
    keep = QuantizeSpec(format="onnx", scheme="int4", keep_going=True)
    plan = quantize_decoder(source, tmp_path / "int4.onnx", keep)
    assert plan["fallbacks"][0]["tensor"] == DOWN
    assert DOWN in plan["warnings"][0]


def test_damaged_sources_are_named(tmp_path: Path) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    data = source.with_name("f32.onnx.data")
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(ModelError, match="too short"):
        quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))
    data.unlink()
    with pytest.raises(ModelError, match=r"f32\.onnx\.data"):
        quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))
    source.write_bytes(b"\x08\xff" * 40)
    with pytest.raises(ModelError, match="ONNX"):
        quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))


def test_a_path_that_leads_outside_is_refused(tmp_path: Path) -> None:
    import onnx

    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    model = external_data.load_graph(source)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    onnx.save_model(model, source)
    with pytest.raises(ModelError, match="outside"):
        quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))


def test_weights_lie_at_page_boundaries(tmp_path: Path) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    quantize_decoder(source, tmp_path / "int4.onnx", spec("int4"))
    for tensor in external_data.load_graph(tmp_path / "int4.onnx").graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert not where or int(where["offset"]) % external_data.ALIGNMENT == 0
        assert not where or where["location"] == "int4.onnx.data"
