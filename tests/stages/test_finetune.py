"""Fine-tuning: losses against brute force, adapters before and after merging, what is written and how it runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeslm.errors import ModelError, RecipeError
from edgeslm.progress import Quiet
from edgeslm.specs import FinetuneSpec, QuantizeSpec, TrainSpec
from edgeslm.stages.checkpoint import Checkpoint, resolve
from tests.encoders import TOPICS, examples, write_encoder

pytestmark = pytest.mark.workstation

LABELS = tuple(TOPICS)
SPEC = FinetuneSpec(train=TrainSpec(epochs=2, batch_size=2, learning_rate=3e-3, context=32))
TEXT = "The bread of the sea is baked in an oven of waves, and the moon sails over the harbour. " * 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    path = write_hf_model(tmp_path_factory.mktemp("llama") / "tiny-llama", "llama", tokenizer="smollm")
    (path / "LICENSE").write_text("Apache-2.0")
    return resolve(str(path))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("transformers")
    return resolve(str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert")))


def blocks(checkpoint: Checkpoint, out: Path, text: str = TEXT) -> Any:
    from edgeslm.stages.data import Document
    from edgeslm.stages.packing import pack

    return pack([Document(text=text)], checkpoint.tokenizer(), 32, out)


def build(checkpoint: Checkpoint, tmp_path: Path, spec: FinetuneSpec = SPEC, name: str = "out") -> Checkpoint:
    from edgeslm.stages import finetune

    train, heldout = (
        blocks(checkpoint, tmp_path / f"{name}-t"),
        blocks(checkpoint, tmp_path / f"{name}-h", TEXT[:600]),
    )
    return finetune.run(
        checkpoint, spec, tmp_path / name, train=train, heldout=heldout, work=tmp_path / f"{name}-w", seed=0
    )


def record(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint.path / "training.json").read_text())
    return found


def losses(checkpoint: Checkpoint) -> list[float]:
    return [point["loss"] for point in record(checkpoint)["curve"]]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None]).logits


# --- losses ---


def test_the_causal_loss_is_brute_force(llama: Checkpoint, tmp_path: Path) -> None:
    """The reference: float64 log-softmax position by position, only where the next label counts."""
    import torch

    from edgeslm.stages.finetune import causal_counted, causal_loss

    model = llama.load()
    random = np.random.default_rng(0)
    ids = random.integers(3, 500, (2, 12))
    labels = np.where(random.random((2, 12)) < 0.5, ids, -100)
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"]).logits.double().numpy()
        found = float(causal_loss(model, batch))
    wanted, counted = 0.0, 0
    for row in range(2):
        for position in range(11):
            label = labels[row, position + 1]
            if label != -100:
                here = scores[row, position]
                wanted -= here[label] - np.log(np.exp(here - here.max()).sum()) - here.max()
                counted += 1
    assert found == pytest.approx(wanted, rel=1e-5)
    assert causal_counted(batch) == counted


def test_perplexity_is_over_all_counted_tokens(llama: Checkpoint, tmp_path: Path) -> None:
    import torch

    from edgeslm.stages.finetune import causal_counted, causal_loss, causal_perplexity
    from edgeslm.stages.packing import collate_blocks

    model, data = llama.load(), blocks(llama, tmp_path / "x", TEXT[:500])
    batch = collate_blocks([data[index] for index in range(len(data))])
    with torch.no_grad():
        wanted = math.exp(float(causal_loss(model, batch)) / causal_counted(batch))
    assert causal_perplexity(model, data) == pytest.approx(wanted, rel=1e-5)


def test_the_classification_loss_is_the_sum_of_minus_log_probabilities(
    encoder: Checkpoint, tmp_path: Path
) -> None:
    import torch

    from edgeslm.stages.classifier import classification_loss, log_probabilities, new_classifier
    from edgeslm.stages.labelled import collate_texts

    data, collate = examples(tmp_path / "x", encoder.tokenizer(), 9), collate_texts(0)
    model, _ = new_classifier(encoder, LABELS, seed=1)
    with torch.no_grad():
        found = classification_loss(model, collate([data[index] for index in range(9)]))
    scores = log_probabilities(model, data, collate)
    assert float(found) == pytest.approx(-scores[np.arange(9), data.labels].sum(), rel=1e-5)


# --- language models ---


def test_full_fine_tuning_learns_and_writes_an_ordinary_directory(llama: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages.finetune import causal_perplexity
    from edgeslm.stages.packing import TokenBlocks

    made = build(llama, tmp_path)
    told = record(made)
    assert told["heldout"]["perplexity"] < 0.5 * told["heldout"]["perplexity_before"]
    heldout = TokenBlocks.open(tmp_path / "out-h")
    assert causal_perplexity(made.load(), heldout) == pytest.approx(told["heldout"]["perplexity"], rel=1e-4)
    assert causal_perplexity(llama.load(), heldout) == pytest.approx(
        told["heldout"]["perplexity_before"], rel=1e-4
    )
    assert told["trained_parameters"] == llama.parameters == made.parameters
    assert (made.path / "tokenizer.json").read_bytes() == (llama.path / "tokenizer.json").read_bytes()
    assert (made.path / "LICENSE").read_text() == "Apache-2.0"
    note = json.loads((made.path / "edgeslm.json").read_text())
    assert note["parent"]["digest"] == llama.digest
    assert note["spec"]["train"]["learning_rate"] == 3e-3
    assert not (made.path / "adapter").exists()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_merged_is_the_adapter_on_its_base(llama: Checkpoint, tmp_path: Path, method: str) -> None:
    """The reference: peft loads OUT/adapter on the untouched base and runs it unmerged."""
    import torch
    from peft import PeftModel

    spec = replace(SPEC, method=method, rank=4, train=replace(SPEC.train, learning_rate=2e-2))
    made = build(llama, tmp_path, spec)
    told = record(made)
    assert told["heldout"]["perplexity"] < 0.8 * told["heldout"]["perplexity_before"]
    unmerged = PeftModel.from_pretrained(llama.load(), str(made.path / "adapter")).eval()
    torch.testing.assert_close(logits(made.load()), logits(unmerged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(llama.load()), logits(unmerged), atol=1e-2)
    adapted = {name.split(".")[-4] for name, one in unmerged.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    per_layer = sum(4 * size for size in (64 + 64, 64 + 32, 64 + 32, 64 + 64, *[64 + 128] * 3))
    magnitudes = 64 + 32 + 32 + 64 + 128 + 128 + 64 if method == "dora" else 0
    assert told["trained_parameters"] == 2 * (per_layer + magnitudes)
    config = json.loads((made.path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (llama.source, 4, 32.0)


def test_the_kept_adapter_resolves_as_a_model(llama: Checkpoint, tmp_path: Path) -> None:
    import torch

    made = build(llama, tmp_path, replace(SPEC, method="lora"))
    merged = resolve(str(made.path / "adapter"), work=tmp_path / "merged")
    torch.testing.assert_close(logits(merged.load()), logits(made.load()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(llama: Checkpoint, tmp_path: Path, method: str) -> None:
    import torch

    spec = replace(SPEC, method=method)
    plain = build(llama, tmp_path, spec, "plain")
    saving = replace(spec, train=replace(spec.train, gradient_checkpointing=True))
    checked = build(llama, tmp_path, saving, "checked")
    assert losses(checked) == pytest.approx(losses(plain), rel=1e-6)
    torch.testing.assert_close(logits(checked.load()), logits(plain.load()), rtol=1e-5, atol=1e-5)


def test_a_gguf_source_becomes_a_directory_that_llama_cpp_runs_alike(
    llama: Checkpoint, tmp_path: Path
) -> None:
    """Fine-tuned from GGUF: equal tokens in transformers and llama.cpp, and equal logits after the export."""
    pytest.importorskip("llama_cpp")
    from edgeslm.runtime.llama import LlamaRunner
    from edgeslm.runtime.runner import RunnerOptions
    from edgeslm.stages import export_gguf

    start = export_gguf.run(llama, QuantizeSpec(scheme="F32"), tmp_path / "start.gguf").path
    made = build(resolve(str(start)), tmp_path, replace(SPEC, method="lora"))
    assert made.kind == "hf"
    end = export_gguf.run(made, QuantizeSpec(scheme="F32"), tmp_path / "end.gguf").path
    runner = LlamaRunner(end, RunnerOptions(context=64, threads=1, kv_type="f32", flash_attention=False))
    tokens = made.tokenizer().encode("The moon sails in 2024.", add_special_tokens=False)
    assert tokens == llama.tokenizer().encode("The moon sails in 2024.", add_special_tokens=False)
    assert runner.tokenize("The moon sails in 2024.", add_special=False, parse_special=False) == tokens
    import torch

    with torch.no_grad():
        wanted = made.load()(input_ids=torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(np.asarray(runner.logits(tokens)), wanted, atol=2e-3)


def test_a_text_longer_than_the_model_is_refused(llama: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages import finetune
    from edgeslm.stages.data import Document
    from edgeslm.stages.packing import pack

    long = pack([Document(text=TEXT)], llama.tokenizer(), 1024, tmp_path / "long")
    with pytest.raises(RecipeError, match="context = 1024, but tiny-llama was made for 512 tokens"):
        finetune.run(llama, SPEC, tmp_path / "out", train=long, heldout=None, work=tmp_path / "w", seed=0)


def test_a_model_that_does_not_fit_into_memory_is_refused_with_numbers(llama: Checkpoint) -> None:
    from edgeslm.stages.finetune import check_memory

    model = llama.load()
    check_memory(model, "tiny-llama", 12 * llama.parameters)
    with pytest.raises(ModelError, match=r'needs 0\.0 GiB, 0\.0 GiB are free.*"lora"'):
        check_memory(model, "tiny-llama", 12 * llama.parameters - 1)
    model.requires_grad_(False)
    check_memory(model, "tiny-llama", 1)


def test_without_heldout_text_there_is_nothing_to_report(llama: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages import finetune

    made = finetune.run(
        llama, replace(SPEC, train=replace(SPEC.train, max_steps=1)), tmp_path / "out",
        train=blocks(llama, tmp_path / "t"), heldout=None, work=tmp_path / "w", seed=0,
    )  # fmt: skip
    assert (record(made)["heldout"], record(made)["evaluations"]) == (None, [])


def test_micro_batches_are_as_large_as_their_logits_allow(llama: Checkpoint, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from edgeslm.stages.finetune import _micro

    model, data = llama.load(), SimpleNamespace(context=512)
    spec = TrainSpec(batch_size=16)
    for vocabulary, wanted in ((640, 16), (49152, 2), (262144, 1)):
        model.config.vocab_size = vocabulary
        assert _micro(spec, model, data).micro_batch == wanted
    assert _micro(replace(spec, micro_batch=3), model, data).micro_batch == 3


def test_evaluations_are_as_many_as_they_are_cheap() -> None:
    from edgeslm.stages.finetune import affordable_evaluations

    spec = TrainSpec(epochs=1)
    assert affordable_evaluations(spec, 10_000, 32) == 10
    assert affordable_evaluations(spec, 200, 20) == 2
    assert affordable_evaluations(spec, 10, 20) == 1
    assert affordable_evaluations(replace(spec, max_steps=100), 1, 20) == 10
    assert affordable_evaluations(replace(spec, patience=3), 10, 20) == 10


# --- classifiers ---


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_an_encoder_learns_to_classify(encoder: Checkpoint, tmp_path: Path, method: str) -> None:
    from edgeslm.stages import finetune
    from edgeslm.stages.classifier import heldout_metrics, load_classifier
    from edgeslm.stages.labelled import collate_texts

    tokenizer = encoder.tokenizer()
    train, heldout = examples(tmp_path / "t", tokenizer, 240), examples(tmp_path / "h", tokenizer, 45, seed=1)
    rate, epochs = (3e-3, 4) if method == "full" else (1e-2, 8)
    settings = TrainSpec(epochs=epochs, batch_size=8, learning_rate=rate, patience=9)
    spec = FinetuneSpec(method=method, rank=8, train=settings)
    made = finetune.run(
        encoder,
        spec,
        tmp_path / "out",
        train=train,
        heldout=heldout,
        work=tmp_path / "w",
        seed=0,
        labels=LABELS,
    )
    module, labels, _ = load_classifier(resolve(str(made.path)))
    assert labels == LABELS
    told = record(made)["heldout"]
    assert told["accuracy"] > 0.7
    assert heldout_metrics(module, heldout, collate_texts(0)) == pytest.approx(told, rel=1e-4)


def test_a_decoder_learns_to_classify(llama: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages import finetune
    from edgeslm.stages.classifier import load_classifier

    tokenizer = llama.tokenizer()
    train, heldout = examples(tmp_path / "t", tokenizer, 120), examples(tmp_path / "h", tokenizer, 45, seed=1)
    spec = FinetuneSpec(method="lora", train=TrainSpec(epochs=6, batch_size=8, learning_rate=5e-3))
    made = finetune.run(
        llama,
        spec,
        tmp_path / "out",
        train=train,
        heldout=heldout,
        work=tmp_path / "w",
        seed=0,
        labels=LABELS,
    )
    assert record(made)["heldout"]["accuracy"] > 0.8
    assert load_classifier(resolve(str(made.path)))[1] == LABELS


def test_head_only_goes_to_the_solver(encoder: Checkpoint, llama: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages import finetune

    train = examples(tmp_path / "t", encoder.tokenizer(), 30)
    spec = FinetuneSpec(method="head-only")
    made = finetune.run(
        encoder, spec, tmp_path / "out", train=train, heldout=None, work=tmp_path / "w", seed=0, labels=LABELS
    )
    assert record(made)["method"] == "head-only"
    with pytest.raises(RecipeError, match="for classification"):
        finetune.run(llama, spec, tmp_path / "x", train=train, heldout=None, work=tmp_path / "w", seed=0)


# --- processes ---

LAUNCHED = """
import sys
from pathlib import Path
from edgeslm.stages import finetune
from edgeslm.stages.checkpoint import resolve
from edgeslm.stages.packing import TokenBlocks
from edgeslm.stages.team import is_main
from tests.stages.test_finetune import SPEC
path = Path(sys.argv[2])
sets = {name: TokenBlocks.open(path / name) for name in ("train", "heldout")}
out = path / ("out" if is_main() else "away")
assert finetune.run(resolve(sys.argv[1]), SPEC, out, work=path / "work", seed=0, **sets).path == out
"""


def test_two_processes_write_one_model(llama: Checkpoint, tmp_path: Path) -> None:
    """The loss of equal global batches within rounding, as torchrun starts them."""
    root = Path(__file__).resolve().parents[2]
    one = build(llama, tmp_path / "one")
    (tmp_path / "launched.py").write_text(LAUNCHED)
    (tmp_path / "two").mkdir()
    blocks(llama, tmp_path / "two" / "train")
    blocks(llama, tmp_path / "two" / "heldout", TEXT[:600])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(tmp_path / "launched.py"), str(llama.path), str(tmp_path / "two"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "two" / "away").exists()
    two = resolve(str(tmp_path / "two" / "out"))
    assert record(two)["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert record(two)["heldout"] == pytest.approx(record(one)["heldout"], rel=1e-5)


# --- killed and resumed ---


class Interrupts(Quiet):
    """Ctrl-C with the third note of a step."""

    def note(self, text: str) -> None:
        if "step 6 of" in text:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_model(llama: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages import finetune

    spec = replace(SPEC, method="lora", train=replace(SPEC.train, max_steps=20))
    whole = build(llama, tmp_path, spec, "whole")
    data = {"train": blocks(llama, tmp_path / "t"), "heldout": blocks(llama, tmp_path / "h", TEXT[:600])}
    with pytest.raises(KeyboardInterrupt):
        finetune.run(
            llama, spec, tmp_path / "cut", work=tmp_path / "w", seed=0, progress=Interrupts(), **data
        )
    assert not (tmp_path / "cut").exists()
    again = finetune.run(llama, spec, tmp_path / "cut", work=tmp_path / "w", seed=0, **data)
    assert record(again)["resumed_from"] == 6
    assert losses(again) == losses(whole)
    assert again.digest == whole.digest
