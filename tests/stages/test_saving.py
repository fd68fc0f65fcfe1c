"""Saved models: what from_pretrained, the exporters and llama.cpp make of them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import EdgeslmError, ModelError
from edgeslm.specs import FinetuneSpec, PruneSpec, QuantizeSpec
from edgeslm.stages.checkpoint import Checkpoint, resolve

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def save(parent: Checkpoint, out: Path, **options: Any) -> Checkpoint:
    from edgeslm.stages.saving import save_model

    arguments = {"parent": parent, "stage": "finetune", "spec": FinetuneSpec(), **options}
    return save_model(parent.load(), None, out, **arguments)


def logits(checkpoint: Checkpoint) -> Any:
    import torch

    tokens = torch.randint(0, 250, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return checkpoint.load()(input_ids=tokens).logits


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    path = write_hf_model(tmp_path / "tiny", "llama", tokenizer="smollm")
    (path / "LICENSE").write_text("Apache-2.0")
    return path


def test_a_directory_keeps_its_tokenizer_and_licence_to_the_byte(tiny: Path, tmp_path: Path) -> None:
    import torch

    parent = resolve(str(tiny))
    saved = save(parent, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE"):
        assert (saved.path / name).read_bytes() == (tiny / name).read_bytes(), name
    torch.testing.assert_close(logits(resolve(str(saved.path))), logits(parent), rtol=0, atol=0)


def test_the_note_tells_the_whole_line(tiny: Path, tmp_path: Path) -> None:
    from edgeslm.stages.saving import ancestry, save_model

    parent = resolve(str(tiny))
    first = save(parent, tmp_path / "first")
    spec = PruneSpec(drop_layers=1)
    second = save_model(
        first.load(), None, tmp_path / "second", parent=first, stage="prune", spec=spec, notes={"kind": "x"}
    )
    told = ancestry(second.path)
    assert (told["schema"], told["stage"], told["kind"]) == ("edgeslm.ancestry/1", "prune", "x")
    assert told["spec"]["drop_layers"] == 1
    assert told["parent"] == {"name": "first", "digest": first.digest, "licence": None}
    assert told["before"]["stage"] == "finetune"
    assert told["before"]["parent"]["digest"] == parent.digest
    assert told["before"]["before"] is None
    assert ancestry(tiny) == {}


def test_a_changed_tokenizer_is_written(tiny: Path, tmp_path: Path) -> None:
    from edgeslm.stages.saving import save_model

    parent = resolve(str(tiny))
    tokenizer = parent.tokenizer()
    tokenizer.add_tokens(["xyzzy"])
    model = parent.load()
    model.resize_token_embeddings(len(tokenizer))
    saved = save_model(model, tokenizer, tmp_path / "out", parent=parent, stage="prune", spec={})
    assert saved.tokenizer().tokenize("xyzzy") == ["xyzzy"]


def test_generation_settings_that_contradict_each_other_are_saved(tiny: Path, tmp_path: Path) -> None:
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (tiny / "generation_config.json").write_text(json.dumps(settings))
    saved = save(resolve(str(tiny)), tmp_path / "out")
    assert json.loads((saved.path / "generation_config.json").read_text())["temperature"] == 0.6


STYLES = {
    "llama3": "llama", "smollm": "llama", "gpt2": "llama", "smollm3": "smollm3", "qwen2": "qwen2",
    "granite": "granite", "olmo2": "olmo2", "mistral": "mistral", "phi3": "phi3", "gemma": "gemma2",
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_a_gguf_file_becomes_a_directory_that_exports_to_the_same(tmp_path: Path, style: str) -> None:
    """llama.cpp's tokens of the new file are those of the old one, on texts made to break tokenizers."""
    import torch

    pytest.importorskip("llama_cpp")
    from llama_cpp import Llama

    from edgeslm.stages import export_gguf
    from tests.models import CORPUS, HOSTILE_TEXTS, write_hf_model

    source = write_hf_model(tmp_path / style, STYLES[style], tokenizer=style)
    spec = QuantizeSpec(scheme="F32", keep_going=True)
    parent = resolve(str(export_gguf.run(resolve(str(source)), spec, tmp_path / f"tiny-{style}.gguf").path))
    saved = save(parent, tmp_path / "out" / f"tiny-{style}")
    torch.testing.assert_close(logits(saved), logits(parent), rtol=0, atol=0)
    again = export_gguf.run(saved, spec, tmp_path / "again.gguf").path
    old, new = (Llama(str(path), vocab_only=True, verbose=False) for path in (parent.path, again))
    tokenizer = saved.tokenizer()
    assert tokenizer.chat_template == resolve(str(source)).tokenizer().chat_template
    for text in (*HOSTILE_TEXTS, CORPUS):
        wanted = old.tokenize(text.encode(), add_bos=True, special=True)
        assert new.tokenize(text.encode(), add_bos=True, special=True) == wanted, text
        assert tokenizer.encode(text) == wanted, text


@pytest.mark.slow
def test_the_real_gguf_file_becomes_a_directory_with_its_tokens(smollm2_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from pydoc_data.topics import topics

    from llama_cpp import Llama

    from edgeslm.stages import export_gguf
    from tests.models import CORPUS, HOSTILE_TEXTS

    saved = save(resolve(str(smollm2_gguf)), tmp_path / "out")
    again = export_gguf.run(saved, QuantizeSpec(scheme="Q8_0"), tmp_path / "again.gguf").path
    old, new = (Llama(str(path), vocab_only=True, verbose=False) for path in (smollm2_gguf, again))
    tokenizer = saved.tokenizer()
    assert tokenizer.chat_template == old.metadata["tokenizer.chat_template"]
    for text in (*HOSTILE_TEXTS, CORPUS, *list(topics.values())[::10]):
        wanted = old.tokenize(text.encode(), add_bos=True, special=True)
        assert new.tokenize(text.encode(), add_bos=True, special=True) == wanted
        assert tokenizer.encode(text) == wanted


def test_llama_3s_rotary_scaling_survives_the_way_through_gguf(tmp_path: Path) -> None:
    import torch

    pytest.importorskip("llama_cpp")
    from edgeslm.stages import export_gguf
    from tests.models import write_hf_model

    source = resolve(str(write_hf_model(tmp_path / "m", "llama", rope_scaling=LLAMA3)))
    parent = resolve(str(export_gguf.run(source, QuantizeSpec(scheme="F32"), tmp_path / "m.gguf").path))
    saved = save(parent, tmp_path / "out")
    torch.testing.assert_close(logits(saved), logits(source), rtol=1e-4, atol=2e-4)
    scaling = saved.config()["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    unlike = save_with_factors(parent, tmp_path / "odd")
    assert isinstance(unlike, ModelError)


def save_with_factors(parent: Checkpoint, out: Path) -> BaseException | None:
    """What saving a model with rotary factors of no known kind raises."""
    from edgeslm.stages.saving import save_model

    model = parent.load()
    model.model.rotary_emb.inv_freq[2] *= 3
    try:
        save_model(model, None, out, parent=parent, stage="finetune", spec=FinetuneSpec())
    except ModelError as error:
        return error
    return None


def test_special_tokens_come_from_the_gguf_file(tiny_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    saved = save(resolve(str(tiny_gguf)), tmp_path / "out")
    config = saved.config()
    assert (config["bos_token_id"], config["eos_token_id"], config.get("pad_token_id")) == (1, 2, None)
    assert (saved.path / "tokenizer.json").is_file()


def test_a_full_disk_is_one_clear_error(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    parent = resolve(str(tiny))
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(EdgeslmError, match="No space left"):
        save(parent, tmp_path / "out")
