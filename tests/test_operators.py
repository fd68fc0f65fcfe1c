"""What versions of ONNX Runtime are said to run, against the one that is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgeslm.errors import EngineError
from edgeslm.onnx_file import OnnxFile, read_onnx
from edgeslm.operators import RELEASES, SINCE, check, minimum, parse, unknown
from tests.onnx_models import field, graph, model, node, text_model, value_info

if TYPE_CHECKING:
    from pathlib import Path


def read(path: Path, *nodes: bytes, opset: int = 17) -> OnnxFile:
    path.write_bytes(model(graph(list(nodes), [], [value_info("x", 1, (1,))], []), opset=opset))
    return read_onnx(path)


def contrib(name: str, **attributes: int) -> bytes:
    return node(name, ("x",), "y", **attributes) + field(7, "com.microsoft")


def test_a_plain_model_runs_everywhere(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(text_model())
    file = read_onnx(tmp_path / "m.onnx")
    assert minimum(file) == "1.13"
    for release in RELEASES:
        check(file, ".".join(map(str, release)))
    with pytest.raises(EngineError, match=r"older than 1\.13"):
        check(file, "1.9.0")


@pytest.mark.parametrize(
    ("name", "attributes", "since"),
    [("MatMulNBits", {"bits": 4}, "1.17"), ("MatMulNBits", {"bits": 8}, "1.22"),
     ("GatherBlockQuantized", {}, "1.20"), ("GatherBlockQuantized", {"bits": 4}, "1.23"),
     ("GroupQueryAttention", {}, "1.18"), ("DynamicQuantizeLSTM", {}, "1.13")],
)  # fmt: skip
def test_an_operator_that_the_device_lacks_is_an_error(
    name: str, attributes: dict[str, int], since: str, tmp_path: Path
) -> None:
    file = read(tmp_path / "m.onnx", contrib(name, **attributes))
    assert minimum(file) == since
    check(file, since)
    check(file, "1.99.3")
    if since != "1.13":
        with pytest.raises(EngineError, match=f"from {since} on; the device has 1.16.3") as caught:
            check(file, "1.16.3")
        assert caught.value.hint is not None
        assert f"onnxruntime {since}" in caught.value.hint


def test_operators_of_nobody(tmp_path: Path) -> None:
    for foreign in (node("Mine", ("x",), "y") + field(7, "my.domain"), contrib("NoSuchThing")):
        file = read(tmp_path / "m.onnx", foreign)
        assert minimum(file) is None
        assert len(unknown(file)) == 1
        with pytest.raises(EngineError, match="no ONNX Runtime has by itself"):
            check(file, "1.31.1")


def test_an_operator_that_the_file_defines_is_no_custom_one(tmp_path: Path) -> None:
    function = field(1, "Mine") + field(10, "my.domain") + field(7, node("Tanh", ("x",), "y"))
    data = model(graph([node("Mine", ("x",), "y") + field(7, "my.domain")], [], [], [])) + field(25, function)
    (tmp_path / "m.onnx").write_bytes(data)
    assert minimum(read_onnx(tmp_path / "m.onnx")) == "1.13"


def test_opset_and_ir_version(tmp_path: Path) -> None:
    file = read(tmp_path / "m.onnx", opset=22)
    assert minimum(file) == "1.21"
    with pytest.raises(EngineError, match=r"opset is 22, ONNX Runtime 1\.20\.1 knows 21 at most") as caught:
        check(file, "1.20.1")
    assert caught.value.hint == "install onnxruntime 1.21 there"
    with pytest.raises(EngineError, match="opset is 99"):
        check(read(tmp_path / "m.onnx", opset=99), "1.30")


def test_versions() -> None:
    assert parse("1.23.2") == (1, 23)
    assert parse("1.9") == (1, 9)
    for bad in ("", "new", "1", "1.x"):
        with pytest.raises(EngineError, match="no version"):
            parse(bad)
    assert list(RELEASES) == sorted(RELEASES)


def test_the_installed_engine_has_what_is_said_of_it() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state as engine

    schemas = engine.get_all_operator_schema()
    names = {schema.name for schema in schemas if schema.domain == "com.microsoft"}
    release = parse(onnxruntime.__version__)
    assert {name.split()[0] for name, since in SINCE.items() if since <= release} <= names
