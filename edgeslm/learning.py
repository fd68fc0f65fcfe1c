"""A recipe's first half: a checkpoint becomes a smaller one that knows its domain.

    data -> fine-tune -> prune -> distill -> the checkpoint that is quantized

Pruning comes before distilling, which heals it; the teacher is the model as it was before.  Where the
vocabulary is pruned, the teacher's is first, so that both speak of the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeslm import foresight, measuring
from edgeslm.atomic import assembling
from edgeslm.errors import ModelError
from edgeslm.progress import Quiet
from edgeslm.specs import FinetuneSpec, PruneSpec
from edgeslm.versions import chosen_versions
from edgeslm.work import open_work, read_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgeslm.progress import Progress
    from edgeslm.recipe import Recipe
    from edgeslm.specs import ColumnsSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.work import Work

STAGES = ("simulate", "prove", "data", "finetune", "prune", "distill")
"""The stages that keep a result, in their order."""
CALIBRATION_CONTEXT = 512
"""Tokens of a window that pruning measures importance on."""
RECURRENT = ("gru", "lstm")


@dataclass(kw_only=True)
class Learned:
    """What the first half has made so far; `checkpoint` is what the second half quantizes."""

    checkpoint: Checkpoint | None
    data: dict[str, Any] | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    """Records edgeslm.training/1, each with the stage that it is of."""
    prune: dict[str, Any] | None = None
    sets: Any = None
    """The examples: .train and .heldout; None where nothing was trained."""
    columns: ColumnsSpec | None = None
    """What the columns hold, where a simulation named them."""
    data_key: str | None = None
    """What identifies the examples."""


def learn(recipe: Recipe, checkpoint: Checkpoint | None, store: Work) -> Learned:
    """Run the stages that the recipe asks for.  checkpoint: None for sensors, which start from nothing."""
    if recipe.task == "sensor-classification":
        foresight.check_distill(recipe, None, None)
        return _learn_sensors(recipe, checkpoint, store)
    assert checkpoint is not None
    learned = Learned(checkpoint=checkpoint)
    named = foresight.named_teacher(recipe, store)
    foresight.check_distill(recipe, checkpoint, named)
    foresight.prove_cuts(recipe, checkpoint, named, store)
    if recipe.finetune is not None:
        _finetune(recipe, learned, store)
    teacher = learned.checkpoint
    if recipe.prune is not None:
        cut_tokens, cut_rest = split_spec(recipe.prune)
        if cut_tokens is not None:
            _prune(recipe, learned, cut_tokens, store)
            teacher = learned.checkpoint
        if cut_rest is not None:
            before = learned.prune["tokens"]["before"] if learned.prune is not None else None
            _prune(recipe, learned, cut_rest, store, tokens_before=before)
    if recipe.distill is not None:
        _distill(recipe, learned, named or teacher, store)
    return learned


def starting_point(recipe: Recipe, store: Work) -> Checkpoint | None:
    """The recipe's model; None for sensors without one.  Of several processes the main one fetches it."""
    return None if recipe.model is None else foresight.resolved(recipe.model, recipe, store)


def make_checkpoint(
    recipe: Recipe,
    out: Path,
    *,
    work: Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Run the first half alone and put its model directory at `out`; returns the record edgeslm.checkpoint/1.

    processes: how many a launcher started; None in all but the main one.  Raises ModelError when
    something else is at `out`.
    """
    check_writable(out)
    with open_work(
        work or out.with_name(out.name + ".work"), frozenset(), progress or Quiet(), team(processes)
    ) as store:
        learned = learn(recipe, starting_point(recipe, store), store)
        if store.team is not None:
            store.team.leave()
        if learned.checkpoint is None or not store.writes:
            return None
        with assembling(out) as beside:
            shutil.copytree(
                learned.checkpoint.path,
                beside,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("stage.json"),
            )
        return {
            "schema": "edgeslm.checkpoint/1",
            "path": str(out),
            "parameters": learned.checkpoint.parameters,
            "data": learned.data,
            "training": learned.training,
            "prune": learned.prune,
            "stages": store.stages,
        }


def check_writable(out: Path) -> None:
    """Only an empty directory, or a model directory that edgeslm wrote, may be replaced."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "edgeslm.json").is_file()):
        raise ModelError(
            f"{out} is there, and is no model that edgeslm made", hint="choose another name for the model"
        )


def team(processes: int) -> Any:
    """The processes that `accelerate launch` started with this one; None when it runs alone."""
    from edgeslm.stages.team import join

    return join(processes)


def split_spec(spec: PruneSpec) -> tuple[PruneSpec | None, PruneSpec | None]:
    """(what prunes the vocabulary, what prunes the rest); None where there is nothing of the kind."""
    rest = replace(spec, vocabulary=False)
    tokens = replace(PruneSpec(), vocabulary=True, multiple=spec.multiple) if spec.vocabulary else None
    idle = replace(PruneSpec(), layers_by=spec.layers_by, multiple=spec.multiple)
    return tokens, None if rest == idle else rest


# --- sensors ---


def _learn_sensors(recipe: Recipe, checkpoint: Checkpoint | None, store: Work) -> Learned:
    """Windows of tables or of simulated bearings; a network of the recipe's own, or one that was trained before."""
    from edgeslm.stages import distill, sensor_training, sensors

    learned = Learned(checkpoint=checkpoint)
    sources, columns = sensor_sources(recipe, store)
    windows = learned.sets = sensors.prepare(
        *sources, columns, recipe.windows, store.scratch("windows"), heldout_every=recipe.data.heldout_every,
        seed=recipe.seed, base=recipe.base, progress=store.progress, max_bad=recipe.data.max_bad_rows,
    )  # fmt: skip
    learned.data, learned.columns = windows.report, columns
    inputs = {
        "columns": asdict(columns),
        "windows": asdict(recipe.windows),
        "data": [sources_digest(side, recipe) for side in sources],
        "every": recipe.data.heldout_every,
        "seed": recipe.seed,
        "versions": chosen_versions("edgeslm", "torch", "accelerate", "numpy"),
    }
    learned.data_key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    for stage, spec in (("finetune", recipe.finetune), ("distill", recipe.distill)):
        if spec is None:
            continue
        teacher = learned.checkpoint

        def produce(directory: Path, kept: Path, spec: Any = spec, teacher: Any = teacher) -> None:
            train, heldout = windows.train, windows.heldout
            if isinstance(spec, FinetuneSpec):
                sensor_training.run(
                    spec, directory, train=train, heldout=heldout, work=kept, seed=recipe.seed,
                    progress=store.progress,
                )  # fmt: skip
            else:
                distill.run(
                    teacher, None, spec, directory, task=recipe.task, train=train, heldout=heldout, work=kept,
                    seed=recipe.seed, progress=store.progress, labels=train.labels,
                )  # fmt: skip

        given = inputs | {"spec": asdict(spec), "model": teacher and teacher.digest}
        _take(learned, stage, store.long_stage(stage, given, produce), recipe)
    return learned


def sensor_sources(
    recipe: Recipe, store: Work
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ColumnsSpec]:
    """((training tables, held-out tables), what their columns hold)."""
    from edgeslm.stages import simulate

    spec = recipe.simulate
    if spec is None:
        return (recipe.data.train, recipe.data.heldout), recipe.columns

    def produce(directory: Path) -> None:
        simulate.run(spec, directory, progress=store.progress)

    directory = store.stage(
        "simulate", {"spec": asdict(spec), "versions": chosen_versions("edgeslm", "numpy")}, produce
    )
    return ((str(directory / "train.csv"),), (str(directory / "heldout.csv"),)), simulate.COLUMNS


def sources_digest(sources: Sequence[str], recipe: Recipe) -> str:
    from edgeslm.stages import tables

    return tables.sources_digest(sources, base=recipe.base)


# --- language models and text classifiers ---


def _finetune(recipe: Recipe, learned: Learned, store: Work) -> None:
    from edgeslm.stages import finetune
    from edgeslm.stages.examples import open_sets

    spec, checkpoint = recipe.finetune, learned.checkpoint
    assert spec is not None
    assert checkpoint is not None
    examples = _examples(recipe, checkpoint, spec.train.context, store)

    def produce(directory: Path, kept: Path) -> None:
        sets = open_sets(recipe.task, examples)
        finetune.run(
            checkpoint, spec, directory, train=sets.train, heldout=sets.heldout, work=kept, seed=recipe.seed,
            progress=store.progress, labels=None if recipe.task == "causal-lm" else sets.labels,
        )  # fmt: skip

    inputs = _inputs(recipe, checkpoint, spec, examples)
    _take(learned, "finetune", store.long_stage("finetune", inputs, produce), recipe)
    _note_examples(recipe, learned, examples)


def _prune(
    recipe: Recipe, learned: Learned, spec: PruneSpec, store: Work, *, tokens_before: int | None = None
) -> None:
    """tokens_before: of the model before its vocabulary was pruned, where it was."""
    from edgeslm.stages import prune, target
    from edgeslm.stages.data import calibration_documents, data_digest

    checkpoint, made_of = learned.checkpoint, foresight.artifacts(recipe)
    assert checkpoint is not None

    def produce(directory: Path) -> None:
        prune.run(
            checkpoint, spec, directory, documents=lambda: calibration_documents(recipe, store.progress),
            context=CALIBRATION_CONTEXT, tokens=recipe.calibrate.tokens, chat=measuring.render_turns, seed=recipe.seed,
            artifacts=made_of, tokens_before=tokens_before, progress=store.progress,
        )  # fmt: skip

    inputs = {
        "spec": asdict(spec),
        "model": checkpoint.digest,
        "data": data_digest(recipe, recipe.data.calibration),
        "tokens": recipe.calibrate.tokens,
        "artifacts": [asdict(one) for one in made_of] if spec.target_bytes is not None else None,
        "tokens_before": tokens_before if target.asked(spec) else None,
        "seed": recipe.seed,
        "versions": chosen_versions("edgeslm", "torch", "transformers"),
    }
    directory = store.stage("prune", inputs, produce)
    before = learned.prune
    _take(learned, "prune", directory, recipe)
    learned.prune = read_record(directory / "prune.json") | ({"before": before} if before else {})


def _distill(recipe: Recipe, learned: Learned, teacher: Checkpoint | None, store: Work) -> None:
    """teacher: the model before pruning, or the one that the recipe names."""
    from edgeslm.stages import distill
    from edgeslm.stages.examples import open_sets

    spec = recipe.distill
    assert spec is not None
    assert teacher is not None
    student = learned.checkpoint if spec.student.kind == "pruned" else None
    examples = _examples(recipe, student or teacher, spec.train.context, store)

    def produce(directory: Path, kept: Path) -> None:
        sets = open_sets(recipe.task, examples)
        distill.run(
            teacher, student, spec, directory, task=recipe.task, train=sets.train, heldout=sets.heldout,
            work=kept, seed=recipe.seed, progress=store.progress,
            labels=None if recipe.task == "causal-lm" else sets.labels,
        )  # fmt: skip

    inputs = _inputs(recipe, teacher, spec, examples) | {"student": student and student.digest}
    _take(learned, "distill", store.long_stage("distill", inputs, produce), recipe)
    _note_examples(recipe, learned, examples)


def _examples(recipe: Recipe, checkpoint: Checkpoint, context: int, store: Work) -> Path:
    """The directory of the data sets for a checkpoint's tokenizer."""
    from edgeslm.stages import examples
    from edgeslm.stages.checkpoint import tokenizer_digest
    from edgeslm.stages.tables import sources_digest

    names = recipe.scrub.names if recipe.scrub else ()
    inputs = {
        "task": recipe.task,
        "data": asdict(recipe.data),
        "columns": asdict(recipe.columns),
        "scrub": recipe.scrub and asdict(recipe.scrub),
        "sources": [
            sources_digest(sources, base=recipe.base)
            for sources in (recipe.data.train, recipe.data.heldout, names)
        ],
        "tokenizer": tokenizer_digest(checkpoint),
        "context": context,
        "seed": recipe.seed,
        "versions": chosen_versions("edgeslm", "transformers", "tokenizers"),
    }
    return store.stage(
        "data",
        inputs,
        lambda directory: examples.prepare(
            recipe,
            checkpoint.tokenizer(),
            context,
            directory,
            chat=measuring.render_turns,
            progress=store.progress,
        ),
    )


def _note_examples(recipe: Recipe, learned: Learned, examples: Path) -> None:
    """Keep what the first training stage learned from: later ones only tokenize it anew."""
    from edgeslm.stages.examples import open_sets

    if learned.data is None:
        learned.sets = open_sets(recipe.task, examples)
        learned.data = learned.sets.record
        learned.data_key = read_record(examples / "stage.json")["key"]


def _inputs(recipe: Recipe, checkpoint: Checkpoint, spec: Any, examples: Path) -> dict[str, Any]:
    """What decides the bytes of a trained model."""
    return {
        "task": recipe.task,
        "spec": asdict(spec),
        "model": checkpoint.digest,
        "data": read_record(examples / "stage.json")["key"],
        "seed": recipe.seed,
        "versions": chosen_versions("edgeslm", "torch", "transformers", "accelerate", "peft"),
    }


def _take(learned: Learned, stage: str, directory: Path, recipe: Recipe) -> None:
    """Go on with the model that a stage wrote."""
    from edgeslm.stages.checkpoint import model_directory

    before = learned.checkpoint
    name = before.name if before is not None else recipe.name
    warnings = before.warnings if before is not None else ()
    source = before.source if before is not None else "sensor tables"
    learned.checkpoint = replace(model_directory(directory, source), name=name, warnings=warnings)
    if (directory / "training.json").exists():
        learned.training.append({**read_record(directory / "training.json"), "stage": stage})
