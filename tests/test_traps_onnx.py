"""Traps of ONNX graphs: weights that are there twice, accuracy levels that nobody checked, foreign operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.bundle import open_bundle
from edgeslm.errors import EdgeslmError
from edgeslm.inspection import inspect_model
from edgeslm.onnx_file import OnnxFile, read_onnx
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.traps import onnx_traps
from tests.onnx_models import (
    field,
    graph,
    manifest,
    model,
    node,
    tensor,
    text_model,
    value_info,
    write_classifier,
)

if TYPE_CHECKING:
    from pathlib import Path

TABLE = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)


def language_model(path: Path, head: np.ndarray | None) -> OnnxFile:
    """Gather, then a product with `head`, or with the table itself turned."""
    stored = [tensor("table", TABLE)] + ([] if head is None else [tensor("head", head)])
    nodes = [node("Gather", ("table", "ids"), "x")]
    if head is None:
        nodes.append(node("Transpose", ("table",), "head"))
    nodes.append(node("MatMul", ("x", "head"), "logits"))
    path.write_bytes(model(graph(nodes, stored, [value_info("ids", 7, (1, "s"))], [])))
    return read_onnx(path)


def test_a_head_that_repeats_the_embedding_is_flagged(tmp_path: Path) -> None:
    for head in (TABLE, np.ascontiguousarray(TABLE.T)):
        (found,) = onnx_traps(language_model(tmp_path / "m.onnx", head), audited=True)
        assert found["kind"] == "tied_head"
        assert "head is a copy of table: 32,768 values and 131,072 bytes are there twice" in found["text"]
    other = np.ascontiguousarray(TABLE.T)
    other[63, 511] += 1e-3
    for head in (other, None):
        assert onnx_traps(language_model(tmp_path / "m.onnx", head), audited=True) == []


def products(path: Path, *levels: int | None) -> OnnxFile:
    nodes = [
        node("MatMulNBits", ("x",), f"y{i}", bits=4, **({} if level is None else {"accuracy_level": level}))
        + field(7, "com.microsoft")
        for i, level in enumerate(levels)
    ]
    path.write_bytes(model(graph(nodes, [], [], [])))
    return read_onnx(path)


@pytest.mark.parametrize(
    ("levels", "audited", "said"),
    [((4, 4), False, ["2 of 2 MatMulNBits have accuracy_level 4"]), ((4, 4), True, []), ((1,), False, []),
     ((None, 4), True, ["1 of 2 MatMulNBits have no accuracy_level"]),
     ((None, 4), False, ["1 of 2 MatMulNBits have no", "1 of 2 MatMulNBits have accuracy_level 4"])],
)  # fmt: skip
def test_accuracy_levels(
    levels: tuple[int | None, ...], audited: bool, said: list[str], tmp_path: Path
) -> None:
    found = onnx_traps(products(tmp_path / "m.onnx", *levels), audited=audited)
    assert [trap["kind"] for trap in found] == ["accuracy_level"] * len(said)
    assert all(text in trap["text"] for text, trap in zip(said, found, strict=True))


def test_inspect_says_what_the_graph_needs(tmp_path: Path) -> None:
    write_classifier(tmp_path / "b")
    record = inspect_model(tmp_path / "b", context=1, verify=False)
    assert (record["onnxruntime"], record["ir_version"], record["data_files"]) == ("1.13", 8, [])
    assert "ai.onnx:Gather" in record["operators"]
    assert record["traps"] == []


def test_inspect_flags_foreign_operators(tmp_path: Path) -> None:
    foreign = model(graph([node("Mine", ("x",), "y") + field(7, "my.domain")], [], [], []))
    write_classifier(tmp_path / "b", data=foreign)
    record = inspect_model(tmp_path / "b", context=1, verify=False)
    assert [trap["kind"] for trap in record["traps"]] == ["operators"]
    assert record["onnxruntime"] is None


# --- bundles that can't run ---


@pytest.mark.parametrize("what", ["cut", "custom", "inputs", "labels", "outside"])
def test_bundles_that_can_not_run_are_named(what: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data, changes = text_model(), {}
    if what == "cut":
        data = data[:-20]
    elif what == "custom":
        data = model(graph([node("Mine", ("input_ids",), "logits") + field(7, "my.domain")], [],
                           [value_info("input_ids", 7, (1,))], [value_info("logits", 1, (1,))]))  # fmt: skip
    elif what == "inputs":
        data = data.replace(b"input_ids", b"inputs_id")
    elif what == "outside":
        weight = field(1, 2) + field(2, 1) + field(8, "w") + field(14, 1)
        data = model(graph([], [weight + field(13, field(1, "location") + field(2, "../w"))], [], []))
    else:
        facts = manifest("text")["model"]
        del facts["labels"]
        changes["model"] = facts
    write_classifier(tmp_path / "b", data=data, **changes)
    with pytest.raises(EdgeslmError) as caught:
        OrtClassifier(open_bundle(tmp_path / "b"))
    assert len(caught.value.message) > 20
    assert caught.value.hint


def test_external_data_that_went_missing_on_the_way(tmp_path: Path) -> None:
    """Dropped from the bundle, or cut: named before the engine opens anything."""
    weight = field(1, 4) + field(2, 1) + field(8, "w") + field(14, 1)
    entry = field(13, field(1, "location") + field(2, "model.onnx.data"))
    (tmp_path / "model.onnx").write_bytes(model(graph([], [weight + entry], [], [])))
    with pytest.raises(EdgeslmError, match=r"model\.onnx\.data, which holds weights, is missing"):
        read_onnx(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(bytes(15))
    with pytest.raises(EdgeslmError, match="which has 15"):
        read_onnx(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").write_bytes(bytes(16))
    assert read_onnx(tmp_path / "model.onnx").tensors["w"].nbytes == 16
