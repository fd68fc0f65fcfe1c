"""What a recipe's tables have to agree on: rules that need more than one key, each with one clear error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeslm.errors import RecipeError
from edgeslm.recipe_tables import ONNX_SCHEMES, SCHEMES

if TYPE_CHECKING:
    from edgeslm.recipe import Recipe
    from edgeslm.specs import QuantizeSpec

FORMATS = {
    "causal-lm": ("gguf", "onnx"),
    "text-classification": ("onnx",),
    "sensor-classification": ("onnx",),
}
"""Task to the formats that its bundles may have, the usual one first."""
TABLES_OF = {
    "windows": ("sensor-classification",),
    "simulate": ("sensor-classification",),
    "scrub": ("causal-lm", "text-classification"),
    "prune": ("causal-lm",),
    "decide": ("text-classification", "sensor-classification"),
}
"""Table to the tasks that know it."""
BOUNDS_OF = {
    "causal-lm": (
        "max_kl_nats",
        "min_top1_agreement",
        "max_perplexity_ratio",
        "min_decode_tokens_per_s",
        "min_level_agreement",
    ),
    "text-classification": ("min_accuracy", "min_macro_f1"),
    "sensor-classification": ("min_accuracy", "min_macro_f1"),
}
"""Task to the bounds of quality and speed that only it has."""

RESERVED = ("report.html", "report.md", "report.json", "manifest.json")
"""Names that no variant can have."""


def check_together(recipe: Recipe, where: str, given: frozenset[str]) -> None:
    """Raise RecipeError for tables that contradict each other.  given: names of the tables in the file."""
    _check_task(recipe, where, given)
    _check_variants(recipe, where, given)
    _check_data(recipe, where)
    _check_training(recipe, where)
    _check_windows(recipe, where)


def _check_task(recipe: Recipe, where: str, given: frozenset[str]) -> None:
    """Tables, bounds, model and format belong to the task."""
    for table, tasks in TABLES_OF.items():
        if table in given and recipe.task not in tasks:
            raise RecipeError(
                f"{where}: [{table}] has no meaning for the task {recipe.task}",
                hint=f"it belongs to {' and '.join(tasks)}: remove it, or change the task",
            )
    for task, bounds in BOUNDS_OF.items():
        for bound in bounds:
            value = getattr(recipe.gate, bound)
            if value is not None and bound not in BOUNDS_OF[recipe.task]:
                raise RecipeError(
                    f"{where}: [gate] {bound} = {value} has no meaning for the task {recipe.task}",
                    hint=f"it belongs to {task}",
                )
    if recipe.model is None and recipe.task != "sensor-classification":
        raise RecipeError(
            f"{where}: the top level: 'model' is missing", hint="it holds a string: a model source"
        )
    check_quantize(recipe.quantize, recipe.task, f"{where}: [quantize]")


def _check_variants(recipe: Recipe, where: str, given: frozenset[str]) -> None:
    """Each variant is a directory of its own beside the report, and something that the task can have."""
    if recipe.variants and "quantize" in given:
        raise RecipeError(
            f"{where}: both [quantize] and [[variants]] say what to make",
            hint="keep one of them: a variant holds the keys of [quantize] and a name",
        )
    seen: set[str] = set()
    for variant in recipe.variants:
        name = variant.name.casefold()  # one directory on some file systems
        if name in seen or name in RESERVED:
            raise RecipeError(
                f"{where}: [[variants]] name = {variant.name!r} is taken"
                + (" by the report" if name in RESERVED else " by another variant"),
                hint="each variant's bundle is a directory of its name",
            )
        seen.add(name)
        check_quantize(variant.quantize, recipe.task, f"{where}: [variants.{variant.name}]")


def check_quantize(spec: QuantizeSpec, task: str, where: str) -> None:
    """Raise RecipeError for a format or scheme that the task does not have.  where: file and table."""
    formats = FORMATS[task]
    if spec.format not in formats:
        raise RecipeError(
            f"{where} format = {spec.format!r} can't hold the task {task}",
            hint=f"set format = {formats[0]!r}, or leave [quantize] out",
        )
    schemes = SCHEMES if spec.format == "gguf" else ONNX_SCHEMES
    if spec.scheme not in schemes:
        raise RecipeError(
            f"{where} scheme = {spec.scheme!r} is not of the format {spec.format}",
            hint=f"one of {', '.join(schemes)}",
        )
    if spec.scheme == "int8-static" and task == "causal-lm":
        raise RecipeError(
            f"{where} scheme = 'int8-static' has no meaning for the task {task}",
            hint="fixed ranges of activations are for classifiers: take int8-dynamic",
        )
    if spec.onnx.mobile and task == "causal-lm":
        raise RecipeError(
            f"{where} mobile has no meaning for the task {task}",
            hint="model.ort keeps its weights inside and is for classifiers: leave it out",
        )
    if spec.types and task != "causal-lm":
        raise RecipeError(
            f"{where} types has no meaning for the task {task}", hint="set sensitive in [quantize.onnx]"
        )


def _check_data(recipe: Recipe, where: str) -> None:
    data, gate = recipe.data, recipe.gate
    if data.heldout and data.heldout_every:
        raise RecipeError(
            f"{where}: [data] has both heldout and heldout_every = {data.heldout_every}",
            hint="keep one of them",
        )
    if data.heldout_every and not (data.calibration or recipe.simulate):
        raise RecipeError(
            f"{where}: [data] heldout_every = {data.heldout_every} has nothing to divide",
            hint="it holds out examples of train, or of calibration: name some",
        )
    quality = [name for name in BOUNDS_OF[recipe.task] if "decode" not in name]
    asked = [name for name in quality if getattr(gate, name) is not None]
    if asked and not _has_heldout(recipe):
        raise RecipeError(
            f"{where}: [gate] {asked[0]} = {getattr(gate, asked[0])} needs held-out text",
            hint="name some: set heldout or heldout_every in [data]",
        )
    if recipe.simulate and (data.train or data.heldout or data.heldout_every):
        raise RecipeError(
            f"{where}: [simulate] makes the data, and [data] names some too", hint="keep one of them"
        )
    for table, tokens, context in (
        ("calibrate", "tokens", recipe.calibrate.context),
        ("evaluate", "max_tokens", recipe.evaluate.context),
    ):
        value = getattr(getattr(recipe, table), tokens)
        if value is not None and value < context:
            raise RecipeError(
                f"{where}: [{table}] {tokens} = {value} is less than one window of context = {context}",
                hint=f"raise {tokens} or lower context",
            )


def _has_heldout(recipe: Recipe) -> bool:
    return bool(recipe.data.heldout or recipe.data.heldout_every or recipe.simulate)


def _check_training(recipe: Recipe, where: str) -> None:
    """What fine-tuning, pruning and distilling need of each other and of the data."""
    finetune, prune, distill = recipe.finetune, recipe.prune, recipe.distill
    for table, spec in (("finetune", finetune), ("distill", distill)):
        if spec is None:
            continue
        if not (recipe.data.train or recipe.simulate):
            raise RecipeError(f"{where}: [{table}] has nothing to learn from", hint="set train in [data]")
        steps = spec.train
        if steps.micro_batch is not None and steps.micro_batch > steps.batch_size:
            raise RecipeError(
                f"{where}: [{table}.train] micro_batch = {steps.micro_batch} is more than "
                f"batch_size = {steps.batch_size}",
                hint="lower it: it is the part of a batch that is computed at once",
            )
        if steps.patience is not None and not _has_heldout(recipe):
            raise RecipeError(
                f"{where}: [{table}.train] patience = {steps.patience} needs held-out examples",
                hint="set heldout or heldout_every in [data]",
            )
    if prune is not None and prune.target is not None and prune.target_bytes is not None:
        raise RecipeError(
            f"{where}: [prune] has both target = {prune.target:g} and target_bytes = {prune.target_bytes}",
            hint="keep one of them",
        )
    if prune is not None and not recipe.data.calibration:
        raise RecipeError(
            f"{where}: [prune] measures importance on text, and there is none",
            hint="set train or calibration in [data]",
        )
    if finetune is not None and finetune.method == "head-only" and recipe.task != "text-classification":
        raise RecipeError(
            f"{where}: [finetune] method = 'head-only' has no meaning for the task {recipe.task}",
            hint="it trains the head of a text classifier: take full or lora",
        )
    if distill is None:
        return
    kind = distill.student.kind
    if kind in ("gru", "lstm") and recipe.task == "causal-lm":
        raise RecipeError(
            f"{where}: [distill.student] kind = {kind!r} does not generate text",
            hint="a recurrent student is for classification: take pruned or smaller",
        )
    if kind == "pruned" and prune is None and distill.teacher is None:
        raise RecipeError(
            f"{where}: [distill] would teach the model to be itself",
            hint="add [prune], name another teacher, or set kind in [distill.student]",
        )
    if distill.mode != "logits" and recipe.task != "causal-lm":
        raise RecipeError(
            f"{where}: [distill] mode = {distill.mode!r} has no meaning for the task {recipe.task}",
            hint="nothing is generated there: take logits",
        )


def _check_windows(recipe: Recipe, where: str) -> None:
    windows = recipe.windows
    if windows.stride is not None and windows.stride > windows.rows:
        raise RecipeError(
            f"{where}: [windows] stride = {windows.stride} is more than rows = {windows.rows}",
            hint="readings between two windows would never be seen: lower it",
        )
    if recipe.columns.ordinal and not recipe.columns.labels:
        raise RecipeError(
            f"{where}: [columns] ordinal = true needs the order of the grades",
            hint="list them from the lowest up: labels = [...]",
        )
