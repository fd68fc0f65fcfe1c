"""Distillation of causal language models: what the student reads, who answers, and the loss of a batch.

B batch, S sequence, V vocabulary, N counted positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError
from edgeslm.stages import alignment, generations
from edgeslm.stages import teacher as answers
from edgeslm.stages.checkpoint import Checkpoint, model_directory, read_json
from edgeslm.stages.distill import described, teacher_answers, write_record
from edgeslm.stages.finetune import (
    LOGITS_AT_ONCE,
    TOKENS_EVALUATED,
    affordable_evaluations,
    causal_counted,
    check_context,
    check_memory,
)
from edgeslm.stages.prune import text_config
from edgeslm.stages.widths import required_kinds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgeslm.specs import DistillSpec, TrainSpec
    from edgeslm.stages.alignment import Teacher
    from edgeslm.stages.distill import Lesson

PRUNE_FILE = "prune.json"
ON_POLICY_SHARE = 0.5
"""Of the micro-batches whose text the student writes; the others are the data's (lambda of GKD)."""
TEXTS_COMPARED = 8
"""Blocks on which two tokenizers are compared."""

Batch = dict[str, Any]


def distill_language(lesson: Lesson) -> Checkpoint:
    """Distil a causal language model; see edgeslm.stages.distill.run."""
    from edgeslm.stages.saving import save_model
    from edgeslm.stages.team import is_main, wait_for_all
    from edgeslm.stages.train import train

    spec, parent = lesson.spec, lesson.student or lesson.teacher
    heldout = lesson.heldout if lesson.heldout is not None and len(lesson.heldout) else None
    if len(lesson.train) == 0:
        raise DataError("there is nothing to distil on", hint="the training sources hold no blocks")
    context = len(lesson.train[0]["input_ids"])
    guide = lesson.teacher.load()
    check_context(guide, context, lesson.teacher.name, "distill")
    model, kept = _student(lesson, guide)
    check_context(model, context, parent.name, "distill")
    teacher = None if spec.mode == "sequence" else _aligned(lesson, guide, model)
    reached = _reached(teacher, heldout) if is_main() else None
    dataset, collate = _material(lesson, guide, teacher)
    settings = micro_batches(spec.train, vocabulary_rows(model), context)
    learner = _learner(lesson, guide, model)
    check_memory(learner, parent.name, hint="take a smaller student")
    tokens = min(vocabulary_rows(model), len(parent.tokenizer()))
    training = train(
        learner,
        dataset,
        collate,
        settings,
        lesson.work,
        loss=LanguageLoss(spec=spec, teacher=teacher, student=model, kept=tuple(kept), tokens=tokens),
        counted=causal_counted,
        evaluate=None if heldout is None else lambda learner: heldout_loss(learner, heldout),
        evaluations=affordable_evaluations(settings, len(dataset), evaluated(heldout)),
        seed=lesson.seed,
        progress=lesson.progress,
        name="distill",
    )
    if is_main():
        facts = {
            "teacher": described(lesson.teacher, guide),
            "student": {**described(parent, model), "kind": spec.student.kind, "layers": kept},
            "heldout": {"teacher": _as_perplexity(reached), **_ends(training)},
        }
        notes = {"teacher": facts["teacher"]}
        save_model(model.cpu(), None, lesson.out, parent=parent, stage="distill", spec=spec, notes=notes)
        write_record(lesson, facts, training)
    wait_for_all()
    return model_directory(lesson.out, parent.source)


def _reached(teacher: Teacher | None, heldout: Any | None) -> float | None:
    """The teacher's own held-out loss."""
    if teacher is None or heldout is None:
        return None
    _to_accelerator(teacher.model)
    return heldout_loss(teacher, heldout)


def _ends(training: dict[str, Any]) -> dict[str, Any]:
    """The held-out loss before the first step, and that of the weights that were kept."""
    points = {point["step"]: point["loss"] for point in training["evaluations"]}
    if not points:
        return {"before": None, "after": None}
    after = points[training["weights_of_step"]]
    return {"before": _as_perplexity(points.get(0)), "after": _as_perplexity(after)}


def _as_perplexity(loss: float | None) -> dict[str, float] | None:
    return None if loss is None else {"loss": loss, "perplexity": math.exp(loss)}


# --- teacher and student ---


def _student(lesson: Lesson, guide: Any) -> tuple[Any, list[int]]:
    """The student's model, and the teacher's layer that each of its layers comes from."""
    from edgeslm.stages import students

    if lesson.spec.student.kind == "smaller":
        return students.smaller(guide, lesson.spec.student.layers, required_kinds(text_config(guide)))
    assert lesson.student is not None
    model = lesson.student.load()
    count, own = (one.config.get_text_config().num_hidden_layers for one in (guide, model))
    return model, layers_of(lesson.student.path, own, count)


def layers_of(directory: Path, own: int, count: int) -> list[int]:
    """The teacher's layer, of `count`, that each of a student's `own` layers comes from.

    As prune.json says, else evenly spread.
    """
    from edgeslm.stages import students

    if directory.is_dir() and (directory / PRUNE_FILE).is_file():
        dropped = read_json(directory / PRUNE_FILE).get("dropped_layers", [])
        kept = [layer for layer in range(count) if layer not in dropped]
        if len(kept) == own:
            return kept
    return students.spread(count, own) if own < count else [place * count // own for place in range(own)]


def _aligned(lesson: Lesson, guide: Any, model: Any) -> Teacher:
    """The teacher over the student's tokens.  Raises ModelError for different tokenizers."""
    import torch

    parent = lesson.student or lesson.teacher
    compared = range(0, len(lesson.train), -(-len(lesson.train) // TEXTS_COMPARED))
    columns = alignment.shared_tokens(
        parent.tokenizer(),
        lesson.teacher.tokenizer(),
        (lesson.train[index]["input_ids"] for index in compared),
    )
    width = vocabulary_rows(model)
    if columns is None:
        return alignment.Teacher(guide, None, min(width, vocabulary_rows(guide)))
    return alignment.Teacher(guide, torch.from_numpy(columns), min(width, len(columns)))


def vocabulary_rows(model: Any) -> int:
    """V with the rows that pad it."""
    return int(model.get_output_embeddings().weight.shape[0])


def _learner(lesson: Lesson, guide: Any, model: Any) -> Any:
    """What is trained: the student, with a projection where its hidden states are narrower than the teacher's."""
    from edgeslm.stages import students

    spec = lesson.spec
    if spec.attention_weight > 0:  # the fused kernels never hold the shares
        for one in (guide, model):
            one.set_attn_implementation("eager")
    ours, theirs = (one.config.get_text_config().hidden_size for one in (model, guide))
    if spec.hidden_weight > 0 and ours != theirs:
        return students.Projected(model, ours, theirs, seed=lesson.seed)
    return model


def micro_batches(spec: TrainSpec, vocabulary: int, context: int) -> TrainSpec:
    """The settings with a micro-batch whose logits fit into memory, where they name none."""
    if spec.micro_batch:
        return spec
    from edgeslm.stages.team import processes

    room = LOGITS_AT_ONCE.get(processes().device.type, LOGITS_AT_ONCE["cpu"])
    return replace(spec, micro_batch=max(1, min(room // (vocabulary * context), spec.batch_size)))


# --- what is read ---


def _material(
    lesson: Lesson, guide: Any, teacher: Teacher | None
) -> tuple[Any, Callable[[list[dict[str, Any]]], Batch]]:
    """The data set, with the teacher's answers or in the teacher's words where asked, and its collate."""
    from edgeslm.stages.packing import collate_blocks

    spec, data = lesson.spec, lesson.train
    if spec.mode != "sequence" and spec.cache_top_k is None:
        return data, collate_blocks
    made_of: list[Any] = [lesson.teacher.digest, answers.dataset_digest(data)]
    if spec.mode == "sequence":
        writer = _writer(lesson, guide)
        path = lesson.work / f"written-{answers.key(*made_of, lesson.seed)}.bin"
        _to_accelerator(guide)
        records = teacher_answers(lambda: generations.generate(writer, data, path, lesson.progress))
        return generations.Written(records, data, spec.hard_weight, lesson.seed), collate_blocks
    assert teacher is not None
    made_of += [spec.cache_top_k, spec.temperature, teacher.width]
    path = lesson.work / f"teacher-{answers.key(*made_of)}.bin"
    device = _to_accelerator(guide)

    def logits(ids: Any) -> Any:
        with answers.answering(guide):
            return teacher(ids.to(device)).logits

    kept = teacher_answers(
        lambda: answers.cache_top_k(
            logits, data, path, k=spec.cache_top_k or 0, vocabulary=teacher.width,
            temperature=spec.temperature, progress=lesson.progress,
        )
    )  # fmt: skip
    guide.cpu()
    return answers.Taught(data, kept), answers.CollateTaught(collate_blocks)


def _writer(lesson: Lesson, guide: Any) -> generations.Writer:
    own, theirs = (lesson.student or lesson.teacher).tokenizer(), lesson.teacher.tokenizer()
    return generations.Writer(
        teacher=guide,
        own=None if own.get_vocab() == theirs.get_vocab() else theirs,
        student=own,
        ends=end_tokens(guide),
        width=len(theirs),
        seed=lesson.seed,
    )


def end_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that end a text of this model."""
    end = model.generation_config.eos_token_id
    return tuple(end) if isinstance(end, list) else () if end is None else (int(end),)


def _to_accelerator(model: Any) -> Any:
    """Move a model to where it is trained; the device."""
    from edgeslm.stages.team import processes

    device = processes().device
    model.to(device)
    return device


# --- the loss ---


@dataclass(frozen=True, kw_only=True)
class LanguageLoss:
    """The sum over a batch's counted positions; see edgeslm.stages.losses.

    teacher: None where the data are the teacher's words.  student: the bare model, which writes on policy.
    kept: the teacher's layer of each of the student's.  tokens: the student's ids below are tokens, which
    it may write; others pad its vocabulary.
    """

    spec: DistillSpec
    teacher: Teacher | None
    student: Any
    kept: tuple[int, ...]
    tokens: int

    def __call__(self, model: Any, batch: Batch) -> Any:
        """model: the learner, perhaps wrapped for several processes.  batch: {input_ids, labels}, [B, S]."""
        import torch

        if self.spec.mode == "on-policy" and torch.rand(()).item() < ON_POLICY_SHARE:
            written = self._rewritten(batch)
            total = self._of_text(model, written, hard_weight=0.0)
            return total * (
                causal_counted(batch) / max(1, causal_counted(written))
            )  # as many as the batch counts
        return self._of_text(model, batch, hard_weight=1.0 if self.teacher is None else self.spec.hard_weight)

    def _rewritten(self, batch: Batch) -> Batch:
        """The batch with the student's own continuation of each block's prompt."""
        import torch

        rows = zip(batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy(), strict=True)
        prompts = [list(ids[: generations.prompt_length(labels)]) for ids, labels in rows]
        context, end = batch["input_ids"].shape[1], end_tokens(self.student)
        assert self.teacher is not None
        width = min(self.teacher.width, self.tokens)
        written = generations.continue_texts(self.student, prompts, context, end=end, width=width)
        blocks = generations.as_blocks(prompts, written, context, end[0] if end else 0)
        device = batch["input_ids"].device
        ids, labels = (torch.from_numpy(part).to(device) for part in blocks)
        return {"input_ids": ids, "labels": labels}

    def _of_text(self, model: Any, batch: Batch, *, hard_weight: float) -> Any:
        from edgeslm.stages import losses

        spec, labels = self.spec, batch["labels"][:, 1:]
        asked = {
            "output_hidden_states": spec.hidden_weight > 0,
            "output_attentions": spec.attention_weight > 0,
        }
        mask = labels != generations.NOT_COUNTED
        ours = model(input_ids=batch["input_ids"], use_cache=False, **asked)
        rows, true = ours.logits[:, :-1][mask], labels[mask]
        if self.teacher is None:
            return losses.by_rows(losses.hard_loss, rows, true)
        width, heat, kind = self.teacher.width, spec.temperature, spec.divergence

        def mixed(student: Any, true: Any, *theirs: Any) -> Any:
            if len(theirs) == 1:
                soft = losses.soft_loss(student[:, :width], theirs[0], heat, kind)
            else:
                soft = losses.top_k_loss(student[:, :width], losses.TopK(*theirs), heat, kind)
            return (1 - hard_weight) * soft + hard_weight * losses.hard_loss(student, true)

        if f"{answers.PREFIX}ids" in batch:
            kept = [batch[answers.PREFIX + name][:, :-1][mask] for name in losses.TopK._fields]
            return losses.by_rows(mixed, rows, true, *kept)
        theirs = self.teacher(batch["input_ids"], **asked)
        total = losses.by_rows(mixed, rows, true, theirs.logits[:, :-1][mask])
        return total + self._match(ours, theirs, mask)

    def _match(self, ours: Any, theirs: Any, mask: Any) -> Any:
        """The weighted distances of hidden states and attention, each the mean over the layers."""
        from edgeslm.stages import losses

        total: Any = 0.0
        if self.spec.hidden_weight > 0:
            pairs = alignment.layer_pairs(self.kept, len(theirs.hidden_states) - 1)
            distance = sum(
                losses.hidden_match(ours.hidden_states[a][:, :-1], theirs.hidden_states[b][:, :-1], mask)
                for a, b in pairs
            )
            total = total + self.spec.hidden_weight / len(pairs) * distance
        if self.spec.attention_weight > 0:
            distance = sum(
                losses.attention_match(ours.attentions[a][:, :, :-1], theirs.attentions[b][:, :, :-1], mask)
                for a, b in enumerate(self.kept)
            )
            total = total + self.spec.attention_weight / len(self.kept) * distance
        return total


def evaluated(blocks: Any | None) -> int:
    """Blocks that an evaluation goes through."""
    if blocks is None:
        return 0
    return min(len(blocks), max(1, TOKENS_EVALUATED // len(blocks[0]["input_ids"])))


def heldout_loss(model: Any, blocks: Any) -> float:
    """Mean nats per counted token over at most TOKENS_EVALUATED tokens, in blocks spread evenly.

    model: a causal model or a teacher.  Raises DataError where nothing counts.
    """
    import torch

    from edgeslm.stages import losses

    bare = model.model if isinstance(model, alignment.Teacher) else model
    device = next(bare.parameters()).device
    total, count, most = 0.0, 0, evaluated(blocks)
    for place in range(most):
        block = blocks[place * len(blocks) // most]
        ids, labels = (torch.from_numpy(block[name]).to(device) for name in ("input_ids", "labels"))
        with torch.inference_mode():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            mask = labels[1:] != generations.NOT_COUNTED
            total += float(losses.hard_loss(logits[mask], labels[1:][mask]))
        count += int(mask.sum())
    if not count:
        raise DataError(
            "the held-out text counts no token", hint="hold out more, or leave completion_only out"
        )
    return total / count
