"""Distillation: a student learns its teacher's distributions, and with a small weight the true labels.

    causal-lm               logits (teacher beside, or its top k from disk), sequence, on-policy
    text-classification     logits of the classes, into a recurrent network, fewer layers, or a pruned copy
    sensor-classification   the same, into a smaller network

Hinton et al. 2015, arXiv:1503.02531.  Sequence level and on policy: see edgeslm.stages.generations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeslm.atomic import atomic_write
from edgeslm.errors import RecipeError
from edgeslm.progress import Progress, Quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgeslm.specs import DistillSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.teacher import Records

SCHEMA = "edgeslm.distill/1"
RECORD_FILE = "distill.json"
TRAINING_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a distillation is given: see `run`."""

    teacher: Checkpoint
    student: Checkpoint | None
    spec: DistillSpec
    out: Path
    train: Any
    heldout: Any
    work: Path
    seed: int
    progress: Progress
    labels: Sequence[str] | None


def run(
    teacher: Checkpoint,
    student: Checkpoint | None,
    spec: DistillSpec,
    out: Path,
    *,
    task: str,
    train: Any,
    heldout: Any | None,
    work: Path,
    seed: int,
    progress: Progress | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Distil `teacher` into `student`, or into the one that `spec.student` describes, in the directory `out`.

    train, heldout: token blocks in the student's tokens, labelled texts, or sensor windows; heldout may
    be None.  work: keeps checkpoints and the teacher's answers.  labels: the classes of the data, which
    must be the teacher's.
    Raises ModelError for a teacher that the student can't learn from, RecipeError for settings that
    exclude each other, DataError without examples.
    """
    lesson = Lesson(
        teacher=teacher, student=student, spec=spec, out=out, train=train, heldout=heldout, work=work,
        seed=seed, progress=progress or Quiet(), labels=labels,
    )  # fmt: skip
    check(spec, task, has_student=student is not None)
    if task == "causal-lm":
        from edgeslm.stages.distill_language import distill_language

        return distill_language(lesson)
    from edgeslm.stages.distill_classes import distill_sensors, distill_texts

    return distill_texts(lesson) if task == "text-classification" else distill_sensors(lesson)


def check(spec: DistillSpec, task: str, *, has_student: bool) -> None:
    """Raise RecipeError for settings that exclude each other."""
    matched = spec.hidden_weight > 0 or spec.attention_weight > 0
    if spec.student.kind == "pruned" and not has_student:
        raise RecipeError(
            'student kind "pruned" and no pruned model',
            hint='add [prune], or choose student kind "smaller", "gru" or "lstm"',
        )
    if task == "causal-lm" and spec.student.kind in ("gru", "lstm"):
        raise RecipeError(
            f'student kind "{spec.student.kind}" is for classifiers', hint='choose "pruned" or "smaller"'
        )
    if task != "causal-lm" and (spec.mode != "logits" or matched or spec.cache_top_k):
        raise RecipeError(
            f"{task} is distilled from the teacher's logits alone (they are always kept on disk)",
            hint='mode = "logits", without hidden_weight, attention_weight and cache_top_k',
        )
    if spec.cache_top_k and (spec.mode != "logits" or matched):
        raise RecipeError(
            f"cache_top_k = {spec.cache_top_k} keeps the teacher's logits on the data, and nothing else",
            hint='leave it out, or use mode = "logits" without hidden_weight and attention_weight',
        )
    if spec.mode == "sequence" and matched:
        raise RecipeError(
            'mode = "sequence" learns from the teacher\'s text alone',
            hint='leave hidden_weight and attention_weight out, or use mode = "logits"',
        )


def teacher_answers(fill: Callable[[], Records]) -> Records:
    """What `fill` brings to disk, by the main process alone while the others wait."""
    from edgeslm.stages.team import is_main, wait_for_all

    if is_main():
        fill()
    wait_for_all()
    return fill()


def described(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """What the records say of a model."""
    return {
        "name": checkpoint.name,
        "digest": checkpoint.digest,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def write_record(lesson: Lesson, facts: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """distill.json and training.json, into the lesson's directory.

    facts: teacher, student, and heldout with what the teacher, and the student before and after, do there.
    """
    spec = lesson.spec
    record = {
        "schema": SCHEMA,
        "mode": spec.mode,
        "divergence": spec.divergence,
        "temperature": spec.temperature,
        "hard_weight": spec.hard_weight,
        **facts,
    }
    for name, value in ((RECORD_FILE, record), (TRAINING_FILE, training)):
        atomic_write(lesson.out / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
