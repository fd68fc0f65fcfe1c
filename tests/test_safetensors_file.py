"""edgeslm.safetensors_file against the safetensors package and against damaged and hostile files."""

from __future__ import annotations

import json
import os
import re
import struct
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeslm.errors import ModelError
from edgeslm.safetensors_file import (
    BITS,
    INDEX_NAME,
    SINGLE_NAME,
    load,
    read_checkpoint,
    read_safetensors,
    to_float32,
)

if TYPE_CHECKING:
    from pathlib import Path


def container(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def model(folder: Path, shards: dict[str, dict[str, Any]], weight_map: Any = None) -> Path:
    """A sharded checkpoint of float32 arrays; weight_map None lists what is there."""
    from safetensors.numpy import save_file

    for shard, arrays in shards.items():
        save_file(arrays, folder / shard)
    if weight_map is None:
        weight_map = {name: shard for shard, arrays in shards.items() for name in arrays}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


# ------------------------------------------------------------------------------------ against the package


def test_arrays_as_the_package_stores_them(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    dice = np.random.default_rng(0)
    arrays = {
        np.dtype(form).name: (dice.standard_normal((3, 5)) * 50).astype(form)
        for form in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "c8")
    }
    arrays |= {"scalar": np.array(3.5, np.float32), "none": np.zeros((0, 4), np.float32)}
    safetensors.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "np", "näme": "x, y"})
    tensors = read_safetensors(tmp_path / "a.safetensors")
    assert tensors.keys() == arrays.keys()
    for name, expected in arrays.items():
        values = load(tensors[name])
        assert values.dtype == expected.dtype
        assert values.shape == tensors[name].shape == expected.shape
        assert tensors[name].nbytes == expected.nbytes
        assert tensors[name].parameters == expected.size
        assert np.array_equal(values, expected)
        assert not values.flags.writeable or values.size == 0
        if expected.dtype.kind == "f":
            assert to_float32(tensors[name]).dtype == np.float32
            assert np.array_equal(to_float32(tensors[name]), expected.astype(np.float32))


@pytest.mark.workstation
def test_bfloat16_as_torch_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    patterns = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
        .reshape(256, 256)
    )
    safetensors.save_file({"every": patterns}, tmp_path / "a.safetensors")
    tensor = read_safetensors(tmp_path / "a.safetensors")["every"]
    assert (tensor.dtype, load(tensor).dtype) == ("BF16", np.uint16)
    assert np.array_equal(to_float32(tensor).view(np.uint32), patterns.float().numpy().view(np.uint32))


def test_every_dtype_of_the_package(tmp_path: Path) -> None:
    """Sizes of all dtypes, those with bits that fill no byte included, as the package judges them."""
    safetensors = pytest.importorskip("safetensors")
    for dtype, bits in BITS.items():
        for count in (1, 2, 4, 8):
            for nbytes in range(1, 66):
                content = container({"a": entry(dtype, [count], [0, nbytes])}, bytes(nbytes))
                assert accepted(tmp_path / "a", content) == (bits * count == 8 * nbytes)
            content = container({"a": entry(dtype, [8, count], [0, bits * count])}, bytes(bits * count))
            assert safetensors.deserialize(content), dtype
    with pytest.raises(safetensors.SafetensorError, match="unknown variant") as caught:
        safetensors.deserialize(container({"a": entry("X")}, bytes(8)))
    assert set(re.findall(r"`([A-Z0-9_]+)`", str(caught.value))) - {"X"} == set(BITS)


def accepted(path: Path, content: bytes) -> bool:
    try:
        read_safetensors(write(path, content))
    except ModelError as error:
        assert len(str(error)) < 2000  # noqa: PT017
        return False
    return True


# ------------------------------------------------------------------------------------------- bad input

PAIR = {"a": entry(), "b": entry("F16", [4], [8, 16])}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "short": (b"1234567", "only 7 bytes"),
    "header longer than the file": (container({}, length=100), "declares a header of 100 bytes"),
    "absurd header": (container({}, length=2**63), "declares a header of 9223372036854775808"),
    "pickle": (b"PK\3\4" + bytes(60), "declares a header|does not begin"),
    "no object": (container([]), "does not begin with"),
    "space first": (container(b" {}"), "does not begin with"),
    "broken JSON": (container(b'{"a":'), "can't be read"),
    "not UTF-8": (container(b'{"\xff":1}'), "can't be read"),
    "half a surrogate pair": (container(b'{"\\ud800":{}}'), "surrogates not allowed"),
    "second name": (container(b'{"a":{},"a":{}}'), "'a' stands there twice"),
    "second field": (container(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "'dtype' stands there twice"),
    "NaN": (container(b'{"a":NaN}'), "NaN is not JSON"),
    "infinity": (container(b'{"a":[-Infinity]}'), "-Infinity is not JSON"),
    "deep": (container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "long number": (container(b'{"a":' + b"9" * 10_000 + b"}"), "can't be read"),
    "more items than any model": (container(b'{"a":[' + b"," * 2**22 + b"]}"), "more than 4194304 items"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (container({"__metadata__": []}), "__metadata__"),
    "entry no object": (container({"a": 1}), "'a' is not described by an object"),
    "no dtype": (container({"a": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)), "unknown dtype 'None'"),
    "unknown dtype": (container({"a": entry("Q4")}, bytes(8)), "unknown dtype 'Q4'"),
    "dtype a list": (container({"a": entry([])}, bytes(8)), "unknown dtype"),
    "shape no list": (container({"a": entry(shape=2)}, bytes(8)), "the shape 2"),
    "negative size": (container({"a": entry(shape=[-2])}, bytes(8)), "not a list of sizes"),
    "float size": (container({"a": entry(shape=[2.0])}, bytes(8)), "not a list of sizes"),
    "true as a size": (container({"a": entry(shape=[2, True])}, bytes(8)), "not a list of sizes"),
    "one offset": (container({"a": entry(offsets=[0])}, bytes(8)), r"not \[begin, end\]"),
    "offsets backwards": (container({"a": entry(offsets=[8, 0])}, bytes(8)), r"not \[begin, end\]"),
    "negative offset": (container({"a": entry(offsets=[-8, 0])}, bytes(8)), r"not \[begin, end\]"),
    "false as an offset": (container({"a": entry(offsets=[False, 8])}, bytes(8)), r"not \[begin, end\]"),
    "shape too small": (container({"a": entry(shape=[1])}, bytes(8)), "needs 4 bytes, but spans 8"),
    "shape overflows": (
        container({"a": entry(shape=[2**62, 2**62])}, bytes(8)),
        "more bytes than can be counted",
    ),
    "overflow hidden by zero": (
        container({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}),
        "more bytes than can be counted",
    ),
    "half a byte": (container({"a": entry("F4", [1], [0, 1])}, bytes(1)), "needs 0.5 bytes"),
    "cut off": (container(PAIR, bytes(15)), "end at byte .* of a file of"),
    "trailing bytes": (container(PAIR, bytes(17)), "end at byte .* of a file of"),
    "overlap": (container({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'b' overlaps"),
    "same place": (container({"a": entry(), "b": entry()}, bytes(8)), "'b' overlaps"),
    "gap": (container({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "'b' leaves 4 bytes unused"),
    "gap in front": (container({"a": entry(offsets=[4, 12])}, bytes(12)), "'a' leaves 4 bytes unused"),
    "long name": (container({"a" * 100_000: 1}), "'aaaa"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_one_clear_error(name: str, tmp_path: Path) -> None:
    content, expected = BAD[name]
    path = write(tmp_path / "bad.safetensors", content)
    with pytest.raises(ModelError, match=expected) as caught:
        read_safetensors(path)
    assert str(path) in caught.value.message
    assert len(str(caught.value)) < 2000


def test_harmless_files_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert read_safetensors(write(path, container({}))) == {}
    padded = read_safetensors(write(path, container(json.dumps(PAIR).encode() + b"   ", bytes(16))))
    assert [tensor.offset for tensor in padded.values()] == [
        path.stat().st_size - 16,
        path.stat().st_size - 8,
    ]
    swapped = {"b": entry("F16", [4], [8, 16]), "a": entry()}
    assert list(read_safetensors(write(path, container(swapped, bytes(16))))) == ["b", "a"]
    empty = {"a": entry(), "none": entry(shape=[0], offsets=[0, 0]), "b": entry(offsets=[8, 16])}
    assert len(read_safetensors(write(path, container(empty, bytes(16))))) == 3


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.safetensors: No such file"):
        read_safetensors(tmp_path / "gone.safetensors")
    with pytest.raises(ModelError, match="is not a file"):
        read_safetensors(tmp_path)


def test_values_that_are_no_weights(tmp_path: Path) -> None:
    content = container({"a": entry("F8_E4M3", [8], [0, 8]), "b": entry("I32", [2], [8, 16])}, bytes(16))
    tensors = read_safetensors(write(tmp_path / "a.safetensors", content))
    with pytest.raises(ModelError, match="F8_E4M3, which can't be used"):
        load(tensors["a"])
    for name in "ab":
        with pytest.raises(ModelError, match="not as floating-point weights"):
            to_float32(tensors[name])


def test_file_that_shrinks_later(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", container(PAIR, bytes(16)))
    tensors = read_safetensors(path)
    os.truncate(path, 10)
    with pytest.raises(ModelError, match="can't map 'a'"):
        load(tensors["a"])


# --------------------------------------------------------------------------------------------- fuzzing

FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.integers(-2, 24) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 1e300, 2.0, True, None])
JSON = st.recursive(
    NUMBERS | st.text(max_size=5) | st.sampled_from(sorted(BITS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F4", "U8", "I64"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | JSON,
    },
    optional={"other": JSON},
)


def same_judgement(path: Path, content: bytes) -> None:
    """What is accepted here the package accepts too; what only it accepts is named."""
    safetensors = pytest.importorskip("safetensors")
    path.write_bytes(content)
    try:
        theirs = {
            name: (info["dtype"], tuple(info["shape"])) for name, info in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        theirs = None
    tracemalloc.start()
    try:
        ours = {name: (tensor.dtype, tensor.shape) for name, tensor in read_safetensors(path).items()}
    except ModelError as error:
        if theirs is not None:
            assert re.search("twice|__metadata__", error.message), error  # noqa: PT017
        return
    finally:
        assert tracemalloc.get_traced_memory()[1] < 2**19 + 100 * len(content)
        tracemalloc.stop()
    assert ours == theirs


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes(content: bytes, tmp_path: Path) -> None:
    same_judgement(tmp_path / "fuzz", content)
    same_judgement(tmp_path / "fuzz", container(content))
    same_judgement(tmp_path / "fuzz", container(b"{" + content))


@FUZZ
@given(header=st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=3), size=st.integers(0, 48))
def test_structured_headers(header: Any, size: int, tmp_path: Path) -> None:
    same_judgement(tmp_path / "fuzz", container(header, bytes(size)))


@FUZZ
@given(data=st.data())
def test_mutated_file(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(container({"__metadata__": {"format": "pt"}, **PAIR}, bytes(16)))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        mark = data.draw(st.sampled_from(b'0129-.eE,:[]{}"\\ tnNx\xff\0') | st.integers(0, 255))
        content[at : at + data.draw(st.integers(0, 2))] = bytes([mark])
    same_judgement(tmp_path / "fuzz", bytes(content))


def test_absurd_headers_allocate_little(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", container(b"{", length=100_000_001))
    os.truncate(path, 2**33)
    tracemalloc.start()
    before = time.process_time()
    with pytest.raises(ModelError, match="100000000 is the most allowed"):
        read_safetensors(path)
    with pytest.raises(ModelError, match="more than 4194304 items"):
        read_safetensors(write(tmp_path / "b", container(b'{"a":[' + b"[]," * 2**24 + b"[]]}")))
    assert time.process_time() - before < 2
    assert tracemalloc.get_traced_memory()[1] < 3.2 * 3 * 2**24
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------ checkpoints


def test_single_and_sharded_checkpoints(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {name: np.full((2, 3), index, np.float32) for index, name in enumerate("abcd")}
    (tmp_path / "single").mkdir()
    safetensors.save_file(arrays, tmp_path / "single" / SINGLE_NAME)
    (tmp_path / "sharded").mkdir()
    first, second = dict(list(arrays.items())[:3]), dict(list(arrays.items())[3:])
    shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    model(tmp_path / "sharded", shards)
    for folder in ("single", "sharded"):
        tensors = read_checkpoint(tmp_path / folder)
        assert tensors.keys() == arrays.keys()
        for name, expected in arrays.items():
            assert np.array_equal(to_float32(tensors[name]), expected)
    assert tensors["d"].path.name == "model-00002-of-00002.safetensors"


def test_shards_may_be_links_elsewhere(tmp_path: Path) -> None:
    """As in the cache of huggingface_hub, whose snapshots link to blobs beside them."""
    pytest.importorskip("safetensors")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    model(tmp_path / "blobs", {"one.safetensors": {"a": np.zeros(3, np.float32)}})
    for name in ("one.safetensors", INDEX_NAME):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert read_checkpoint(tmp_path / "snapshot").keys() == {"a"}


@pytest.mark.parametrize(
    "shard",
    ["../one.safetensors", "/etc/one.safetensors", "a/one.safetensors", "..\\one.safetensors", "", "..", None, 1,
     "one.bin", "C:one.safetensors", "one\0.safetensors", ".safetensors", "a" * 300 + ".safetensors"],
)  # fmt: skip
def test_shard_elsewhere_is_refused(shard: Any, tmp_path: Path) -> None:
    model_index = {"weight_map": {"a": shard}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(model_index))
    with pytest.raises(ModelError, match=r"'a' points to .*, not to a \.safetensors file beside"):
        read_checkpoint(tmp_path)


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    zeros = np.zeros(2, np.float32)
    shards = {"one.safetensors": {"a": zeros, "b": zeros}, "two.safetensors": {"c": zeros}}
    listed = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    with pytest.raises(ModelError, match=r"puts 'd' into one\.safetensors, which does not hold it"):
        read_checkpoint(model(tmp_path, shards, listed | {"d": "one.safetensors"}))
    with pytest.raises(ModelError, match=r"one\.safetensors holds 'b', but .* does not list it"):
        read_checkpoint(model(tmp_path, shards, {"a": "one.safetensors", "c": "two.safetensors"}))
    with pytest.raises(ModelError, match=r"one\.safetensors holds 'b', but .* puts it into two\.safetensors"):
        read_checkpoint(model(tmp_path, shards, listed | {"b": "two.safetensors"}))
    with pytest.raises(ModelError, match=r"the shard three\.safetensors is missing"):
        read_checkpoint(model(tmp_path, shards, listed | {"d": "three.safetensors"}))


@pytest.mark.parametrize(
    ("index", "expected"),
    [("{}", "no weight_map"), ('{"weight_map":[]}', "no weight_map"), ("[]", "not an object"), ("{", "can't be read"),
     ('{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "twice"), ("[" * 10**5, "nested too deeply")],
)  # fmt: skip
def test_bad_index(index: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(ModelError, match=expected):
        read_checkpoint(tmp_path)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone is not a directory"):
        read_checkpoint(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor"):
        read_checkpoint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"it has consolidated\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"pickled weights \(pytorch_model\.bin\), which can run code"
    ) as caught:
        read_checkpoint(tmp_path)
    assert "save_pretrained" in caught.value.hint
