"""edgeslm.inspection: facts from every kind of source, and each trap where it is and only there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeslm import console
from edgeslm.bundle import write_bundle
from edgeslm.errors import BundleError, EdgeslmError, ModelError
from edgeslm.gguf_file import GGML_TYPES, read_gguf
from edgeslm.inspection import inspect_model
from edgeslm.traps import FALLBACKS, PRE_TOKENIZERS
from tests import onnx_models
from tests.conftest import write_tiny_gguf
from tests.test_gguf_file import array, container, field, tensor


def inspect(source: Path | str, *, context: int = 256, verify: bool = False) -> dict[str, Any]:
    """The record, which must be JSON that any reader takes."""
    record = inspect_model(source, context=context, verify=verify)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == "edgeslm.inspect/1"
    assert sum(kind["parameters"] for kind in record["kinds"]) == record["parameters"]
    assert sum(kind["bytes"] for kind in record["kinds"]) == record["weight_bytes"]
    assert sum(kind["tensors"] for kind in record["kinds"]) == len(record["tensors"])
    assert sum(sum(kind["types"].values()) for kind in record["kinds"]) == len(record["tensors"])
    return record


def traps(record: dict[str, Any]) -> dict[str, str]:
    assert all(trap["hint"] for trap in record["traps"])
    return {trap["kind"]: trap["text"] for trap in record["traps"]}


def edited(source: Path, out: Path, **changes: Any) -> Path:
    """A copy of a GGUF file with metadata set anew; None takes the key out.  Dots are written as __."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(out), "llama")
    replaced = {key.replace("__", "."): value for key, value in changes.items()}
    for name, value in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in replaced:
            continue
        sub_type = value.types[-1] if len(value.types) > 1 else None
        writer.add_key_value(name, value.contents(), value.types[0], sub_type=sub_type)
    for name, value in replaced.items():
        if value is not None:
            writer.add_string(name, value)
    for item in reader.tensors:
        writer.add_tensor(item.name, item.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# -------------------------------------------------------------------------------------------- facts


def test_tiny_file(tiny_gguf: Path) -> None:
    record = inspect(tiny_gguf)
    expected = {
        "path": str(tiny_gguf), "kind": "gguf", "name": "tiny", "architecture": "llama", "context_length": 256,
        "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "tied_embeddings": True,
        "verified": None, "file_bytes": tiny_gguf.stat().st_size, "bits_per_weight": 32.0,
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64
    assert record["parameters"] == 265 * 64 + 64 + 2 * layer
    assert record["weight_bytes"] == 4 * record["parameters"]
    assert record["tokenizer"] == {
        "model": "gpt2", "pre": "smollm", "vocab_size": 265, "bos": "<|im_start|>", "eos": "<|im_end|>",
        "chat_template": True,
    }  # fmt: skip
    assert record["kinds"][3] == {
        "kind": "attn_q", "tensors": 2, "types": {"F32": 2}, "parameters": 8192, "bytes": 32768,
        "bits_per_weight": 32.0,
    }  # fmt: skip
    assert record["tensors"][0] == {
        "name": "token_embd.weight",
        "shape": [265, 64],
        "type": "F32",
        "bytes": 67840,
    }
    memory = record["memory"]
    assert memory["kv_cache_bytes"] == 2 * 2 * 256 * 2 * 16 * 2
    assert memory["weights_bytes"] == record["weight_bytes"]
    assert memory["total_bytes"] == sum(memory[f"{key}_bytes"] for key in ("weights", "kv_cache", "compute"))


def test_real_file(smollm2_gguf: Path) -> None:
    record = inspect(smollm2_gguf, context=2048)
    assert record["parameters"] == 134_515_008
    assert record["bits_per_weight"] == pytest.approx(5.7437, abs=1e-4)
    assert record["memory"]["kv_cache_bytes"] == 45 * 2**20
    assert traps(record).keys() == {"rows"}
    text = traps(record)["rows"]
    for part in ("181 of 211 matrices", "rows of 576 values", "Q4_K becomes Q5_0 (5.5 bits for 4.5)",
                 "Q6_K becomes Q8_0 (8.5 bits for 6.56)", "here they are Q4_1 (180), Q8_0 (1)"):  # fmt: skip
        assert part in text


@pytest.fixture
def bundle(tiny_gguf: Path, tmp_path: Path) -> Path:
    manifest = {"name": "my-bundle", "task": "causal-lm", "format": "gguf", "weights": "model.gguf"}
    write_bundle(tmp_path / "b", files={"model.gguf": tiny_gguf, "LICENSE": "text"}, manifest=manifest)
    return tmp_path / "b"


def test_bundle(bundle: Path, tiny_gguf: Path) -> None:
    record, bare = inspect(bundle), inspect(tiny_gguf)
    assert (record["kind"], record["name"], record["verified"]) == ("bundle", "my-bundle", None)
    assert record["file_bytes"] == tiny_gguf.stat().st_size + 4
    assert record["tensors"] == bare["tensors"]
    assert inspect(bundle, verify=True)["verified"] is True
    assert inspect(tiny_gguf, verify=True)["verified"] is None, "a bare file has no hashes to verify"
    (bundle / "LICENSE").write_text("test")
    inspect(bundle)
    with pytest.raises(BundleError, match="LICENSE: sha256 differs"):
        inspect(bundle, verify=True)


@pytest.mark.workstation
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2", "phi3"])
def test_directory_and_its_export_say_the_same(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from tests.models import write_hf_model

    source = write_hf_model(tmp_path / "hf", family, layers=3)
    export_gguf.run(resolve(str(source)), QuantizeSpec(scheme="F16"), tmp_path / "model.gguf")
    hf, exported = inspect(source), inspect(tmp_path / "model.gguf")
    assert (hf["kind"], hf["name"], exported["kind"]) == ("hf", "hf", "gguf")
    for key in (
        "context_length",
        "hidden_size",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "tied_embeddings",
    ):
        assert hf[key] == exported[key], key
    for key in ("vocab_size", "bos", "eos", "chat_template"):
        assert hf["tokenizer"][key] == exported["tokenizer"][key], key
    for key in ("kv_cache_bytes", "compute_bytes"):
        assert hf["memory"][key] == exported["memory"][key], key
    embeddings = [next(t for t in record["tensors"] if "embd" in t["name"] or "embed_tokens" in t["name"])
                  for record in (hf, exported)]  # fmt: skip
    assert embeddings[0]["shape"] == embeddings[1]["shape"]


def write_directory(path: Path, arrays: dict[str, Any], **config: Any) -> Path:
    """A model directory by hand, without torch."""
    safetensors = pytest.importorskip("safetensors.numpy")
    path.mkdir()
    safetensors.save_file(arrays, path / "model.safetensors")
    base = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "vocab_size": 8, "max_position_embeddings": 512, "intermediate_size": 128}  # fmt: skip
    (path / "config.json").write_text(json.dumps(base | config))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    settings = {"chat_template": "{{ x }}", "bos_token": None, "eos_token": {"content": "</s>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


EMBEDDING = np.arange(512, dtype=np.float16).reshape(8, 64)
ARRAYS = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.layers.0.self_attn.q_proj.weight": np.zeros((64, 64), np.float16),
    "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float16),
    "model.norm.weight": np.zeros(64, np.float16),
}


def test_classifier_bundle(tmp_path: Path) -> None:
    """Facts out of the manifest, tensors out of the file: neither an engine nor the onnx package is asked."""
    bundle = onnx_models.write_classifier(tmp_path / "b", decision=None)
    record = inspect_model(bundle.path, context=64, verify=True)
    assert (record["kind"], record["architecture"], record["opset"]) == ("bundle", "hand", 17)
    assert record["labels"] == list(onnx_models.LABELS)
    assert record["parameters"] == 68 + 2
    assert record["weight_bytes"] == 4 * 68 + 2 * 8
    assert record["context_length"] == 6
    assert record["verified"] is True
    assert record["memory"] is None
    assert {kind["kind"]: kind["types"] for kind in record["kinds"]} == {
        "embedding": {"F32": 1}, "head": {"F32": 1}, "bias": {"F32": 1}, "one": {"I64": 1}, "two": {"I64": 1},
    }  # fmt: skip
    text = console.inspect_text(record)
    assert "classes          ham, spam, other" in text
    assert "reads            texts up to 6 tokens" in text
    assert "chat" not in text
    sensors = inspect_model(
        onnx_models.write_classifier(tmp_path / "s", "sensors").path, context=1, verify=False
    )
    assert "windows of 4 rows, 3 channels" in console.inspect_text(sensors)


def test_classifier_with_a_manifest_of_wrong_kinds(tmp_path: Path) -> None:
    bundle = onnx_models.write_classifier(
        tmp_path / "b", model={"labels": 7, "preprocessing": [1], "architecture": ["x"], "vocab_size": "many"}
    )
    record = inspect_model(bundle.path, context=64, verify=False)
    assert record["labels"] == []
    assert record["architecture"] is record["context_length"] is None
    assert "None" not in console.inspect_text(record)


def test_directory_without_torch(tmp_path: Path) -> None:
    record = inspect(write_directory(tmp_path / "m", ARRAYS))
    assert [kind["kind"] for kind in record["kinds"]] == [
        "model.embed_tokens",
        "self_attn.q_proj",
        "model.norm",
    ]
    assert record["kinds"][1]["tensors"] == 2
    assert record["kinds"][1]["types"] == {"F16": 2}
    assert (record["kv_heads"], record["head_dim"], record["bits_per_weight"]) == (4, 16, 16.0)
    assert record["tied_embeddings"] is True, "no head of its own, and config.json does not say"
    assert record["tokenizer"] == {
        "model": "BPE", "pre": None, "vocab_size": 8, "bos": None, "eos": "</s>", "chat_template": True,
    }  # fmt: skip
    assert record["file_bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_names_that_would_act_on_a_terminal(tmp_path: Path) -> None:
    record = inspect(write_directory(tmp_path / "m", {"model.layers.0.\x1b[2J.weight": EMBEDDING}))
    assert record["tensors"][0]["name"] == "model.layers.0.\ufffd[2J.weight"
    assert record["kinds"][0]["kind"] == "\ufffd[2J"


def test_nested_text_config(tmp_path: Path) -> None:
    nested = {"hidden_size": 32, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": False}
    record = inspect(write_directory(tmp_path / "m", ARRAYS, text_config=nested))
    assert (record["hidden_size"], record["kv_heads"], record["head_dim"]) == (32, 2, 24)
    assert (record["tied_embeddings"], record["heads"]) == (False, 4)


def test_other_sources_go_through_the_checkpoint(tiny_gguf: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copyfile(tiny_gguf, package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    record = inspect("pkg://some_package/tiny.gguf")
    assert (record["kind"], record["name"]) == ("gguf", "tiny")
    with pytest.raises(ModelError, match="nothing-here"):
        inspect("./nothing-here")


# ---------------------------------------------------------------------------------------------- traps


def test_no_traps_where_there_are_none(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "wide.gguf", hidden=256, intermediate=512, heads=4)
    assert traps(inspect(path)) == {}


def test_rows_of_unquantized_matrices(tiny_gguf: Path) -> None:
    text = traps(inspect(tiny_gguf))["rows"]
    assert text.startswith(
        "15 of 15 matrices have rows of 64, 128 values, which don't fill the blocks of 256"
    )
    assert "here they are" not in text


def test_rows_that_fill_no_block_at_all(tmp_path: Path) -> None:
    record = inspect(write_tiny_gguf(tmp_path / "ragged.gguf", hidden=72, intermediate=256, heads=4))
    assert traps(record)["rows"].startswith(
        "13 of 15 matrices have rows of 72 values, which fill no blocks of 32"
    )
    assert "they stay F16 (16 bits)" in traps(record)["rows"]


def test_fallbacks_are_those_of_the_plan() -> None:
    plan = pytest.importorskip("edgeslm.stages.plan")
    assert FALLBACKS.items() <= plan.FALLBACKS.items()
    assert all(GGML_TYPES[got].block_elements == 32 for got in FALLBACKS.values())


def test_duplicated_head_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "untied.gguf", tied=False)
    record = inspect(path)
    assert record["tied_embeddings"] is False
    assert "tied_head" not in traps(record)
    file = read_gguf(path)
    embedding, head = file.tensors["token_embd.weight"], file.tensors["output.weight"]
    content = bytearray(path.read_bytes())
    content[head.offset : head.offset + head.nbytes] = content[embedding.offset :][: embedding.nbytes]
    path.write_bytes(content)
    text = traps(inspect(path))["tied_head"]
    assert text == (
        "output.weight is a copy of token_embd.weight: 16,960 parameters and 67,840 bytes are there twice"
    )
    content[head.offset + head.nbytes - 1] ^= 1
    path.write_bytes(content)
    assert "tied_head" not in traps(inspect(path)), "one bit of difference makes it a head of its own"


@pytest.mark.parametrize("tie", [True, False])
def test_duplicated_head_of_a_directory(tie: bool, tmp_path: Path) -> None:
    copied = ARRAYS | {"lm_head.weight": EMBEDDING.copy()}
    record = inspect(write_directory(tmp_path / "copied", copied, tie_word_embeddings=tie))
    assert record["tied_embeddings"] is tie
    assert (
        "lm_head.weight is a copy of model.embed_tokens.weight: 512 parameters" in traps(record)["tied_head"]
    )
    own = ARRAYS | {"lm_head.weight": EMBEDDING + 1}
    assert "tied_head" not in traps(inspect(write_directory(tmp_path / "own", own)))


def test_missing_chat_template(tiny_gguf: Path, tmp_path: Path) -> None:
    path = edited(tiny_gguf, tmp_path / "m.gguf", tokenizer__chat_template=None)
    assert traps(inspect(path))["chat_template"].startswith("no chat template")
    directory = write_directory(tmp_path / "m", ARRAYS)
    (directory / "tokenizer_config.json").write_text("{}")
    assert "chat_template" in traps(inspect(directory))
    (directory / "chat_template.jinja").write_text("{{ x }}")
    assert "chat_template" not in traps(inspect(directory))


def test_tokenizer_pre(tiny_gguf: Path, tmp_path: Path) -> None:
    missing = edited(tiny_gguf, tmp_path / "a.gguf", tokenizer__ggml__pre=None)
    assert traps(inspect(missing))["tokenizer_pre"].startswith("no tokenizer.ggml.pre")
    unknown = edited(tiny_gguf, tmp_path / "b.gguf", tokenizer__ggml__pre="smollm7")
    assert traps(inspect(unknown))["tokenizer_pre"].startswith("tokenizer.ggml.pre is 'smollm7', which")
    pieces = edited(missing, tmp_path / "c.gguf", tokenizer__ggml__model="llama")
    assert "tokenizer_pre" not in traps(inspect(pieces)), "SentencePiece splits no text beforehand"


def test_known_names_are_in_the_library() -> None:
    """Each name of the table is a string of libllama, and the one that the test calls unknown is none."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    library = next((Path(spec.origin).parent / "lib").glob("libllama.*")).read_bytes()
    assert [name for name in sorted(PRE_TOKENIZERS) if name.encode() + b"\0" not in library] == []
    assert b"smollm7\0" not in library


def test_missing_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(container([field("general.architecture", "str", "llama")], []))
    assert traps(inspect(tmp_path / "m.gguf")).keys() == {"tokenizer"}
    directory = write_directory(tmp_path / "m", ARRAYS)
    (directory / "tokenizer.json").unlink()
    assert "neither tokenizer.json nor tokenizer.model" in traps(inspect(directory))["tokenizer"]


# ------------------------------------------------------------------------------------- bad input


def test_metadata_of_the_wrong_kinds(tmp_path: Path) -> None:
    """Whatever makes no sense is null, and text can't act on a terminal."""
    fields = [
        field("general.architecture", "str", "llama"), field("general.name", "str", "\x1b[2Jname\n" + "x" * 500),
        field("llama.block_count", "str", "many"), field("llama.embedding_length", "f32", 64.0),
        field("llama.attention.head_count", "u64", 2**63), array("llama.attention.head_count_kv", "str", ["2"]),
        field("llama.context_length", "bool", True), array("tokenizer.ggml.tokens", "str", ["a", "\x07"]),
        field("tokenizer.ggml.bos_token_id", "u32", 7), field("tokenizer.ggml.eos_token_id", "u32", 1),
        array("tokenizer.ggml.model", "u8", [1]), field("tokenizer.chat_template", "u8", 0),
    ]  # fmt: skip
    (tmp_path / "m.gguf").write_bytes(container(fields, [tensor("a.weight", (32, 2), 8, 0)], bytes(68)))
    record = inspect(tmp_path / "m.gguf")
    for key in (
        "context_length",
        "hidden_size",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "tied_embeddings",
    ):
        assert record[key] is None, key
    assert record["name"] == "\ufffd[2Jname\ufffd" + "x" * 191
    assert record["memory"] == {"context": 256, "weights_bytes": 68, "kv_cache_bytes": None,
                                "kv_type": "f16", "compute_bytes": None, "total_bytes": None}  # fmt: skip
    assert record["tokenizer"]["bos"] is None
    assert record["tokenizer"]["eos"] == "\ufffd"
    assert record["bits_per_weight"] == 8.5


def test_file_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(container([], []))
    record = inspect(tmp_path / "m.gguf")
    assert (record["architecture"], record["parameters"], record["bits_per_weight"]) == (None, 0, None)
    assert record["name"] == "m"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("[" * 10**5, "is not JSON"),
        ("\xff", "is not JSON"),
    ],
)
def test_bad_config(config: str, expected: str, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", ARRAYS)
    (directory / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ModelError, match=rf"config\.json {expected}"):
        inspect(directory)


@pytest.mark.parametrize("architectures", [None, [], "Llama", {"a": 1}, [7], 3])
def test_odd_config(architectures: Any, tmp_path: Path) -> None:
    odd = {"model_type": None, "architectures": architectures, "hidden_size": "64", "num_hidden_layers": -1}
    record = inspect(write_directory(tmp_path / "m", ARRAYS, **odd, text_config=[1]))
    assert record["layers"] is None
    assert record["hidden_size"] is None


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(EdgeslmError, match=r"has no manifest\.json"):
        inspect(tmp_path)
    (tmp_path / "text.gguf").write_text("just text")
    with pytest.raises(EdgeslmError, match="begins with"):
        inspect(tmp_path / "text.gguf")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match="is an adapter of org/base") as caught:
        inspect(tmp_path)
    assert caught.value.hint == "edgeslm inspect org/base"


def test_needs_neither_torch_nor_an_engine(tiny_gguf: Path, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", ARRAYS)
    code = (
        "import sys\nfrom edgeslm.inspection import inspect_model\n"
        "for source in sys.argv[1:]:\n    inspect_model(source, context=64, verify=True)\n"
        "print([n for n in ('torch', 'transformers', 'gguf', 'safetensors', 'llama_cpp') if n in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(tiny_gguf), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
