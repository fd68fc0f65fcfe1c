"""A model quantized in one go, with no recipe: to a .gguf file or a bundle."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm import classifying, gate, language, measuring
from edgeslm.assembly import assemble
from edgeslm.bundle import check_replaceable
from edgeslm.consistency import check_quantize
from edgeslm.errors import RecipeError
from edgeslm.learning import Learned
from edgeslm.progress import Progress, Quiet
from edgeslm.recipe import usual_scheme
from edgeslm.specs import CalibrateSpec, OnnxSpec, QuantizeSpec
from edgeslm.work import scratch_beside

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.export_onnx import Exported


def quantize(
    model: str,
    out: Path,
    *,
    format: str = "gguf",  # noqa: A002 (the command's word)
    scheme: str | None = None,
    calibration: str | None = None,
    types: Mapping[str, str] | None = None,
    keep_going: bool = False,
    onnx: OnnxSpec | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model source in one go; returns the record edgeslm.quantize/1.

    out: a .gguf file, or the directory of a bundle.  scheme: None: the format's usual one.
    calibration: a source of text, or an importance matrix.  types: regular expression to type, for single
    tensors of a GGUF file.  Raises RecipeError for a format or scheme that the model can't have.
    """
    from edgeslm.stages.checkpoint import resolve
    from edgeslm.stages.classifier import task_of

    progress, start = progress or Quiet(), time.perf_counter()
    is_file = out.suffix == ".gguf"
    if format == "onnx" and out.suffix in (".gguf", ".onnx"):
        raise RecipeError(
            f"{out} is the name of a file: an ONNX model goes with its tokenizer and manifest",
            hint=f"name a bundle directory: --out {out.with_suffix('')}",
        )
    if not is_file:
        check_replaceable(out)
    with scratch_beside(out) as scratch:
        checkpoint = resolve(model, work=scratch, progress=progress)
        task = task_of(checkpoint)
        spec = QuantizeSpec(
            format=format, scheme=scheme or usual_scheme(task, format), types=tuple((types or {}).items()),
            keep_going=keep_going, onnx=onnx or OnnxSpec(),
        )  # fmt: skip
        check_quantize(spec, task, "edgeslm quantize:")
        if task == "causal-lm":
            exported = _language(
                checkpoint, spec, file=out if is_file else None, calibration=calibration, scratch=scratch,
                progress=progress,
            )  # fmt: skip
        else:
            exported = classifying.export_alone(checkpoint, spec, calibration, scratch, progress)
        if is_file:
            size_bytes = out.stat().st_size
        else:
            learned = Learned(checkpoint=checkpoint)
            size_bytes = assemble(out, out.name, learned, exported, recipe=None, quality=None).size_bytes
    return {
        "schema": "edgeslm.quantize/1",
        "path": str(out),
        "kind": "file" if is_file else "bundle",
        "bytes": size_bytes,
        "quantization": exported.plan,
        "warnings": [*checkpoint.warnings, *exported.warnings],
        "seconds": time.perf_counter() - start,
    }


def _language(
    checkpoint: Checkpoint,
    spec: QuantizeSpec,
    *,
    file: Path | None,
    calibration: str | None,
    scratch: Path,
    progress: Progress,
) -> Any:
    """A language model in either format; file: a .gguf to write, None: into `scratch`."""
    from edgeslm.stages import calibrate
    from edgeslm.stages.data import documents

    importance, windows = None, None
    if calibration is not None and is_matrix(calibration):
        importance = Path(calibration)
    elif calibration is not None:
        importance = calibrate.run(
            checkpoint, documents([calibration], progress=progress), CalibrateSpec(), scratch / "importance.gguf",
            chat=measuring.render_messages, sources=[calibration], progress=progress,
        )  # fmt: skip
        if spec.format == "onnx":
            windows = calibrate.token_windows(
                checkpoint, documents([calibration]), language.sensitivity_spec(CalibrateSpec()),
                chat=measuring.render_messages,
            )  # fmt: skip
    if spec.format == "gguf":
        from edgeslm.stages import export_gguf

        return export_gguf.run(
            checkpoint, spec, file or scratch / "model.gguf", importance=importance, progress=progress
        )
    from edgeslm.stages import export_decoder

    exported = export_decoder.run(
        checkpoint, spec, scratch / "model.onnx", importance=importance, windows=windows, progress=progress
    )
    level = exported.plan.get("accuracy_level")
    return exported if windows is None or not level else _audited(exported, level, windows, progress)


def _audited(exported: Exported, level: int, windows: NDArray[np.int64], progress: Progress) -> Exported:
    """With what its accuracy level does to the calibration text, in the plan, and a warning where it is much."""
    from edgeslm.stages import accuracy_level

    audit = accuracy_level.audit(
        exported.path, windows[: language.AUDIT_WINDOWS], levels=(0, level), progress=progress
    )
    kept = gate.level_agreement(audit)
    warnings = list(exported.warnings)
    if kept is not None and kept < gate.LEVEL_AGREEMENT:
        warnings.append(
            f"accuracy level {level} changes the likeliest token of {1 - kept:.1%} of {audit['tokens']:,} positions "
            f"(more than {1 - gate.LEVEL_AGREEMENT:.0%}): 8-bit activations don't suit this model; "
            "try --accuracy-level 0"
        )
    return replace(exported, plan={**exported.plan, "accuracy_audit": audit}, warnings=warnings)


def is_matrix(calibration: str) -> bool:
    """Whether it is an importance matrix, and no text."""
    from edgeslm.stages import calibrate

    return not calibration.startswith("pkg://") and calibrate.is_importance(Path(calibration))
