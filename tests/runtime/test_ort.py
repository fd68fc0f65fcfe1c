"""OrtClassifier against arithmetic by hand, and everything in a bundle that must not be believed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bundle import open_bundle, write_bundle
from edgeslm.errors import BundleError, DataError, EngineError, ModelError, RecipeError
from edgeslm.runtime.ort import OrtClassifier, filled_forward, normalized, softmax
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.bundle import Bundle

pytest.importorskip("onnxruntime")

TEXTS = ["win money now", "meeting at noon", "", "hello hello unknown words that go on and on", "now"]
TOKENS = [[2, 3, 4, 5], [2, 6, 7, 8], [2], [2, 9, 9, 1, 1, 1], [2, 5]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return onnx_models.write_classifier(tmp_path_factory.mktemp("text") / "b")


@pytest.fixture(scope="module")
def sensors(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return onnx_models.write_classifier(tmp_path_factory.mktemp("sensors") / "b", "sensors")


def by_hand(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_texts_become_the_tokens_that_the_manifest_asks_for(text: Bundle) -> None:
    """tokenizer.json pads to 128 and cuts at 3 by itself: the manifest's 6 counts."""
    classifier = OrtClassifier(text, threads=1)
    assert classifier.tokenize(TEXTS) == TOKENS
    assert classifier.is_cut(TEXTS) == [False, False, False, True, False]


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_probabilities_are_those_by_hand_whatever_the_batch(text: Bundle, batch: int) -> None:
    classifier = OrtClassifier(text, threads=1)
    found = classifier.predict_texts(TEXTS, batch=batch)
    np.testing.assert_allclose(found, by_hand(onnx_models.text_logits(TOKENS)), atol=1e-6)
    assert classifier.predict_texts([]).shape == (0, 3)


def test_readings_are_normalized_and_gaps_filled(sensors: Bundle) -> None:
    random = np.random.default_rng(0)
    center, scale = (np.asarray(onnx_models.NORMALIZATION[key]) for key in ("center", "scale"))
    windows = center + scale * random.standard_normal((5, onnx_models.ROWS, 3))
    windows[1, 2, 0] = windows[2, 0, 1] = windows[3, :, 2] = np.nan
    whole = windows.copy()
    whole[1, 2, 0] = windows[1, 1, 0]  # the last reading
    whole[2, 0, 1] = center[1]  # none before: the centre
    whole[3, :, 2] = center[2]
    held = onnx_models.weights()
    flat = ((whole - center) / scale).reshape(5, -1)
    expected = by_hand(flat @ held["sensor_head"] + held["sensor_bias"])
    classifier = OrtClassifier(sensors, threads=1)
    for batch in (1, 3, 32):
        np.testing.assert_allclose(classifier.predict_readings(windows, batch=batch), expected, atol=1e-5)


def test_filled_forward_by_brute_force() -> None:
    random = np.random.default_rng(1)
    readings = random.standard_normal((20, 9, 3))
    readings[random.random(readings.shape) < 0.4] = np.nan
    found = filled_forward(readings)
    for b, r, c in np.ndindex(readings.shape):
        before = [value for value in readings[b, : r + 1, c] if not np.isnan(value)]
        assert found[b, r, c] == before[-1] if before else np.isnan(found[b, r, c])
    assert not np.isnan(normalized(readings, {"center": [0, 0, 0], "scale": [1, 1, 1]})).any()


def test_softmax_of_large_numbers() -> None:
    found = softmax(np.asarray([[1e30, 0.0], [-5000.0, -5000.0], [800.0, 799.0]], np.float32))
    np.testing.assert_allclose(
        found, [[1, 0], [0.5, 0.5], [1 / (1 + np.exp(-1)), 1 / (1 + np.e)]], atol=1e-12
    )


def test_odd_texts(text: Bundle) -> None:
    classifier = OrtClassifier(text, threads=1)
    found = classifier.predict_texts(["\ud800 win", "\x00", "win " * 100_000, "🎉"])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_a_text_of_no_tokens_is_padding(tmp_path: Path) -> None:
    bare = json.dumps(json.loads(onnx_models.tokenizer_json()) | {"post_processor": None})
    files = {"model.onnx": onnx_models.text_model(), "tokenizer.json": bare}
    bundle = write_bundle(tmp_path / "b", files=files, manifest=onnx_models.manifest("text"))
    classifier = OrtClassifier(bundle, threads=1)
    assert classifier.tokenize(["", "win"]) == [[0], [3]]
    found = classifier.predict_texts(["", "win"])
    np.testing.assert_allclose(found, by_hand(onnx_models.text_logits([[0], [3]])), atol=1e-6)


def test_the_decision_of_the_bundle_is_there(tmp_path: Path) -> None:
    from edgeslm.runtime.posterior import make_decision

    rule = make_decision(("failure", "normal"), {"failure": 1, "normal": 4}, prior={"failure": 0.01})
    bundle = onnx_models.write_classifier(tmp_path / "b", "sensors", decision=rule.as_record())
    classifier = OrtClassifier(bundle)
    assert classifier.decision == rule
    assert classifier.threads >= 1
    assert classifier.load_s > 0


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (np.zeros((1, 3, 3)), r"shape \(1, 3, 3\).*4 rows and 3 channels"),
        (np.zeros((4, 3)), r"shape \(4, 3\)"),
        (np.full((1, 4, 3), np.inf), "infinity"),
    ],
)
def test_readings_that_fit_no_window(windows: np.ndarray, said: str, sensors: Bundle) -> None:
    with pytest.raises(DataError, match=said):
        OrtClassifier(sensors).predict_readings(windows)


def test_the_wrong_kind_of_data(text: Bundle, sensors: Bundle) -> None:
    with pytest.raises(DataError, match="classifies text, not sensors"):
        OrtClassifier(text).predict_readings(np.zeros((1, 4, 3)))
    with pytest.raises(DataError, match="classifies sensors, not text"):
        OrtClassifier(sensors).predict_texts(["x"])


def model_without(**changes: Any) -> dict[str, Any]:
    model = onnx_models.manifest("text")["model"]
    return {"model": {**model, **changes}}


SENSOR_FACTS = onnx_models.manifest("sensors")["model"]["preprocessing"]
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no labels": ("names no labels", model_without(labels=None)),
    "one label": ("names no labels", model_without(labels=["only"])),
    "a label twice": ("a label twice", model_without(labels=["a", "b", "a"])),
    "too many labels": ("3 scores, the manifest names 4", model_without(labels=list("abcd"))),
    "no model": ("names no labels", {"model": None}),
    "no preprocessing": ("how raw data become", model_without(preprocessing=None)),
    "unknown kind": ("how raw data become", model_without(preprocessing={"kind": "images"})),
    "no length": ("how raw data become", model_without(preprocessing={"kind": "text", "max_tokens": 0, "pad_id": 0})),
    "negative pad": ("how raw data become",
                     model_without(preprocessing={"kind": "text", "max_tokens": 5, "pad_id": -1})),
    "another graph": ("the graph takes input_ids, attention_mask; sensors need readings",
                      model_without(preprocessing=SENSOR_FACTS)),
    "scale 0": ("how raw data become", model_without(preprocessing=SENSOR_FACTS | {
        "normalization": {"center": [0, 0, 0], "scale": [1, 0, 1]}})),
    "short scale": ("how raw data become", model_without(preprocessing=SENSOR_FACTS | {
        "normalization": {"center": [0, 0, 0], "scale": [1, 1]}})),
    "text for scale": ("how raw data become", model_without(preprocessing=SENSOR_FACTS | {
        "normalization": {"center": "abc", "scale": [1, 1, 1]}})),
    "decision": ("labels are not the model's", {"decision": {"labels": ["x"]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_manifest_that_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    said, changes = BAD[name]
    bundle = onnx_models.write_classifier(tmp_path / "b", **changes)
    with pytest.raises(BundleError) as caught:
        OrtClassifier(bundle)
    assert said in caught.value.message
    assert str(tmp_path) in caught.value.message


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    for content in ("{", '{"model": 7}'):
        files: dict[str, Any] = {"model.onnx": onnx_models.text_model(), "tokenizer.json": content}
        bundle = write_bundle(tmp_path / "b", files=files, manifest=onnx_models.manifest("text"))
        with pytest.raises(BundleError, match=r"tokenizer\.json: no usable tokenizer"):
            OrtClassifier(bundle)
    bundle = write_bundle(
        tmp_path / "b", files={"model.onnx": onnx_models.text_model()}, manifest=onnx_models.manifest("text")
    )
    with pytest.raises(BundleError, match="no usable tokenizer"):
        OrtClassifier(bundle)


def test_a_graph_that_the_engine_refuses(tmp_path: Path) -> None:
    graph = onnx_models.graph(
        [onnx_models.node("NoSuchOperator", ("input_ids", "attention_mask"), "logits")], [],
        [onnx_models.value_info(name, 7, ("b", "s")) for name in ("input_ids", "attention_mask")],
        [onnx_models.value_info("logits", 1, ("b", 3))],
    )  # fmt: skip
    bundle = onnx_models.write_classifier(tmp_path / "b", data=onnx_models.model(graph))
    with pytest.raises(EngineError, match=r"model\.onnx: ONNX Runtime does not load.*NoSuchOperator"):
        OrtClassifier(bundle)


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    data = onnx_models.text_model().replace(
        onnx_models.weights()["bias"].tobytes(), np.asarray([0, np.nan, 0], np.float32).tobytes()
    )
    with pytest.raises(EngineError, match="not finite"):
        OrtClassifier(onnx_models.write_classifier(tmp_path / "b", data=data)).predict_texts(["win"])


def test_a_cut_file_never_reaches_the_engine(tmp_path: Path) -> None:
    bundle = onnx_models.write_classifier(tmp_path / "b", data=onnx_models.text_model()[:-20])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        OrtClassifier(bundle)


def test_other_artifacts_and_threads_are_refused(text: Bundle, tiny_gguf: Path) -> None:
    with pytest.raises(BundleError, match="a gguf artifact is no classifier"):
        OrtClassifier(open_bundle(tiny_gguf))
    for threads in (0, -1, 10**6):
        with pytest.raises(RecipeError, match=f"threads is {threads}"):
            OrtClassifier(text, threads=threads)


def test_without_onnxruntime_the_way_out_is_named(text: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"onnxruntime is not installed.*pip install 'edgeslm\[onnx\]'"):
        OrtClassifier(text)
