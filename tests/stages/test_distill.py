"""Distillation of language models: the loss by hand, cache and no cache, resumed runs, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from edgeslm.errors import DataError, ModelError, RecipeError  # noqa: E402
from edgeslm.progress import Quiet  # noqa: E402
from edgeslm.specs import DistillSpec, StudentSpec, TrainSpec  # noqa: E402
from edgeslm.stages import alignment, distill, distill_language, generations, losses, teacher  # noqa: E402
from edgeslm.stages.checkpoint import model_directory, resolve  # noqa: E402
from edgeslm.stages.packing import collate_blocks  # noqa: E402
from tests.models import CORPUS, write_hf_model  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.workstation

CONTEXT = 24
TRAIN = TrainSpec(max_steps=6, learning_rate=3e-3, batch_size=4, context=CONTEXT)
SPEC = DistillSpec(student=StudentSpec(kind="smaller", layers=2), train=TRAIN)


class Blocks:
    """Blocks of the corpus in a tokenizer's ids; the first `masked` labels of each are not counted."""

    def __init__(self, tokenizer: Any, count: int = 10, masked: int = 0) -> None:
        ids = tokenizer.encode(CORPUS, add_special_tokens=False)[: count * CONTEXT]
        self.ids = np.array(ids, np.int64).reshape(count, CONTEXT)
        self.masked = masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.ids[index].copy()
        labels[: self.masked] = generations.NOT_COUNTED
        return {"input_ids": self.ids[index], "labels": labels}


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A teacher of four layers."""
    path = tmp_path_factory.mktemp("models") / "teacher"
    return model_directory(write_hf_model(path, "llama", layers=4, tokenizer="smollm"), "teacher")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, guide: Any) -> Any:
    """A student of half the width with the teacher's tokenizer and five more rows of vocabulary."""
    path = tmp_path_factory.mktemp("models") / "student"
    rows = guide.config()["vocab_size"] + 5
    write_hf_model(path, "llama", hidden=32, heads=2, kv_heads=1, tokenizer="smollm", vocab_size=rows, seed=1)
    return model_directory(path, "student")


@pytest.fixture(scope="module")
def blocks(guide: Any) -> Blocks:
    return Blocks(guide.tokenizer(), masked=5)


def learn(guide: Any, student: Any, spec: DistillSpec, out: Path, blocks: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "task": "causal-lm", "train": blocks, "heldout": None, "work": out.with_suffix(".work"), "seed": 0,
    }  # fmt: skip
    return distill.run(guide, student, spec, out, **{**settings, **changes})


def record(directory: Path, name: str = "distill.json") -> Any:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def curve(directory: Path) -> list[float]:
    return [point["loss"] for point in record(directory, "training.json")["curve"]]


# --- the loss of a batch, by hand ---


def loss_of(
    guide: Any,
    student: Any,
    spec: DistillSpec,
    batch: Any,
    *,
    columns: Any = None,
    model: Any = None,
    tokens: int | None = None,
) -> float:
    """LanguageLoss of a batch for two loaded models."""
    width = min(distill_language.vocabulary_rows(one) for one in (guide, student))
    taught = alignment.Teacher(guide, columns, width)
    counts = (len(one.model.layers) for one in (student, guide))
    kept = tuple(distill_language.layers_of(Path(), *counts))
    loss = distill_language.LanguageLoss(
        spec=spec, teacher=taught, student=student, kept=kept, tokens=tokens or width
    )
    with torch.no_grad():
        return float(loss(model or student, batch))


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_divergence_and_likelihood_of_what_counts(
    guide: Any, small: Any, blocks: Blocks, divergence: str, hard_weight: float
) -> None:
    ours, theirs = small.load(), guide.load()
    spec = replace(SPEC, divergence=divergence, hard_weight=hard_weight, temperature=1.7)
    batch = collate_blocks([blocks[0], blocks[3]])
    found = loss_of(theirs, ours, spec, batch)
    width, soft, hard = theirs.config.vocab_size, 0.0, 0.0
    with torch.no_grad():
        mine, guided = (one(input_ids=batch["input_ids"]).logits.double() for one in (ours, theirs))
    for row in range(2):
        for place in range(CONTEXT - 1):
            if batch["labels"][row, place + 1] == generations.NOT_COUNTED:
                continue
            q = (mine[row, place, :width] / 1.7).log_softmax(-1)
            p = (guided[row, place, :width] / 1.7).log_softmax(-1)
            soft += 1.7**2 * float(losses.divergence_of(q, p, divergence))
            hard -= float(mine[row, place].log_softmax(-1)[batch["labels"][row, place + 1]])
    assert found == pytest.approx((1 - hard_weight) * soft + hard_weight * hard, rel=1e-4)


def test_what_is_masked_changes_nothing(guide: Any, small: Any, blocks: Blocks) -> None:
    """Labels of the prompt may be anything: only -100 says that they do not count."""
    ours, theirs = small.load(), guide.load()
    batch = collate_blocks([blocks[0]])
    counted = distill_language.causal_counted(batch)
    assert counted == CONTEXT - blocks.masked
    whole = collate_blocks([Blocks(guide.tokenizer())[0]])
    assert loss_of(theirs, ours, SPEC, whole) > loss_of(theirs, ours, SPEC, batch)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_the_cache_gives_the_loss_of_the_teacher_beside(
    tmp_path: Path, guide: Any, small: Any, blocks: Blocks, divergence: str
) -> None:
    ours, theirs = small.load(), guide.load()
    spec = replace(SPEC, divergence=divergence)
    width = theirs.config.vocab_size
    taught = alignment.Teacher(theirs, None, width)

    def cached(k: int) -> float:
        answers = teacher.cache_top_k(
            lambda ids: taught(ids).logits, blocks, tmp_path / f"{k}.bin", k=k, vocabulary=width,
            temperature=spec.temperature, progress=Quiet(),
        )  # fmt: skip
        data = teacher.Taught(blocks, answers)
        batch = teacher.CollateTaught(collate_blocks)([data[0], data[3]])
        loss = distill_language.LanguageLoss(
            spec=spec, teacher=taught, student=ours, kept=(0, 3), tokens=width
        )
        with torch.no_grad():
            return float(loss(ours, batch))

    beside = loss_of(theirs, ours, spec, collate_blocks([blocks[0], blocks[3]]))
    assert cached(width) == pytest.approx(beside, rel=1e-3)
    assert cached(4) < cached(64) < beside


def test_matching_is_the_mean_over_the_layers(guide: Any, small: Any, blocks: Blocks) -> None:
    ours, theirs = small.load(), guide.load()
    for one in (ours, theirs):
        one.set_attn_implementation("eager")
    from edgeslm.stages.students import Projected

    learner = Projected(ours, 32, 64, seed=0)
    batch = collate_blocks([blocks[0], blocks[3]])
    mask = batch["labels"][:, 1:] != generations.NOT_COUNTED
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        mine, guided = (one(input_ids=batch["input_ids"], **asked) for one in (ours, theirs))
        hidden = [
            losses.hidden_match(
                mine.hidden_states[a][:, :-1], guided.hidden_states[b][:, :-1], mask, learner.projection
            )
            for a, b in ((1, 3), (2, 4))  # two layers, of which the second is the teacher's fourth
        ]
        shares = [
            losses.attention_match(mine.attentions[a][:, :, :-1], guided.attentions[b][:, :, :-1], mask)
            for a, b in ((0, 0), (1, 3))
        ]
    plain = loss_of(theirs, ours, SPEC, batch, model=learner)
    matched = replace(SPEC, hidden_weight=0.5, attention_weight=2.0)
    found = loss_of(theirs, ours, matched, batch, model=learner)
    wanted = plain + 0.5 * float(sum(hidden)) / 2 + 2.0 * float(sum(shares)) / 2
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_teacher_has_nothing_to_learn_from_itself(guide: Any, blocks: Blocks) -> None:
    model = guide.load()
    model.set_attn_implementation("eager")
    spec = replace(SPEC, hard_weight=0.0, hidden_weight=1.0, attention_weight=1.0)
    assert loss_of(model, model, spec, collate_blocks([blocks[0]])) == pytest.approx(0, abs=1e-3)


def test_on_policy_compares_both_on_the_students_text(
    monkeypatch: pytest.MonkeyPatch, guide: Any, small: Any, blocks: Blocks
) -> None:
    ours, theirs = small.load(), guide.load()
    spec, batch = (
        replace(SPEC, mode="on-policy", divergence="reverse"),
        collate_blocks([blocks[0], blocks[3]]),
    )
    monkeypatch.setattr(distill_language, "ON_POLICY_SHARE", 1.0)
    torch.manual_seed(7)
    found = loss_of(theirs, ours, spec, batch)
    torch.manual_seed(7)
    torch.rand(())
    prompts = batch["input_ids"][:, : blocks.masked].tolist()
    end = distill_language.end_tokens(ours)
    written = generations.continue_texts(ours, prompts, CONTEXT, end=end, width=theirs.config.vocab_size)
    ids, labels = map(torch.from_numpy, generations.as_blocks(prompts, written, CONTEXT, end[0]))
    alone = loss_of(
        theirs, ours, replace(spec, mode="logits", hard_weight=0.0), {"input_ids": ids, "labels": labels}
    )
    slots = 2 * (CONTEXT - blocks.masked)
    assert found == pytest.approx(alone * slots / sum(map(len, written)), rel=1e-5)
    monkeypatch.setattr(distill_language, "ON_POLICY_SHARE", 0.0)
    assert loss_of(theirs, ours, spec, batch) == pytest.approx(
        loss_of(theirs, ours, replace(spec, mode="logits"), batch)
    )


def on_policy(ours: Any, theirs: Any, tokens: int) -> Any:
    return distill_language.LanguageLoss(
        spec=replace(SPEC, mode="on-policy"),
        teacher=alignment.Teacher(theirs, None, theirs.config.vocab_size),
        student=ours,
        kept=(0, 3),
        tokens=tokens,
    )


def test_rows_that_pad_the_vocabulary_are_never_written(guide: Any, small: Any, blocks: Blocks) -> None:
    batch = collate_blocks([blocks[0], blocks[3]])
    torch.manual_seed(0)
    written = on_policy(small.load(), guide.load(), 40)._rewritten(batch)
    made = written["labels"][written["labels"] != generations.NOT_COUNTED]
    assert len(made) > 10
    assert set(made.tolist()) <= set(range(40))


def test_a_student_learns_from_what_it_writes_in_half_precision_too(
    monkeypatch: pytest.MonkeyPatch, guide: Any, small: Any, blocks: Blocks
) -> None:
    """Casts that writing leaves behind were made without gradients, and must not be taken for the learner's."""
    monkeypatch.setattr(distill_language, "ON_POLICY_SHARE", 1.0)
    ours = small.load()
    loss = on_policy(ours, guide.load(), ours.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss(ours, collate_blocks([blocks[0]])).backward()
    still = [name for name, one in ours.named_parameters() if one.grad is None or not one.grad.any()]
    assert not still


# --- whole runs ---


def test_a_smaller_student_comes_closer_to_its_teacher(tmp_path: Path, guide: Any, blocks: Blocks) -> None:
    spec = replace(SPEC, hard_weight=0.0, train=replace(TRAIN, max_steps=30))
    made = learn(guide, None, spec, tmp_path / "out", blocks, heldout=blocks)
    losses_seen = curve(tmp_path / "out")
    assert losses_seen[-1] < 0.6 * losses_seen[0]
    assert made.load().config.num_hidden_layers == 2
    facts = record(tmp_path / "out")
    assert facts["schema"] == "edgeslm.distill/1"
    assert facts["student"]["layers"] == [0, 3]
    assert facts["teacher"]["digest"] == guide.digest
    assert facts["student"]["parameters"] == made.parameters
    heldout = facts["heldout"]
    assert heldout["teacher"]["perplexity"] == pytest.approx(math.exp(heldout["teacher"]["loss"]))
    assert heldout["after"]["loss"] == pytest.approx(
        distill_language.heldout_loss(made.load(), blocks), rel=1e-4
    )
    ancestry = record(tmp_path / "out", "edgeslm.json")
    assert ancestry["stage"] == "distill"
    assert ancestry["teacher"]["digest"] == guide.digest


def test_a_run_with_the_whole_cache_is_the_run_without(
    tmp_path: Path, guide: Any, small: Any, blocks: Blocks
) -> None:
    spec = replace(SPEC, student=StudentSpec(kind="pruned"))
    learn(guide, small, spec, tmp_path / "beside", blocks)
    learn(guide, small, replace(spec, cache_top_k=100_000), tmp_path / "cached", blocks)
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "beside"), rel=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_top_k": 16},
        {"mode": "on-policy"},
        {"mode": "sequence"},
        {"hidden_weight": 0.5},
        {"attention_weight": 0.5},
    ],
    ids=str,
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, guide: Any, small: Any, blocks: Blocks, changes: dict[str, Any]
) -> None:
    spec = replace(SPEC, student=StudentSpec(kind="pruned"), **changes)

    class Interrupted(Blocks):
        reads = 0

        def __getitem__(self, index: int) -> dict[str, Any]:
            Interrupted.reads += 1
            if Interrupted.reads == limit:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    limit = 10**9
    twin = Interrupted(guide.tokenizer(), masked=blocks.masked)
    work = tmp_path / "work"
    whole = learn(guide, small, spec, tmp_path / "whole", twin)
    limit, Interrupted.reads = int(0.9 * Interrupted.reads), 0
    with pytest.raises(KeyboardInterrupt):
        learn(guide, small, spec, tmp_path / "again", twin, work=work)
    assert not (tmp_path / "again").exists()
    again = learn(guide, small, spec, tmp_path / "again", blocks, work=work)
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")
    assert record(tmp_path / "again", "training.json")["resumed_from"] is not None
    assert (again.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


LAUNCHED = """
import sys
from dataclasses import replace
from pathlib import Path
from edgeslm.specs import StudentSpec
from edgeslm.stages.checkpoint import model_directory
from tests.stages.test_distill import SPEC, Blocks, learn
guide, small = (model_directory(Path(path), Path(path).name) for path in sys.argv[1:3])
changes = {"hidden": {"hidden_weight": 0.5}, "cache": {"cache_top_k": 16}}[sys.argv[4]]
spec = replace(SPEC, student=StudentSpec(kind="pruned"), **changes)
blocks = Blocks(guide.tokenizer(), masked=5)
learn(guide, small, spec, Path(sys.argv[3]), blocks, heldout=blocks)
"""


@pytest.mark.parametrize("what", ["hidden", "cache"])
def test_two_processes_learn_as_one_does(
    tmp_path: Path, guide: Any, small: Any, blocks: Blocks, what: str
) -> None:
    """The projection to the teacher's width is trained in both; the teacher answers in the main one alone."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    spec = replace(SPEC, student=StudentSpec(kind="pruned"))
    spec = replace(spec, hidden_weight=0.5) if what == "hidden" else replace(spec, cache_top_k=16)
    one = learn(guide, small, spec, tmp_path / "one", blocks, heldout=blocks)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(script), str(guide.path), str(small.path), str(tmp_path / "two"), what,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "two", "training.json")["processes"] == 2
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-4)
    ends = [record(path)["heldout"]["after"]["loss"] for path in (tmp_path / "two", one.path)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_the_teachers_answers_are_kept_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guide: Any, small: Any, blocks: Blocks
) -> None:
    spec = replace(SPEC, student=StudentSpec(kind="pruned"), cache_top_k=8)
    work = tmp_path / "work"
    learn(guide, small, spec, tmp_path / "one", blocks, work=work)
    asked = []
    call: Callable[..., Any] = alignment.Teacher.__call__
    monkeypatch.setattr(
        alignment.Teacher, "__call__", lambda self, ids, **rest: asked.append(1) or call(self, ids, **rest)
    )
    shutil.rmtree(tmp_path / "one")
    learn(guide, small, spec, tmp_path / "two", blocks, work=work)
    assert not asked
    learn(guide, small, replace(spec, temperature=3.0), tmp_path / "three", blocks, work=work)
    assert asked


def test_a_student_with_another_tokenizer_learns_from_texts_alone(tmp_path: Path, guide: Any) -> None:
    student = model_directory(write_hf_model(tmp_path / "other", "mistral"), "other")
    spec = replace(SPEC, student=StudentSpec(kind="pruned"))
    data = Blocks(student.tokenizer(), masked=5)
    with pytest.raises(ModelError, match="tokenizer") as refused:
        learn(guide, student, spec, tmp_path / "out", data)
    assert "sequence" in refused.value.hint
    made = learn(guide, student, replace(spec, mode="sequence"), tmp_path / "out", data, heldout=data)
    assert made.tokenizer().get_vocab() == student.tokenizer().get_vocab()
    assert record(tmp_path / "out")["heldout"]["teacher"] is None
    assert curve(tmp_path / "out")[-1] < curve(tmp_path / "out")[0]


def test_a_gguf_file_can_teach(tmp_path: Path, tiny_gguf: Path) -> None:
    source = resolve(str(tiny_gguf))
    spec = replace(SPEC, student=StudentSpec(kind="smaller", layers=1))
    made = learn(source, None, spec, tmp_path / "out", Blocks(source.tokenizer()))
    assert made.kind == "hf"
    assert made.load().config.num_hidden_layers == 1
    text = "the band in the land"
    assert made.tokenizer().encode(text) == source.tokenizer().encode(text)


# --- vocabularies and layers ---


class Words:
    """A tokenizer of single words."""

    def __init__(self, words: str, unknown: int = 0) -> None:
        self.words = {word: place for place, word in enumerate(words.split())}
        self.unknown = unknown

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def encode(self, text: str, **_settings: Any) -> list[int]:
        return [self.words.get(word, self.unknown) for word in text.split()]

    def decode(self, ids: Any, **_settings: Any) -> str:
        names = {place: word for word, place in self.words.items()}
        return " ".join(names[int(one)] for one in ids)


class Letters(Words):
    """A tokenizer that knows words but cuts every text into letters."""

    def encode(self, text: str, **_settings: Any) -> list[int]:
        return [self.words.get(letter, self.unknown) for letter in text]


def test_a_pruned_vocabulary_is_found_in_the_teachers() -> None:
    whole = Words("a b c d e f")
    assert alignment.shared_tokens(whole, Words("a b c d e f"), ()) is None
    assert alignment.shared_tokens(Words("a b c"), whole, [[0, 1, 2]]) is None
    found = alignment.shared_tokens(Words("b f d"), whole, [[0, 1], [2, 2]])
    assert found is not None
    assert found.tolist() == [1, 5, 3]


@pytest.mark.parametrize("student", [Words("a b x"), Letters("ab cd")])
def test_another_tokenizer_is_refused(student: Any) -> None:
    with pytest.raises(ModelError, match="tokenizer") as refused:
        alignment.shared_tokens(student, Words("a b ab cd"), [[0, 1]])
    assert "sequence" in refused.value.hint


def test_a_teacher_answers_over_a_pruned_vocabulary(guide: Any) -> None:
    model = guide.load()
    columns = torch.tensor([7, 300, 12, 45])
    taught = alignment.Teacher(model, columns, 3)
    ids = torch.tensor([[1, 3, 0, 2]])
    found = taught(ids).logits
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[300, 45, 7, 12]])).logits[..., [7, 300, 12]]
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not found.requires_grad


def test_a_pruned_copy_learns_from_the_whole_model(tmp_path: Path, guide: Any) -> None:
    """Fewer layers and fewer tokens, renumbered: the record says which, and the ids are found by their texts."""
    from edgeslm.specs import PruneSpec
    from edgeslm.stages import prune, vocabulary
    from edgeslm.stages.data import Document
    from edgeslm.stages.saving import save_model

    text = "the quick brown fox jumps over the lazy dog, there and within this line " * 40
    arguments: dict[str, Any] = {
        "context": 32, "tokens": 256, "documents": lambda: [Document(text=text)], "chat": lambda *_: "",
    }  # fmt: skip
    pruned = prune.run(guide, PruneSpec(drop_layers=1), tmp_path / "pruned", **arguments)
    whole = guide.tokenizer()
    ids = whole.encode(text, add_special_tokens=False)
    counts = np.bincount(ids, minlength=len(whole))
    kept = vocabulary.kept_ids(whole, counts, np.zeros(len(whole)))
    assert len(kept) < 0.9 * len(whole)
    own, model = vocabulary.rebuilt(whole, kept), pruned.load()
    model.resize_token_embeddings(len(kept))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(pruned.load().get_input_embeddings().weight[kept])
    (tmp_path / "small").mkdir()
    shutil.copy(pruned.path / "prune.json", tmp_path / "small")
    small = save_model(model, own, tmp_path / "small", parent=pruned, stage="prune", spec=PruneSpec())

    data = Blocks(own)
    data.ids = np.array(own.encode(text, add_special_tokens=False)[: 8 * CONTEXT]).reshape(8, CONTEXT)
    found = alignment.shared_tokens(own, whole, data.ids)
    assert found is not None
    assert found.tolist() == kept.tolist()
    spec = replace(
        SPEC, student=StudentSpec(kind="pruned"), hidden_weight=0.5, train=replace(TRAIN, max_steps=20)
    )
    learn(guide, small, spec, tmp_path / "out", data, heldout=data)
    facts = record(tmp_path / "out")
    dropped = record(pruned.path, "prune.json")["dropped_layers"]
    assert facts["student"]["layers"] == [layer for layer in range(4) if layer not in dropped]
    assert curve(tmp_path / "out")[-1] < 0.7 * curve(tmp_path / "out")[0]


def test_what_enters_a_layer_is_matched_with_what_entered_it_before() -> None:
    assert alignment.layer_pairs([0, 1, 4, 5], 6) == [(1, 1), (2, 4), (3, 5), (4, 6)]
    assert alignment.layer_pairs([0], 6) == [(1, 6)]


def test_the_layers_of_a_pruned_student_are_in_its_record(tmp_path: Path) -> None:
    assert distill_language.layers_of(tmp_path, 3, 6) == [0, 2, 5]
    (tmp_path / "prune.json").write_text(json.dumps({"dropped_layers": [1, 2, 3]}))
    assert distill_language.layers_of(tmp_path, 3, 6) == [0, 4, 5]
    assert distill_language.layers_of(tmp_path, 4, 6) == [0, 2, 3, 5]
    assert distill_language.layers_of(tmp_path, 6, 6) == [0, 1, 2, 3, 4, 5]


def test_the_micro_batch_fits_into_memory() -> None:
    assert distill_language.micro_batches(TRAIN, 49152, 512).micro_batch == 2
    assert distill_language.micro_batches(TRAIN, 256000, 8192).micro_batch == 1
    assert distill_language.micro_batches(TRAIN, 600, 64).micro_batch == TRAIN.batch_size
    assert distill_language.micro_batches(replace(TRAIN, micro_batch=3), 49152, 512).micro_batch == 3


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "task", "says"),
    [
        ({"student": StudentSpec(kind="pruned")}, "causal-lm", "no pruned model"),
        ({"student": StudentSpec(kind="gru")}, "causal-lm", "for classifiers"),
        ({"cache_top_k": 8, "hidden_weight": 1.0}, "causal-lm", "cache_top_k = 8"),
        ({"cache_top_k": 8, "mode": "on-policy"}, "causal-lm", "cache_top_k = 8"),
        ({"mode": "sequence", "attention_weight": 1.0}, "causal-lm", "text alone"),
        ({"mode": "on-policy"}, "text-classification", "logits alone"),
        ({"hidden_weight": 1.0}, "sensor-classification", "logits alone"),
    ],
)
def test_settings_that_exclude_each_other(changes: dict[str, Any], task: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        distill.check(replace(SPEC, **changes), task, has_student=False)


def test_no_blocks_are_refused(tmp_path: Path, guide: Any) -> None:
    with pytest.raises(DataError, match="nothing to distil"):
        learn(guide, None, SPEC, tmp_path / "out", [])


def test_a_student_as_deep_as_its_teacher_is_refused(tmp_path: Path, guide: Any, blocks: Blocks) -> None:
    with pytest.raises(ModelError, match="4 of 4 layers"):
        learn(
            guide,
            None,
            replace(SPEC, student=StudentSpec(kind="smaller", layers=4)),
            tmp_path / "out",
            blocks,
        )


def test_blocks_longer_than_the_teacher_knows_are_refused(tmp_path: Path, small: Any, blocks: Blocks) -> None:
    short = model_directory(
        write_hf_model(tmp_path / "short", "llama", layers=4, tokenizer="smollm", context=CONTEXT - 8),
        "short",
    )
    with pytest.raises(
        RecipeError, match=f"context = {CONTEXT}, but short was made for {CONTEXT - 8} tokens"
    ):
        learn(short, small, replace(SPEC, student=StudentSpec(kind="pruned")), tmp_path / "out", blocks)
