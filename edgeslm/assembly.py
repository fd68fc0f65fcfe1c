"""A bundle put together: the exported files, and a manifest that says what they are and where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import card, classifying, language
from edgeslm.bundle import Bundle, write_bundle
from edgeslm.versions import engine_versions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgeslm.learning import Learned
    from edgeslm.recipe import Recipe


def assemble(
    out: Path,
    name: str,
    learned: Learned,
    exported: Any,
    *,
    recipe: Recipe | None,
    quality: Mapping[str, Any] | None,
) -> Bundle:
    """Write the bundle at `out`; recipe: None where a model was quantized without one."""
    checkpoint = learned.checkpoint
    assert checkpoint is not None
    licence = recipe.licence if recipe else None
    model = exported.model | ({"licence": licence} if licence else {})
    is_classifier = "labels" in exported.model
    manifest = {
        "name": name,
        "task": recipe.task if recipe else task_of(exported.model),
        "format": exported.path.suffix.lstrip("."),
        "weights": exported.path.name,
        "model": model,
        "quantization": exported.plan,
        "recipe": {"text": recipe.text, "sha256": recipe.sha256} if recipe else None,
        "ancestry": checkpoint.ancestry(),
        "versions": {name: version for name, version in engine_versions().items() if version},
        "quality": quality,
        "data": {"licence": recipe.data.licence} if recipe else None,
    }
    files: dict[str, Path | str]
    if is_classifier:
        files = dict(exported.files)
        manifest |= classifying.manifest_parts(recipe, exported, learned)
    else:
        files = language.bundle_files(exported)
    files["README.md"] = card.model_card(manifest)
    files |= {path.name: path for path in checkpoint.licence_files()}
    return write_bundle(out, files=files, manifest=manifest)


def task_of(model: Mapping[str, Any]) -> str:
    """What a model is for, by the facts of its export."""
    if "labels" not in model:
        return "causal-lm"
    return "text-classification" if model["preprocessing"]["kind"] == "text" else "sensor-classification"
