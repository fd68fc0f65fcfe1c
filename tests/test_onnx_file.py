"""The reader of ONNX files: against the onnx package, and against files that mean harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeslm.errors import ModelError
from edgeslm.onnx_file import TYPES, read_onnx
from tests.onnx_models import field, graph, model, node, sensor_model, tensor, text_model, value_info, varint

if TYPE_CHECKING:
    from pathlib import Path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_what_a_file_declares(tmp_path: Path) -> None:
    file = read_onnx(written(tmp_path / "m.onnx", text_model()))
    assert (file.opset, file.producer) == (17, "hand")
    assert (file.inputs, file.outputs) == (("input_ids", "attention_mask"), ("logits",))
    assert {name: (each.shape, each.type, each.nbytes) for name, each in file.tensors.items()} == {
        "embedding": ((10, 5), "F32", 200), "head": ((5, 3), "F32", 60), "bias": ((3,), "F32", 12),
        "one": ((1,), "I64", 8), "two": ((1,), "I64", 8),
    }  # fmt: skip
    assert file.tensors["embedding"].parameters == 50


@pytest.mark.parametrize("make", [text_model, sensor_model])
def test_the_onnx_package_reads_the_same(make: object, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = written(tmp_path / "m.onnx", make())  # type: ignore[operator]
    theirs, ours = onnx.load(path), read_onnx(path)
    onnx.checker.check_model(theirs, full_check=True)
    assert [each.name for each in theirs.graph.initializer] == list(ours.tensors)
    for each in theirs.graph.initializer:
        array = onnx.numpy_helper.to_array(each)
        assert (ours.tensors[each.name].shape, ours.tensors[each.name].nbytes) == (array.shape, array.nbytes)


def test_types_are_those_of_the_onnx_package(tmp_path: Path) -> None:
    """Every type in every way that the package stores it: raw, or in a repeated field."""
    onnx = pytest.importorskip("onnx")
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    for number, (label, bits) in TYPES.items():
        for raw in (False, True):
            count = 6
            values = np.zeros(count * bits // 8, np.uint8).tobytes() if raw else [0] * count
            proto = onnx.helper.make_tensor("x", number, (count,), values, raw=raw)
            held = onnx.helper.make_graph([], "g", [], [], [proto])
            path = tmp_path / "m.onnx"
            onnx.save(onnx.helper.make_model(held), path)
            found = read_onnx(path).tensors["x"]
            assert (found.type, found.shape, found.nbytes) == (label, (count,), count * bits // 8), names[
                number
            ]
            assert onnx.helper.tensor_dtype_to_np_dtype(number).itemsize * 8 >= bits


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    outside = field(13, field(1, "location") + field(2, "../../etc/passwd"))
    for harm in (outside, field(14, 1)):
        bad = tensor("w", np.zeros(2, np.float32), harm)
        inner = graph([], [bad], [], [])
        constant = field(2, "c") + field(4, "Constant")
        sparse = field(1, bad) + field(2, tensor("i", np.zeros(1, np.int64)))
        for data in (
            graph([], [bad], [], []),
            graph([constant + field(5, field(1, "value") + field(5, bad))], [], [], []),
            graph([constant + field(5, field(1, "values") + field(10, bad))], [], [], []),
            graph(
                [node("If", ("x",), "y") + field(5, field(1, "then_branch") + field(6, inner))], [], [], []
            ),
            graph([node("X", ("x",), "y") + field(5, field(1, "g") + field(11, inner))], [], [], []),
            graph([constant + field(5, field(1, "sparse_value") + field(22, sparse))], [], [], []),
            graph([], [], [], []) + field(15, sparse),
        ):
            with pytest.raises(ModelError, match="kept in another file"):
                read_onnx(written(tmp_path / "m.onnx", model(data)))


def nested(depth: int) -> bytes:
    inner = graph([], [], [], [])
    for _ in range(depth):
        inner = graph([node("If", ("x",), "y") + field(5, field(1, "b") + field(6, inner))], [], [], [])
    return model(inner)


HARM: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"hello, this is no model at all", "protobuf|longer than|does not end|no graph"),
    "a GGUF file": (b"GGUF" + bytes(64), "protobuf|longer|no graph"),
    "no graph": (field(1, 8) + field(2, "x"), "holds no graph"),
    "cut": (text_model()[:-30], "longer than the file|no graph"),
    "length beyond": (varint(7 << 3 | 2) + varint(2**40), "longer than the file"),
    "an endless number": (b"\xff" * 20, "does not end"),
    "nested": (nested(40), "nested more than 16"),
    "twice": (model(graph([], [tensor("w", np.zeros(1, np.float32))] * 2, [], [])), "there twice"),
    "wrong size": (model(graph([], [field(1, 9) + field(2, 1) + field(8, "w") + field(9, bytes(8))], [], [])),
                   r"shape \(9,\) holds 8 bytes, not 36"),
    "huge": (model(graph([], [field(1, 2**62) + field(1, 2**62) + field(2, 1) + field(8, "w")], [], [])),
             "can't be represented"),
    "negative": (model(graph([], [field(1, 2**64 - 1) + field(2, 1) + field(8, "w")], [], [])),
                 "can't be represented"),
    "unknown type": (model(graph([], [field(1, 2) + field(2, 99) + field(8, "w")], [], [])), "unknown type 99"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_what_is_no_onnx_file_is_named(name: str, tmp_path: Path) -> None:
    data, said = HARM[name]
    with pytest.raises(ModelError, match=said) as caught:
        read_onnx(written(tmp_path / "bad.onnx", data))
    assert "bad.onnx" in caught.value.message


def test_missing_files_and_directories(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.onnx", tmp_path):
        with pytest.raises(ModelError, match=str(path)):
            read_onnx(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_damage_does_more_than_be_named(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(text_model())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = content[: data.draw(st.integers(1, len(content)))]
    try:
        file = read_onnx(written(tmp_path / "m.onnx", bytes(cut)))
    except ModelError:
        return
    assert all(each.nbytes >= 0 for each in file.tensors.values())


def test_inputs_are_those_that_are_not_stored(tmp_path: Path) -> None:
    """Before IR version 4 initializers had to be declared as inputs too."""
    held = graph(
        [], [tensor("w", np.zeros(2, np.float32))], [value_info("x", 1, (2,)), value_info("w", 1, (2,))], []
    )
    assert read_onnx(written(tmp_path / "m.onnx", model(held))).inputs == ("x",)
