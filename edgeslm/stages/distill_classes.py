"""Distillation of classifiers: the teacher's logits are few, so they are computed once and kept on disk.

B batch, L classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeslm.atomic import writing
from edgeslm.errors import DataError, ModelError
from edgeslm.stages import alignment
from edgeslm.stages import teacher as answers
from edgeslm.stages.checkpoint import Checkpoint, model_directory
from edgeslm.stages.distill import described, teacher_answers, write_record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeslm.specs import DistillSpec
    from edgeslm.stages.distill import Lesson

    Batch = dict[str, Any]
    Collate = Callable[[list[dict[str, Any]]], Batch]
    Measure = Callable[[Any], dict[str, float]]


def distill_texts(lesson: Lesson) -> Checkpoint:
    """Distil a text classifier; see edgeslm.stages.distill.run."""
    from edgeslm.stages import classifier
    from edgeslm.stages.labelled import collate_texts
    from edgeslm.stages.team import is_main, wait_for_all

    guide, labels, tokenizer = classifier.load_classifier(lesson.teacher)
    _check_labels(lesson, labels)
    student, layers = _text_student(lesson, guide, labels, tokenizer)
    collate = collate_texts(classifier.pad_token(tokenizer))

    def measure(model: Any) -> dict[str, float]:
        return classifier.heldout_metrics(model, lesson.heldout, collate)

    training, heldout = _train(
        lesson,
        guide,
        student,
        collate=collate,
        inputs=("input_ids", "attention_mask"),
        classes=len(labels),
        measure=measure,
    )
    if is_main():
        with writing(lesson.out):
            _write_text_student(lesson, student.cpu())
        parent = lesson.student or lesson.teacher
        facts = {
            "teacher": described(lesson.teacher, guide),
            "student": {
                **described(parent, student),
                "kind": lesson.spec.student.kind,
                "layers": layers,
            },
            "heldout": heldout,
        }
        write_record(lesson, facts, training)
    wait_for_all()
    return model_directory(lesson.out, lesson.teacher.source)


def distill_sensors(lesson: Lesson) -> Checkpoint:
    """Distil a network over sensor windows; see edgeslm.stages.distill.run."""
    import numpy as np

    from edgeslm.stages import saving, sensor_net
    from edgeslm.stages.sensor_training import collate, log_loss, predict, suited_threads
    from edgeslm.stages.team import is_main, wait_for_all

    guide = sensor_net.load(lesson.teacher.path)
    _check_labels(lesson, guide.config.labels)
    if lesson.train.normalization.as_record() != guide.config.normalization:
        raise ModelError(
            f"{lesson.teacher.name} was trained on readings of another normalization",
            hint="train the teacher on the same tables",
        )
    student = sensor_net.student_net(guide, lesson.spec.student, seed=lesson.seed)

    def measure(model: Any) -> dict[str, float]:
        scores, label = predict(model, lesson.heldout), lesson.heldout.label
        right = float(np.mean(scores.argmax(1) == label))
        return {"examples": len(label), "log_loss": log_loss(scores, label), "accuracy": right}

    with suited_threads(student):
        training, heldout = _train(
            lesson,
            guide,
            student,
            collate=collate,
            inputs=("readings",),
            classes=len(guide.config.labels),
            measure=measure,
        )
    if is_main():
        with writing(lesson.out):
            sensor_net.save(student.cpu(), lesson.out)
            saving.write_ancestry(lesson.out, parent=lesson.teacher, stage="distill", spec=lesson.spec)
        facts = {
            "teacher": described(lesson.teacher, guide),
            "student": {**described(lesson.teacher, student), "kind": lesson.spec.student.kind},
            "heldout": heldout,
        }
        write_record(lesson, facts, training)
    wait_for_all()
    return model_directory(lesson.out, lesson.teacher.source)


def _check_labels(lesson: Lesson, labels: Sequence[str]) -> None:
    """Raise ModelError for a teacher of other classes, DataError without examples."""
    if lesson.labels is not None and tuple(lesson.labels) != tuple(labels):
        raise ModelError(
            f"{lesson.teacher.name} tells {list(labels)} apart, the data {list(lesson.labels)}",
            hint="fine-tune the teacher on the same classes, or name them in [columns] labels in its order",
        )
    if len(lesson.train) == 0:
        raise DataError("there is nothing to distil on", hint="the training sources hold no examples")


def _text_student(
    lesson: Lesson, guide: Any, labels: Sequence[str], tokenizer: Any
) -> tuple[Any, list[int] | None]:
    """A module over the teacher's tokens, and the teacher's layers that it has, where it has any."""
    from edgeslm.stages import classifier, networks, students

    spec = lesson.spec.student
    if spec.kind in students.NETWORKS:
        vectors = guide.get_input_embeddings().weight.detach()
        return students.recurrent(spec, vectors=vectors, labels=labels, seed=lesson.seed), None
    if spec.kind == "smaller":
        if isinstance(guide, networks.PooledClassifier):
            encoder, kept = students.smaller(guide.encoder, spec.layers)
            student = networks.PooledClassifier(encoder, len(labels))
            student.head.load_state_dict(guide.head.state_dict())
            return student.eval(), kept
        if isinstance(guide, networks.SequenceClassifier):
            model, kept = students.smaller(guide.model, spec.layers)
            return networks.SequenceClassifier(model).eval(), kept
        raise ModelError(
            f"{lesson.teacher.name}: fewer layers are taken of transformers' models alone",
            hint='choose student kind "gru" or "lstm"',
        )
    assert lesson.student is not None
    student, own, theirs = classifier.load_classifier(lesson.student)
    if own != labels:
        raise ModelError(
            f"{lesson.student.name} tells {list(own)} apart, its teacher {list(labels)}",
            hint="start both from one fine-tuned classifier",
        )
    if alignment.shared_tokens(theirs, tokenizer, ()) is not None:
        raise ModelError(
            f"{lesson.student.name} numbers its tokens in another way than its teacher",
            hint="prune a classifier's vocabulary after distilling it",
        )
    return student, None


def _write_text_student(lesson: Lesson, student: Any) -> None:
    """The student's directory, of the kind that classifier.load_classifier knows."""
    import shutil

    from edgeslm.stages import classifier, networks, saving, students

    parent, spec, out = lesson.student or lesson.teacher, lesson.spec, lesson.out
    if isinstance(student, students.RecurrentClassifier):
        students.save(student, out, max_tokens=spec.train.context)
        saving.save_tokenizer(None, out, parent=parent)
        for file in parent.licence_files():
            shutil.copyfile(file, out / file.name)
        saving.write_ancestry(out, parent=parent, stage="distill", spec=spec)
    elif isinstance(student, networks.PooledClassifier):
        notes = {"kind": classifier.POOLED}
        saving.save_model(student.encoder, None, out, parent=parent, stage="distill", spec=spec, notes=notes)
        students.write_tensors(out / classifier.HEAD_FILE, student.head.state_dict())
    else:
        saving.save_model(student.model, None, out, parent=parent, stage="distill", spec=spec)


def _train(
    lesson: Lesson,
    guide: Any,
    student: Any,
    *,
    collate: Collate,
    inputs: tuple[str, ...],
    classes: int,
    measure: Measure,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Train the student on the teacher's logits: the record of it, and what both do on the held-out examples."""
    from edgeslm.stages.team import processes
    from edgeslm.stages.train import train

    data, given = lesson.train, lesson.heldout is not None and len(lesson.heldout) > 0
    device = processes().device
    guide.to(device)

    def logits(items: Sequence[dict[str, Any]]) -> Any:
        batch = collate(list(items))
        with answers.answering(guide):
            return guide(*(batch[name].to(device) for name in inputs))

    path = lesson.work / f"teacher-{answers.key(lesson.teacher.digest, answers.dataset_digest(data))}.bin"
    kept = teacher_answers(
        lambda: answers.cache_classes(logits, data, path, classes=classes, progress=lesson.progress)
    )
    heldout = {"teacher": measure(guide), "before": measure(student)} if given else None
    training = train(
        student,
        answers.Taught(data, kept),
        answers.CollateTaught(collate),
        lesson.spec.train,
        lesson.work,
        loss=ClassLoss(lesson.spec, inputs),
        counted=lambda batch: len(batch["labels"]),
        evaluate=(lambda model: measure(model)["log_loss"]) if given else None,
        seed=lesson.seed,
        progress=lesson.progress,
        name="distill",
    )
    return training, None if heldout is None else {**heldout, "after": measure(student)}


@dataclass(frozen=True)
class ClassLoss:
    """The sum over a batch of the divergence from the teacher and the cross-entropy of the true classes.

    inputs: what of the batch the model is called with, in order.
    """

    spec: DistillSpec
    inputs: tuple[str, ...]

    def __call__(self, model: Any, batch: Batch) -> Any:
        from edgeslm.stages import losses

        logits = model(*(batch[name] for name in self.inputs))
        spec = self.spec
        soft = losses.soft_loss(logits, batch[f"{answers.PREFIX}logits"], spec.temperature, spec.divergence)
        return (1 - spec.hard_weight) * soft + spec.hard_weight * losses.hard_loss(logits, batch["labels"])
