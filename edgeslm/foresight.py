"""What would fail after hours of training, found before it begins: settings, tokenizers, shapes of no exporter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from edgeslm.specs import PruneSpec
from edgeslm.versions import chosen_versions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgeslm.recipe import Recipe
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.work import Work


def resolved(source: str, recipe: Recipe, store: Work) -> Checkpoint:
    """A model source of the recipe.  Of several processes the main one fetches it."""
    from edgeslm.stages.checkpoint import resolve

    if store.team is not None and not store.writes:
        store.team.wait()
    checkpoint = resolve(source, base=recipe.base, work=store.path, progress=store.progress)
    if store.team is not None and store.writes:
        store.team.wait()
    return checkpoint


def named_teacher(recipe: Recipe, store: Work) -> Checkpoint | None:
    """The teacher that the recipe names; None for the model as it was before pruning."""
    if recipe.distill is None or recipe.distill.teacher is None:
        return None
    return resolved(recipe.distill.teacher, recipe, store)


def check_distill(recipe: Recipe, checkpoint: Checkpoint | None, teacher: Checkpoint | None) -> None:
    """Raise what distilling would: RecipeError for settings, ModelError for a teacher with another tokenizer.

    checkpoint: the recipe's model; None for sensors.  teacher: the one that the recipe names.
    """
    from edgeslm.stages import alignment, distill

    spec = recipe.distill
    if spec is None:
        return
    pruned = spec.student.kind == "pruned"
    distill.check(spec, recipe.task, has_student=pruned and checkpoint is not None)
    if recipe.task == "causal-lm" and pruned and spec.mode != "sequence" and teacher and checkpoint:
        alignment.shared_tokens(checkpoint.tokenizer(), teacher.tokenizer(), ())


def artifacts(recipe: Recipe) -> tuple[QuantizeSpec, ...]:
    """What will be made of the checkpoint."""
    return tuple(variant.quantize for variant in recipe.variants) or (recipe.quantize,)


def prove_cuts(recipe: Recipe, checkpoint: Checkpoint, teacher: Checkpoint | None, store: Work) -> None:
    """Show on tiny copies that what pruning will leave can be exported, before hours go into training."""
    made_of = artifacts(recipe)
    for start, spec in _cuts(recipe, checkpoint, teacher):

        def produce(directory: Path, start: Checkpoint = start, spec: PruneSpec = spec) -> None:
            from edgeslm.stages import prune

            prune.prove(start, spec, artifacts=made_of, seed=recipe.seed, progress=store.progress)
            (directory / "proved.json").write_text("{}", encoding="utf-8")

        versions = chosen_versions("edgeslm", "torch", "transformers", "gguf", "llama_cpp_python")
        inputs = {
            "spec": asdict(spec),
            "model": start.digest,
            "artifacts": [asdict(one) for one in made_of] if spec.target_bytes is not None else None,
            "seed": recipe.seed,
            "versions": versions,
        }
        store.stage("prove", inputs, produce)


def _cuts(
    recipe: Recipe, checkpoint: Checkpoint, teacher: Checkpoint | None
) -> Iterator[tuple[Checkpoint, PruneSpec]]:
    """(model, what will be cut of it) behind a training, or by distilling into fewer layers."""
    if recipe.prune is not None and recipe.finetune is not None:
        yield checkpoint, recipe.prune
    distill = recipe.distill
    if recipe.task == "causal-lm" and distill is not None and distill.student.kind == "smaller":
        from edgeslm.stages import prune, students

        start = teacher or checkpoint
        layers = prune.read_config(start)["num_hidden_layers"]
        students.spread(layers, distill.student.layers)
        yield start, PruneSpec(drop_layers=layers - distill.student.layers)
