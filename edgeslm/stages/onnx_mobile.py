"""A model for the reduced builds of ONNX Runtime that phones and microcomputers carry.

    model.ort                       the graph in ONNX Runtime's own format (a flatbuffer), optimized beforehand
    required_operators.config       the operators that it needs: --include_ops_by_config of ONNX Runtime's build

Both are made by onnxruntime.tools (https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html).
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeslm.atomic import replacing, write_flushed
from edgeslm.errors import EngineError, ModelError, first_line

NAMES = ("model.ort", "required_operators.config")
PLATFORMS = {None: "arm", "arm64": "arm", "avx2": "amd64", "avx512-vnni": "amd64"}
"""OnnxSpec.target to the platform whose kernels the optimized graph is for; phones are Arm."""


def write(data: bytes, folder: Path, *, target: str | None = None) -> dict[str, Path]:
    """Write model.ort and required_operators.config for an ONNX file into `folder`; name to path.

    data: the ONNX file.  target: of OnnxSpec.  Raises EngineError when onnxruntime is missing, ModelError for
    what it can't convert.
    """
    try:
        from onnxruntime.tools import convert_onnx_models_to_ort as tool
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed: model.ort can't be made", hint="pip install 'edgeslm[workstation]'"
        ) from error
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "model.onnx"
        source.write_bytes(data)
        level = logging.getLogger().level
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                tool.convert_onnx_models_to_ort(
                    source,
                    optimization_styles=[tool.OptimizationStyle.Fixed],
                    target_platform=PLATFORMS[target],
                )
        except Exception as error:  # the tool's errors share no class
            raise ModelError(
                f"ONNX Runtime can't convert the model to its mobile format: {first_line(error)}",
                hint="leave mobile out; the ONNX file itself is whole",
            ) from error
        finally:
            logging.getLogger().setLevel(level)
        made = [source.with_suffix(".ort"), source.with_suffix(".required_operators.config")]
        result = {}
        for name, path in zip(NAMES, made, strict=True):
            result[name] = folder / name
            with replacing(result[name]) as beside:
                write_flushed(beside, path.read_bytes())
    return result


def operators(config: str) -> tuple[str, ...]:
    """ "domain:Operator" of a required_operators.config: lines of domain;opset;names."""
    found = set()
    for line in config.splitlines():
        parts = line.split("#")[0].strip().split(";")
        if len(parts) == 3:
            found |= {f"{parts[0]}:{name.strip()}" for name in parts[2].split(",") if name.strip()}
    return tuple(sorted(found))
