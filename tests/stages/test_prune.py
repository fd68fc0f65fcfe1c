"""Pruning from a checkpoint to a directory, and on to llama.cpp: what is written is what was promised."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, ModelError, RecipeError
from edgeslm.specs import PruneSpec, QuantizeSpec
from edgeslm.stages import export_gguf, prune, vocabulary
from edgeslm.stages.checkpoint import Checkpoint, resolve
from edgeslm.stages.data import Document
from edgeslm.stages.proof import prove_export, tiny_config
from edgeslm.stages.vocabulary import kept_tokens
from tests.conftest import write_tiny_gguf
from tests.models import CORPUS, FAMILIES, HOSTILE_TEXTS, write_hf_model
from tests.stages.test_vocabulary import chat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.workstation

TEXT = "\n".join(CORPUS.splitlines()[1:7])
FOURTH = {"no_rope_layer_interval": 4}
EVERYTHING: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {"kv_heads": 1, "hidden_size": 32}),
    ("mistral", {}, {"kv_heads": 1}),
    ("smollm3", {"layers": 8, **FOURTH}, {"drop_layers": 3, "kv_heads": 1}),
    ("qwen2", {}, {}),
    ("qwen3", {}, {"kv_heads": 1, "hidden_size": 32}),
    ("gemma2", {}, {"hidden_size": 32}),
    ("gemma3_text", {"layers": 7, "sliding_window_pattern": 3}, {"kv_heads": 1, "hidden_size": 32}),
    ("phi3", {}, {"kv_heads": 1, "hidden_size": 32}),
    ("granite", {}, {}),
    ("olmo2", {}, {"kv_heads": 1, "hidden_size": 32}),
]


@pytest.fixture(autouse=True)
def only_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights expect every token alike, so that all would stay."""
    monkeypatch.setattr(vocabulary, "kept_ids", partial(vocabulary.kept_ids, unexpected=1.0))


def documents() -> Iterator[Document]:
    yield Document(text=TEXT)
    yield Document(text=TEXT[::-1])


def run(source: Path, out: Path, **spec: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """(the pruned checkpoint, its record)."""
    result = prune.run(
        resolve(str(source)), PruneSpec(**spec), out, documents=documents, chat=chat, context=32, tokens=256
    )
    return result, json.loads((out / "prune.json").read_text(encoding="utf-8"))


def runner(path: Path) -> Any:
    from edgeslm.runtime.llama import LlamaRunner
    from edgeslm.runtime.runner import RunnerOptions

    return LlamaRunner(path, RunnerOptions(context=256, threads=2, kv_type="f32", flash_attention=False))


def torch_logits(path: Path, ids: list[int]) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        values: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return values


def test_the_families_are_all_there() -> None:
    assert {family for family, _, _ in EVERYTHING} == set(FAMILIES)


@pytest.mark.parametrize(("family", "settings", "spec"), EVERYTHING, ids=[case[0] for case in EVERYTHING])
def test_everything_at_once_runs_in_llama_cpp_as_in_torch(
    family: str, settings: dict[str, Any], spec: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    source = write_hf_model(tmp_path / "model", family, **({"layers": 5} | settings))
    out = tmp_path / "pruned"
    wanted = {"drop_layers": 2, "mlp_width": 100, "vocabulary": True} | spec
    result, record = run(source, out, **wanted)
    config = result.config()
    layers = settings.get("layers", 5) - wanted["drop_layers"]
    assert record["widths"]["after"] == {
        "layers": layers, "mlp": 96, "kv_heads": spec.get("kv_heads", 2), "hidden": spec.get("hidden_size", 64),
    }  # fmt: skip
    assert any("mlp_width: 100 rounded down to 96" in note for note in record["notes"])
    assert len(record["dropped_layers"]) == wanted["drop_layers"]
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (layers, 96)
    assert record["tokens"]["after"] == config["vocab_size"] < record["tokens"]["before"]
    kept = kept_tokens(out)
    assert kept is not None
    assert len(kept) == config["vocab_size"]
    assert record["parameters"]["after"] == result.parameters < 0.7 * record["parameters"]["before"]

    export_gguf.run(result, QuantizeSpec(scheme="F32"), tmp_path / "model.gguf")
    engine = runner(tmp_path / "model.gguf")
    ids = np.random.default_rng(0).integers(3, config["vocab_size"], 100).tolist()
    logits = torch_logits(out, ids)
    tolerance = 1e-3 if "gemma" in family else 1e-5
    np.testing.assert_allclose(engine.logits(ids), logits, atol=tolerance * np.abs(logits).max(), rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    before = transformers.AutoTokenizer.from_pretrained(source)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(TEXT)) == before.convert_ids_to_tokens(
        before.encode(TEXT)
    )
    for index, text in enumerate((*HOSTILE_TEXTS, TEXT)):
        if (family.startswith("qwen") and index == 8) or (family == "phi3" and index == 11):
            # llama.cpp does not compose characters (NFC); it strips after Phi-3's special tokens by the model's name.
            continue
        assert engine.tokenize(text, add_special=True, parse_special=True) == tokenizer.encode(text), text
    engine.close()


def test_the_least_influential_layers_are_dropped(tmp_path: Path) -> None:
    import torch
    import transformers

    source = write_hf_model(tmp_path / "model", "llama", layers=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for layer in (1, 3):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(source)
    result, record = run(source, tmp_path / "cosine", drop_layers=2)
    assert record["dropped_layers"] == [1, 3]
    assert record["layers_by"] == "cosine"
    ids = list(range(40))
    np.testing.assert_allclose(torch_logits(result.path, ids), torch_logits(source, ids), atol=0.1)
    _, by_loss = run(source, tmp_path / "perplexity", drop_layers=2, layers_by="perplexity")
    assert by_loss["dropped_layers"] == sorted(
        np.argsort(by_loss["influence"])[:2].tolist()
    )  # all that are tried
    assert max(abs(by_loss["influence"][layer]) for layer in (1, 3)) < 1e-2
    # Settings and tokenizer files that no cut concerns are the parent's.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (result.path / name).read_bytes() == (source / name).read_bytes()
    note = json.loads((result.path / "edgeslm.json").read_text(encoding="utf-8"))
    assert note["stage"] == "prune"
    assert note["parent"]["digest"] == resolve(str(source)).digest


def test_tokens_alone(tmp_path: Path) -> None:
    """Rows of the embedding are the kept ones, ids of the configuration follow, nothing else changes."""
    source = write_hf_model(tmp_path / "model", "qwen2", tied=False)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [642, 640], "bos_token_id": 640, "do_sample": True, "temperature": 0.6}),
        encoding="utf-8",
    )
    before = resolve(str(source))
    numbers = [before.tokenizer().convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    stored = {"eos_token_id": numbers, "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(stored), encoding="utf-8")
    result, record = run(source, tmp_path / "pruned", vocabulary=True)
    assert record["dropped_layers"] == []
    assert record["influence"] is None
    kept = kept_tokens(result.path)
    assert kept is not None
    ids = np.random.default_rng(0).integers(0, len(kept), 50)
    wanted = torch_logits(source, kept[ids].tolist())[:, kept]
    np.testing.assert_allclose(torch_logits(result.path, ids.tolist()), wanted, atol=1e-5)
    generation = json.loads((result.path / "generation_config.json").read_text(encoding="utf-8"))
    assert kept[generation["eos_token_id"]].tolist() == numbers
    assert generation["temperature"] == 0.6
    config, whole = result.config(), before.config()
    assert kept[config["eos_token_id"]] == whole["eos_token_id"]
    same = {key for key in whole if not key.endswith("_token_id")} - {"vocab_size", "transformers_version"}
    assert {key: config[key] for key in same} == {key: whole[key] for key in same}


def test_rows_that_only_pad_the_embedding_go(tmp_path: Path) -> None:
    import torch
    import transformers

    source = write_hf_model(tmp_path / "model", "qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 100, mean_resizing=False)
    model.save_pretrained(source)
    _, record = run(source, tmp_path / "pruned", vocabulary=True)
    assert record["tokens"]["before"] == size + 100
    assert record["tokens"]["after"] < size
    kept = kept_tokens(tmp_path / "pruned")
    assert kept is not None
    assert kept.max() < size


def test_a_gguf_file_as_source(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "model.gguf", layers=4)
    result, record = run(source, tmp_path / "pruned", drop_layers=1, mlp_width=64, vocabulary=True)
    assert record["tokens"]["after"] < record["tokens"]["before"] or record["tokens"]["before"] == 265
    export_gguf.run(result, QuantizeSpec(scheme="F32"), tmp_path / "pruned.gguf")
    engine, before = runner(tmp_path / "pruned.gguf"), runner(source)
    ids = engine.tokenize(TEXT, add_special=True, parse_special=False)
    logits = torch_logits(result.path, ids[:100])
    np.testing.assert_allclose(engine.logits(ids[:100]), logits, atol=1e-5 * np.abs(logits).max(), rtol=0)
    kept = kept_tokens(result.path)
    assert kept is not None
    assert kept[ids].tolist() == before.tokenize(TEXT, add_special=True, parse_special=False)
    engine.close()
    before.close()


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama", layers=3)
    digests = {
        run(source, tmp_path / name, drop_layers=1, mlp_width=64, vocabulary=True)[0].digest
        for name in ("one", "other")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_target_is_met(share: float, tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama", layers=6, intermediate=512)
    before = resolve(str(source)).parameters
    result, record = run(source, tmp_path / "share", target=share)
    assert 0.85 * share * before < result.parameters <= share * before
    assert record["parameters"] == {"before": before, "after": result.parameters}
    assert any(note.startswith("target: ") and f"{result.parameters:,}" in note for note in record["notes"])
    assert result.config()["intermediate_size"] % 32 == 0
    # The same as a number of parameters, with the layers given.
    result, record = run(source, tmp_path / "number", target=int(share * before), drop_layers=1)
    assert result.config()["num_hidden_layers"] == 5
    assert result.parameters <= share * before


@pytest.mark.parametrize("scheme", ["F16", "Q4_K_M"])
def test_a_target_in_bytes_is_the_exported_files(scheme: str, tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama", hidden=256, layers=6, intermediate=1024)
    whole = export_gguf.run(resolve(str(source)), QuantizeSpec(scheme=scheme), tmp_path / "whole.gguf")
    limit = int(0.8 * whole.path.stat().st_size)
    spec = PruneSpec(target_bytes=limit, multiple=32)
    result = prune.run(
        resolve(str(source)), spec, tmp_path / "out", documents=documents, chat=chat, context=32, tokens=256,
        artifacts=(QuantizeSpec(scheme="Q2_K"), QuantizeSpec(scheme=scheme)),
    )  # fmt: skip
    made = export_gguf.run(result, QuantizeSpec(scheme=scheme), tmp_path / "made.gguf")
    assert 0.8 * limit < made.path.stat().st_size <= limit
    record = json.loads((tmp_path / "out" / "prune.json").read_text(encoding="utf-8"))
    assert any(note.startswith("target: ") and " bytes" in note for note in record["notes"])


def test_shares_are_of_the_model_before_its_vocabulary_was_pruned(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama", layers=6, intermediate=512)
    before = resolve(str(source)).parameters
    _, record = run(source, tmp_path / "words", vocabulary=True)
    assert record["parameters"]["after"] > 0.75 * before
    result = prune.run(
        resolve(str(tmp_path / "words")), PruneSpec(target=0.75), tmp_path / "out", documents=documents, chat=chat,
        context=32, tokens=256, tokens_before=record["tokens"]["before"],
    )  # fmt: skip
    assert 0.85 * 0.75 * before < result.parameters <= 0.75 * before
    # What the vocabulary's pruning alone has reached is no error.
    enough = prune.run(
        resolve(str(tmp_path / "words")), PruneSpec(target=record["parameters"]["after"] + 1), tmp_path / "same",
        documents=documents, chat=chat, context=32, tokens=256, tokens_before=record["tokens"]["before"],
    )  # fmt: skip
    assert enough.parameters == record["parameters"]["after"]


def test_a_target_of_a_family_with_a_pattern(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "smollm3", layers=8, intermediate=64, **FOURTH)
    result, _ = run(source, tmp_path / "pruned", target=0.75)
    kept = result.config()["no_rope_layers"]
    assert kept == [int((layer + 1) % 4 != 0) for layer in range(len(kept))]


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama", layers=4)
    before = resolve(str(source)).parameters
    with pytest.raises(RecipeError, match="the model has"):
        run(source, tmp_path / "out", target=float(before))
    with pytest.raises(RecipeError, match="can't be reached"):
        run(source, tmp_path / "out", target=0.05)
    with pytest.raises(RecipeError, match=r"target_bytes = 10,000,000 bytes, the model has [\d,]+"):
        run(source, tmp_path / "out", target_bytes=10_000_000)
    for spec in (PruneSpec(target=float(before)), PruneSpec(target=0.05), PruneSpec(target_bytes=1000)):
        with pytest.raises(RecipeError, match="target"):
            prune.prove(resolve(str(source)), spec)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({}, RecipeError, "asks for nothing"),
        ({"drop_layers": 3}, RecipeError, "drop_layers = 3 of 3 layers"),
        ({"mlp_width": 4096}, RecipeError, "mlp_width = 4096 is more than the model's 128"),
        ({"hidden_size": 65}, RecipeError, "hidden_size = 65 is more than the model's 64"),
        ({"kv_heads": 3}, RecipeError, "kv_heads = 3 is more than the model's 2"),
        ({"kv_heads": 1}, ModelError, "hidden_size of heads"),
        ({"hidden_size": 32}, ModelError, "hidden_size of heads"),
    ],
)
def test_settings_that_do_not_fit(
    spec: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    source = write_hf_model(tmp_path / "model", "qwen2", layers=3)
    with pytest.raises(error, match=message):
        run(source, tmp_path / "out", **spec)
    with pytest.raises(error, match=message):
        prune.prove(resolve(str(source)), PruneSpec(**spec))


def test_too_little_text(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama")
    with pytest.raises(DataError, match="one window takes 64"):
        prune.run(
            resolve(str(source)), PruneSpec(drop_layers=1), tmp_path / "out",
            documents=lambda: iter([Document(text="short")]), chat=chat, context=64, tokens=256,
        )  # fmt: skip


# --- the proof ---


def test_the_proof_passes_for_what_can_be_exported(tmp_path: Path) -> None:
    source = resolve(str(write_hf_model(tmp_path / "model", "gemma2", layers=5)))
    prune.prove(source, PruneSpec(drop_layers=2, mlp_width=64, kv_heads=1))
    gguf = resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    prune.prove(gguf, PruneSpec(drop_layers=1))


def test_the_proof_finds_a_pattern_that_llama_cpp_has_not(tmp_path: Path) -> None:
    source = resolve(str(write_hf_model(tmp_path / "model", "smollm3", layers=8, **FOURTH)))
    config = prune.read_config(source)
    broken = config | {"no_rope_layers": [1, 1, 0, 1, 1, 1, 0], "num_hidden_layers": 7}
    broken["layer_types"] = ["full_attention"] * 7
    with pytest.raises(ModelError, match="every fourth layer"):
        prove_export(broken, source)
    odd = resolve(str(write_hf_model(tmp_path / "odd", "smollm3", layers=4, no_rope_layer_interval=3)))
    with pytest.raises(ModelError, match="every fourth layer"):
        prune.prove(odd, PruneSpec(drop_layers=1))


def test_the_proof_finds_what_llama_cpp_computes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that forgets which layers slide: only the logits show it."""
    from edgeslm.stages import architectures

    source = resolve(
        str(write_hf_model(tmp_path / "model", "gemma3_text", layers=8, sliding_window_pattern=3))
    )
    config = prune.read_config(source)
    prove_export(config, source)
    monkeypatch.setattr(architectures, "_add_window_pattern", lambda *_args, **_options: None)
    with pytest.raises(ModelError, match="computes something else than torch"):
        prove_export(config, source)


def test_the_proof_finds_what_llama_cpp_does_not_load(tmp_path: Path) -> None:
    source = resolve(str(write_hf_model(tmp_path / "model", "qwen2")))
    config = prune.read_config(source) | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    with pytest.raises(ModelError, match="does not take a model of this shape"):
        prove_export(config, source)


def test_tiny_copies_keep_the_structure() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_attention_heads": 9, "head_dim": 64,
        "num_key_value_heads": 3, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
    }  # fmt: skip
    tiny = tiny_config(config)
    assert (tiny["hidden_size"], tiny["head_dim"], tiny["intermediate_size"]) == (72, 8, 64)
    assert all(
        tiny[key] == config[key] for key in set(config) - {"hidden_size", "head_dim", "intermediate_size"}
    )
    phi3 = {
        **config, "architectures": ["Phi3ForCausalLM"], "hidden_size": 288, "head_dim": None,
        "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
    }  # fmt: skip
    tiny = tiny_config(phi3)
    assert (tiny["hidden_size"], tiny["head_dim"]) == (72, None)
    assert len(tiny["rope_scaling"]["long_factor"]) == 4


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    import torch
    import transformers

    text = resolve(str(write_hf_model(tmp_path / "text", "gemma3_text", layers=3)))
    tokenizer = text.tokenizer()
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=prune.read_config(text), vision_config=vision, mm_tokens_per_image=1
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result, record = run(tmp_path / "model", tmp_path / "out", drop_layers=1)
    assert result.config()["architectures"] == ["Gemma3ForCausalLM"]
    assert result.parameters == record["parameters"]["after"]
    kept = [layer for layer in range(3) if layer not in record["dropped_layers"]]
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(decoder.layers[layer] for layer in kept)
    with torch.inference_mode():
        wanted = model(torch.arange(5, 60)[None]).logits[0].numpy()
    np.testing.assert_allclose(torch_logits(result.path, list(range(5, 60))), wanted, atol=1e-4)


def test_architectures_that_are_not_supported(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_hf_model(tmp_path / "model", "llama", tokenizer="gpt2")
    for file in (tmp_path / "model").glob("*token*"):
        (tmp_path / "gpt2" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="architecture GPT2LMHeadModel is not supported"):
        run(tmp_path / "gpt2", tmp_path / "out", drop_layers=1)
