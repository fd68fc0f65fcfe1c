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


def outside(name: str, location: str, *more: tuple[str, str], shape: tuple[int, ...] = (4, 2)) -> bytes:
    """A float32 TensorProto that is kept in another file."""
    dims = b"".join(field(1, extent) for extent in shape)
    keys = (("location", location), *more)
    entries = b"".join(field(13, field(1, key) + field(2, value)) for key, value in keys)
    return dims + field(2, 1) + field(8, name) + entries + field(14, 1)


def test_weights_beside_the_file_are_read_where_they_lie(tmp_path: Path) -> None:
    """As the onnx package writes them; two names may share bytes."""
    onnx = pytest.importorskip("onnx")
    values = {name: np.arange(600, dtype=np.float32).reshape(20, 30) + i for i, name in enumerate("ab")}
    graph_proto = onnx.helper.make_graph(
        [], "g", [], [], [onnx.numpy_helper.from_array(array, name) for name, array in values.items()]
    )
    path = tmp_path / "m.onnx"
    onnx.save_model(
        onnx.helper.make_model(graph_proto), path, save_as_external_data=True, location="m.onnx.data",
        size_threshold=0,
    )  # fmt: skip
    file = read_onnx(path)
    assert file.data_files == (tmp_path / "m.onnx.data",)
    data = file.data_files[0].read_bytes()
    for name, array in values.items():
        tensor = file.tensors[name]
        assert (tensor.path, tensor.nbytes) == (file.data_files[0], 2400)
        assert tensor.offset is not None
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()


BAD_PLACES: dict[str, tuple[bytes, str]] = {
    "above": (outside("w", "../weights"), "no name of a file beside it"),
    "absolute": (outside("w", "/etc/passwd"), "no name of a file beside it"),
    "below": (outside("w", "folder/weights"), "no name of a file beside it"),
    "Windows": (outside("w", "C:weights"), "no name of a file beside it"),
    "dots": (outside("w", ".."), "no name of a file beside it"),
    "nothing": (outside("w", ""), "no name of a file beside it"),
    "memory": (outside("w", "*/_ORT_MEM_ADDR_/*", ("offset", "4096")), "no name of a file beside it"),
    "missing": (outside("w", "gone.data"), "gone.data, which holds weights, is missing"),
    "a folder": (outside("w", "folder"), "a link or no file"),
    "a link": (outside("w", "link"), "a link or no file"),
    "too short": (outside("w", "weights", ("offset", "64")), "32 bytes at 64 of weights, which has 64"),
    "another length": (outside("w", "weights", ("length", "16")), "said to be 16 bytes"),
    "far away": (outside("w", "weights", ("offset", str(2**62))), "which has 64"),
    "negative": (outside("w", "weights", ("offset", "-4")), "kept at '-4'"),
    "no number": (outside("w", "weights", ("length", "\u0663\u0662")), "kept at '0'"),
    "askew": (outside("w", "weights", ("offset", "2")), "in the middle of an element"),
    "unknown key": (outside("w", "weights", ("prepacked_0", "x")), "unknown key 'prepacked_0'"),
    "here too": (outside("w", "weights") + field(9, bytes(32)), "only weights of the main graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLACES)
def test_weights_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    bad, said = BAD_PLACES[name]
    (tmp_path / "weights").write_bytes(bytes(64))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    with pytest.raises(ModelError, match=said):
        read_onnx(written(tmp_path / "m.onnx", model(graph([], [bad], [], []))))


def test_only_weights_of_the_main_graph_may_lie_beside(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(64))
    bad = outside("w", "weights")
    inner = graph([], [bad], [], [])
    constant = field(2, "c") + field(4, "Constant")
    sparse = field(1, bad) + field(2, tensor("i", np.zeros(1, np.int64)))
    function = (
        field(1, "F") + field(10, "mine") + field(7, constant + field(5, field(1, "value") + field(5, bad)))
    )
    for data in (
        model(graph([constant + field(5, field(1, "value") + field(5, bad))], [], [], [])),
        model(graph([constant + field(5, field(1, "values") + field(10, bad))], [], [], [])),
        model(
            graph([node("If", ("x",), "y") + field(5, field(1, "then_branch") + field(6, inner))], [], [], [])
        ),
        model(graph([node("X", ("x",), "y") + field(5, field(1, "g") + field(11, inner))], [], [], [])),
        model(graph([constant + field(5, field(1, "sparse_value") + field(22, sparse))], [], [], [])),
        model(graph([], [], [], []) + field(15, sparse)),
        model(graph([], [], [], [])) + field(25, function),
    ):
        with pytest.raises(ModelError, match="only weights of the main graph"):
            read_onnx(written(tmp_path / "m.onnx", data))
    assert read_onnx(written(tmp_path / "m.onnx", model(inner))).tensors["w"].nbytes == 32


def test_operators_are_those_of_every_graph(tmp_path: Path) -> None:
    inner = graph([node("Relu", ("x",), "y")], [], [], [])
    branch = node("If", ("x",), "y") + field(5, field(1, "b") + field(6, inner))
    foreign = node("Fancy", ("x",), "z", depth=2**64 - 3) + field(7, "mine")
    function = field(1, "Fancy") + field(10, "mine") + field(7, node("Tanh", ("x",), "y"))
    file = read_onnx(
        written(tmp_path / "m.onnx", model(graph([branch, foreign], [], [], [])) + field(25, function))
    )
    assert file.operators == ("ai.onnx:If", "ai.onnx:Relu", "ai.onnx:Tanh", "mine:Fancy")
    assert file.functions == ("mine:Fancy",)
    assert [each.operator for each in file.nodes] == ["ai.onnx:If", "mine:Fancy"]
    assert file.nodes[1].attributes == {"depth": -3}
    assert (file.ir_version, file.opsets) == (8, {"ai.onnx": 17})


def test_a_tensor_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    for values in (b"", field(4, bytes(8)), field(7, bytes(3))):
        bad = field(1, 1000) + field(2, 1) + field(8, "w") + values
        with pytest.raises(ModelError, match="holds fewer values"):
            read_onnx(written(tmp_path / "m.onnx", model(graph([], [bad], [], []))))


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
