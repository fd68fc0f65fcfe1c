"""Model sources: what resolves, what is refused and with which way out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.bundle import write_bundle
from edgeslm.errors import ModelError
from edgeslm.progress import Quiet
from edgeslm.stages.checkpoint import package_path, resolve

if TYPE_CHECKING:
    from pathlib import Path


class Notes(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def write_safetensors(path: Path, **tensors: np.ndarray) -> None:
    """A safetensors file by its format's description: header length, JSON, bytes."""
    header, data = {}, b""
    for name, array in tensors.items():
        begin = len(data)
        data += array.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What a model directory looks like from outside; no model in it."""
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE").write_text("Apache-2.0")
    write_safetensors(path / "model.safetensors", weight=np.arange(6.0).reshape(2, 3))
    return path


def test_a_directory_resolves(directory: Path) -> None:
    checkpoint = resolve("my-model", base=directory.parent)
    assert (checkpoint.kind, checkpoint.name, checkpoint.source) == ("hf", "my-model", "my-model")
    assert checkpoint.config() == {"architectures": ["LlamaForCausalLM"]}
    assert checkpoint.parameters == 6
    assert [path.name for path in checkpoint.licence_files()] == ["LICENSE"]
    assert checkpoint.warnings == ()


def test_the_digest_is_of_contents(directory: Path) -> None:
    before = resolve(str(directory)).digest
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    (copy / "training_log.md").write_text("not part of the model")
    assert resolve(str(copy)).digest == before
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        changed = directory.with_name(f"changed-{name}")
        shutil.copytree(directory, changed)
        data = bytearray((changed / name).read_bytes())
        data[-1] ^= 1
        if name == "config.json":
            data = bytearray(b"{}")
        (changed / name).write_bytes(data)
        assert resolve(str(changed)).digest != before, name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nothing", "no model at"),
        ("/nowhere/at/all", "no model at"),
        ("name", "no model at"),
        ("pkg://no_such_package_here/model.gguf", "is not installed"),
        ("pkg://json/../../etc/passwd", "is not pkg://"),
        ("pkg://json//etc/passwd", "is not pkg://"),
        ("pkg://json/missing.gguf", "holds no missing.gguf"),
    ],
)
def test_a_missing_source_is_named(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(source, base=tmp_path)


def test_pickles_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safe_serialization"):
        resolve(str(directory))
    with pytest.raises(ModelError, match="safe_serialization"):
        resolve(str(directory / "pytorch_model.bin"))


def test_weights_alone_are_no_model(directory: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(str(directory / "model.safetensors"))
    assert str(directory) in caught.value.hint


def test_truncated_weights_are_refused_before_torch_sees_them(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        resolve(str(directory))


@pytest.mark.parametrize("text", ["", "[]", '{"a":', "[" * 100_000])
def test_a_broken_config_is_named(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(str(directory))


def test_a_directory_without_config_names_the_file_in_it(tmp_path: Path, tiny_gguf: Path) -> None:
    shutil.copy(tiny_gguf, tmp_path / "a.gguf")
    with pytest.raises(ModelError) as caught:
        resolve(str(tmp_path))
    assert str(tmp_path / "a.gguf") in caught.value.hint


def test_an_unquantized_gguf_file_has_no_warning(tiny_gguf: Path) -> None:
    notes = Notes()
    checkpoint = resolve(str(tiny_gguf), progress=notes)
    assert (checkpoint.kind, checkpoint.name, notes.lines) == ("gguf", "tiny", [])
    with pytest.raises(ModelError, match=r"no config\.json"):
        checkpoint.config()


def test_a_quantized_gguf_file_names_its_loss(smollm2_gguf: Path) -> None:
    notes = Notes()
    checkpoint = resolve(str(smollm2_gguf), progress=notes)
    assert len(notes.lines) == 1
    assert "already quantized to Q4_1" in notes.lines[0]
    assert checkpoint.parameters == 134_515_008


def test_a_truncated_gguf_file_is_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut off"):
        resolve(str(path))


def test_a_gguf_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "imatrix")
    writer.add_type("imatrix")
    writer.add_tensor("a.in_sum2", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="imatrix"):
        resolve(str(tmp_path / "x.gguf"))


def test_a_bundle_resolves_to_its_weights(tmp_path: Path, tiny_gguf: Path) -> None:
    manifest = {"name": "b", "task": "causal-lm", "format": "gguf", "weights": "model.gguf"}
    write_bundle(tmp_path / "b", files={"model.gguf": tiny_gguf}, manifest=manifest)
    assert resolve(str(tmp_path / "b")).path == tmp_path / "b" / "model.gguf"


def test_a_package_is_located_without_importing_it(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "models_of_mine"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(tiny_gguf, package / "files" / "a.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("pkg://models_of_mine/files/a.gguf").name == "a"
    assert package_path("pkg://models_of_mine/files").is_dir()
    assert "models_of_mine" not in sys.modules


def test_torch_stays_out_until_a_model_is_loaded() -> None:
    code = (
        "import sys, edgeslm.stages.checkpoint, edgeslm.stages.data, edgeslm.stages.calibrate, edgeslm.pipeline\n"
        "assert not {'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the hub: its cache on disk, offline ---


def offline(tmp_path: Path, source: str) -> subprocess.CompletedProcess[str]:
    """Resolve `source` in a process that has HF_HUB_OFFLINE set."""
    code = (
        "import sys\n"
        "from edgeslm.errors import ModelError\n"
        "from edgeslm.stages.checkpoint import resolve\n"
        "try:\n    checkpoint = resolve(sys.argv[1])\n"
        "except ModelError as error:\n    print('error', error)\n"
        "else:\n    print(checkpoint.name, checkpoint.path)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", code, source], env=environment, capture_output=True, text=True, check=True
    )


def cache(tmp_path: Path, source: Path, commit: str, revision: str) -> None:
    """Lay `source` out as the hub's cache keeps a snapshot."""
    root = tmp_path / "hub" / "models--org--small"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    shutil.copytree(source, root / "snapshots" / commit)


@pytest.mark.workstation
def test_a_hub_id_comes_from_the_cache_offline(tmp_path: Path, directory: Path) -> None:
    pytest.importorskip("huggingface_hub")
    cache(tmp_path, directory, "a" * 40, "main")
    cache(tmp_path, directory, "b" * 40, "v2")
    assert offline(tmp_path, "org/small").stdout.split()[0] == "small"
    assert "a" * 40 in offline(tmp_path, "org/small").stdout
    assert "b" * 40 in offline(tmp_path, "org/small@v2").stdout


@pytest.mark.workstation
def test_a_hub_without_the_model_has_a_way_out(tmp_path: Path, directory: Path) -> None:
    pytest.importorskip("huggingface_hub")
    answer = offline(tmp_path, "org/unheard-of").stdout
    assert answer.startswith("error")
    assert "go online once" in answer
    (directory / "model.safetensors").unlink()
    cache(tmp_path, directory, "a" * 40, "main")
    assert "no safetensors weights" in offline(tmp_path, "org/small").stdout


# --- with torch ---


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    return write_hf_model(tmp_path_factory.mktemp("hf") / "tiny-llama", "llama", dtype="bfloat16")


@pytest.mark.workstation
def test_a_model_loads_in_float32(tiny_llama: Path) -> None:
    import torch

    checkpoint = resolve(str(tiny_llama))
    model = checkpoint.load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == checkpoint.parameters
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("hello there")).endswith("hello there")


@pytest.mark.workstation
def test_a_model_larger_than_memory_is_refused_with_numbers(tiny_llama: Path) -> None:
    checkpoint = resolve(str(tiny_llama))
    with pytest.raises(ModelError, match=r"need 0\.\d GiB, 0\.0 GiB are free"):
        checkpoint.load(memory_bytes=checkpoint.parameters * 4 - 1)


@pytest.mark.workstation
@pytest.mark.parametrize("name", ["tokenizer.json"])
def test_a_missing_tokenizer_has_a_way_out(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "m")
    (copy / name).unlink()
    with pytest.raises(ModelError, match=r"put tokenizer\.json"):
        resolve(str(copy)).tokenizer()


@pytest.mark.workstation
def test_an_unknown_model_type_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "never-heard-of"}))
    with pytest.raises(ModelError, match="can't load"):
        resolve(str(copy)).load()


@pytest.mark.workstation
def test_missing_weights_are_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"9 weights are missing, first model\.layers\.2"):
        resolve(str(copy)).load()


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with random weights, its base named by a relative path."""
    pytest.importorskip("peft")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    stored = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(stored.read_text())
    stored.write_text(json.dumps({**settings, "base_model_name_or_path": "../base"}))
    return tmp_path / "adapter"


@pytest.mark.workstation
def test_an_adapter_is_merged_into_its_base(adapter: Path, tmp_path: Path) -> None:
    from edgeslm.safetensors_file import load, read_checkpoint, read_safetensors, to_float32

    checkpoint = resolve(str(adapter), work=tmp_path / "work")
    assert (checkpoint.kind, checkpoint.name) == ("hf", "adapter")
    merged = read_checkpoint(checkpoint.path)
    base = read_checkpoint(tmp_path / "base")
    low_rank = read_safetensors(adapter / "adapter_model.safetensors")
    assert set(merged) == set(base)
    for name, tensor in base.items():
        wanted = np.array(to_float32(tensor))
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in low_rank:
            a, b = (load(low_rank[f"{stem}.lora_{side}.weight"]) for side in "AB")
            wanted += 16 / 4 * (b @ a)
        np.testing.assert_allclose(to_float32(merged[name]), wanted, atol=1e-5)
    assert checkpoint.tokenizer().encode("hello") == resolve(str(tmp_path / "base")).tokenizer().encode(
        "hello"
    )
    again = resolve(str(adapter), work=tmp_path / "work")
    assert again.path == checkpoint.path
    assert len(list((tmp_path / "work").iterdir())) == 1


@pytest.mark.workstation
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pickle", "no adapter_model.safetensors"),
        ("itself", "names itself"),
        ("nothing", "base_model_name_or_path"),
        ("missing", "no model at"),
    ],
)
def test_a_broken_adapter_is_refused(adapter: Path, tmp_path: Path, change: str, message: str) -> None:
    if change == "pickle":
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    names = {"itself": ".", "nothing": None, "missing": "./gone"}
    if change in names:
        stored = adapter / "adapter_config.json"
        settings = json.loads(stored.read_text())
        stored.write_text(json.dumps({**settings, "base_model_name_or_path": names[change]}))
    with pytest.raises(ModelError, match=message):
        resolve(str(adapter), work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
