"""Distillation of classifiers: into recurrent networks, fewer layers and smaller sensor networks."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from edgeslm.errors import DataError, ModelError  # noqa: E402
from edgeslm.specs import (  # noqa: E402
    ColumnsSpec,
    DistillSpec,
    FinetuneSpec,
    StudentSpec,
    TrainSpec,
    WindowSpec,
)
from edgeslm.stages import distill, distill_classes, finetune, head, losses  # noqa: E402
from edgeslm.stages.checkpoint import resolve  # noqa: E402
from edgeslm.stages.classifier import load_classifier  # noqa: E402
from tests.encoders import TOPICS, examples, write_encoder  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

LABELS = tuple(TOPICS)
TRAIN = TrainSpec(max_steps=60, learning_rate=1e-2, batch_size=16, context=32)
SPEC = DistillSpec(student=StudentSpec(kind="gru", embedding=8, units=12), train=TRAIN)


@pytest.fixture(scope="module")
def guides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fine-tuned teachers by kind, and the data they know."""
    base = tmp_path_factory.mktemp("guides")
    encoder = resolve(str(write_encoder(base / "encoder", layers=4)))
    data = examples(base / "train", encoder.tokenizer(), 240)
    heldout = examples(base / "heldout", encoder.tokenizer(), 90, seed=1)
    sides: dict[str, Any] = {"train": data, "heldout": heldout, "seed": 0, "labels": LABELS}
    spec = FinetuneSpec(train=replace(TRAIN, max_steps=150, learning_rate=2e-3))
    full = finetune.run(encoder, spec, base / "full", work=base / "work", **sides)
    pooled = head.run(encoder, FinetuneSpec(method="head-only"), base / "pooled", **sides)
    return {"full": full, "pooled": pooled, "train": data, "heldout": heldout}


def learn(guides: dict[str, Any], spec: DistillSpec, out: Path, guide: str = "full", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "task": "text-classification", "train": guides["train"], "heldout": guides["heldout"],
        "work": out.with_suffix(".work"), "seed": 0, "labels": LABELS, "student": None,
    }  # fmt: skip
    settings |= changes
    return distill.run(guides[guide], settings.pop("student"), spec, out, **settings)


def record(directory: Path, name: str = "distill.json") -> Any:
    return json.loads((directory / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_recurrent_student_learns_what_its_teacher_knows(
    tmp_path: Path, guides: dict[str, Any], kind: str
) -> None:
    spec = replace(SPEC, student=replace(SPEC.student, kind=kind))
    made = learn(guides, spec, tmp_path / "out")
    heldout = record(tmp_path / "out")["heldout"]
    assert heldout["teacher"]["accuracy"] >= 0.95
    assert heldout["before"]["accuracy"] < 0.7
    assert heldout["after"]["accuracy"] >= 0.95
    module, labels, tokenizer = load_classifier(made)
    assert labels == LABELS
    assert tokenizer.encode("the ship") == guides["full"].tokenizer().encode("the ship")
    assert made.config()["max_tokens"] == TRAIN.context
    assert record(tmp_path / "out")["student"]["parameters"] == made.parameters
    item = guides["heldout"][3]
    logits = module(
        torch.tensor(item["input_ids"])[None], torch.ones(1, len(item["input_ids"]), dtype=torch.int64)
    )
    assert int(logits.argmax()) == item["label"]


@pytest.mark.parametrize("guide", ["full", "pooled"])
def test_a_student_of_fewer_layers(tmp_path: Path, guides: dict[str, Any], guide: str) -> None:
    spec = replace(
        SPEC, student=StudentSpec(kind="smaller", layers=2), train=replace(TRAIN, learning_rate=2e-3)
    )
    made = learn(guides, spec, tmp_path / "out", guide)
    facts = record(tmp_path / "out")
    assert facts["student"]["layers"] == [0, 3]
    assert facts["heldout"]["after"]["log_loss"] < facts["heldout"]["before"]["log_loss"]
    assert facts["heldout"]["after"]["accuracy"] >= 0.95
    module, labels, _tokenizer = load_classifier(made)
    assert labels == LABELS
    assert module.config.num_hidden_layers == 2
    assert type(module) is type(load_classifier(guides[guide])[0])


def test_a_given_student(tmp_path: Path, guides: dict[str, Any]) -> None:
    first = learn(guides, SPEC, tmp_path / "first")
    spec = replace(SPEC, student=StudentSpec(kind="pruned"), train=replace(TRAIN, max_steps=2))
    again = learn(guides, spec, tmp_path / "again", student=first)
    facts = record(tmp_path / "again")
    assert facts["student"]["name"] == "first"
    assert facts["heldout"]["before"] == record(tmp_path / "first")["heldout"]["after"]
    assert again.config()["units"] == 12


def test_without_held_out_texts(tmp_path: Path, guides: dict[str, Any]) -> None:
    spec = replace(SPEC, train=replace(TRAIN, max_steps=2))
    learn(guides, spec, tmp_path / "out", heldout=None)
    assert record(tmp_path / "out")["heldout"] is None


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, guides: dict[str, Any]) -> None:
    spec = replace(SPEC, train=replace(TRAIN, max_steps=8))
    weights = (learn(guides, spec, tmp_path / "whole").path / "model.safetensors").read_bytes()

    class Interrupted:
        reads, limit = 0, 10**9

        def __len__(self) -> int:
            return len(guides["train"])

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            if self.reads == self.limit:
                raise KeyboardInterrupt
            return guides["train"][index]

    twin = Interrupted()
    learn(guides, spec, tmp_path / "counted", train=twin)
    whole_run = twin.reads
    for share in (0.4, 0.95):  # while the teacher answers, and while the student learns
        twin.limit, twin.reads = int(share * whole_run), 0
        with pytest.raises(KeyboardInterrupt):
            learn(guides, spec, tmp_path / f"at-{share:.0%}", train=twin)
        again = learn(guides, spec, tmp_path / f"at-{share:.0%}")
        assert (again.path / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_the_loss_is_divergence_and_likelihood(divergence: str) -> None:
    torch.manual_seed(0)
    logits, guided, true = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    spec = replace(SPEC, divergence=divergence, hard_weight=0.25, temperature=3.0)
    loss = distill_classes.ClassLoss(spec, ("x",))
    found = loss(lambda x: x, {"x": logits, "labels": true, "teacher_logits": guided})
    q, p = ((one.double() / 3).log_softmax(-1) for one in (logits, guided))
    soft = 9 * losses.divergence_of(q, p, divergence).sum()
    hard = -logits.double().log_softmax(-1)[torch.arange(5), true].sum()
    assert float(found) == pytest.approx(float(0.75 * soft + 0.25 * hard), rel=1e-5)


# --- sensors ---


def test_a_sensor_network_teaches_a_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeslm.stages import sensor_net, sensor_training, sensors

    random = np.random.default_rng(0)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("x", "y", "state"))
        for row in range(1600):
            hot = row // 40 % 2
            writer.writerow((*(random.normal(2.0 * hot, 1.0, 2)), "hot" if hot else "cold"))
    data = sensors.prepare(
        [str(tmp_path / "table.csv")], [], ColumnsSpec(label="state"), WindowSpec(rows=8, stride=2),
        tmp_path / "windows", heldout_every=4, seed=0,
    )  # fmt: skip
    sides = {"train": data.train, "heldout": data.heldout, "seed": 0}
    spec = FinetuneSpec(units=24, train=TRAIN)
    guide = sensor_training.run(spec, tmp_path / "guide", work=tmp_path / "work", **sides)
    small = replace(SPEC, student=StudentSpec(kind="gru", units=6))
    arguments: dict[str, Any] = {"task": "sensor-classification", "work": tmp_path / "more", **sides}
    threads, predict = [], sensor_training.predict
    monkeypatch.setattr(
        sensor_training, "predict", lambda *given: threads.append(torch.get_num_threads()) or predict(*given)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # too many for steps of so small a network
    try:
        made = distill.run(guide, None, small, tmp_path / "out", labels=data.train.labels, **arguments)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}
    student = sensor_net.load(made.path)
    assert student.config.units == 6
    assert student.config.normalization == data.train.normalization.as_record()
    heldout = record(made.path)["heldout"]
    assert heldout["after"]["accuracy"] >= heldout["teacher"]["accuracy"] - 0.05
    assert record(made.path)["student"]["parameters"] == made.parameters
    with pytest.raises(ModelError, match="parameters, its teacher"):
        distill.run(
            guide,
            None,
            replace(small, student=StudentSpec(kind="gru", units=24)),
            tmp_path / "x",
            **arguments,
        )
    with pytest.raises(ModelError, match="apart"):
        distill.run(guide, None, small, tmp_path / "x", labels=("a", "b"), **arguments)


# --- what is refused ---


def test_other_classes_are_refused(tmp_path: Path, guides: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="apart"):
        learn(guides, SPEC, tmp_path / "out", labels=("sky", "sea", "bread"))


def test_no_examples_are_refused(tmp_path: Path, guides: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="nothing to distil"):
        learn(guides, SPEC, tmp_path / "out", train=guides["train"].subset([]))


def test_a_recurrent_teacher_has_no_layers_to_give(tmp_path: Path, guides: dict[str, Any]) -> None:
    first = learn(guides, replace(SPEC, train=replace(TRAIN, max_steps=1)), tmp_path / "first")
    spec = replace(SPEC, student=StudentSpec(kind="smaller", layers=1))
    with pytest.raises(ModelError, match="transformers' models alone"):
        learn({**guides, "full": first}, spec, tmp_path / "out")
