"""ONNX Runtime sessions: threads, execution providers with what becomes of them, and failures in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeslm import operators
from edgeslm.errors import EngineError, RecipeError, first_line

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.onnx_file import OnnxFile

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
}
"""What a user calls an execution provider, and what ONNX Runtime does."""
CPU = "cpu"
MAX_THREADS = 512


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loaded session and where it runs."""

    session: Any
    """onnxruntime.InferenceSession."""
    provider: str
    """The one in force, a key of PROVIDERS; operators that it lacks run on the CPU."""
    notes: tuple[str, ...]
    """What could not be done as asked."""


def open_session(weights: Path, *, threads: int, provider: str | None = None) -> Opened:
    """Load an ONNX file; where `provider` is missing or refuses the graph, on the CPU, with a note.

    Raises RecipeError for an unknown provider, EngineError when ONNX Runtime is missing or refuses the file.
    """
    if provider is not None and provider not in PROVIDERS:
        raise RecipeError(
            f"unknown execution provider {provider!r}", hint=f"one of {', '.join(sorted(PROVIDERS))}"
        )
    onnxruntime = load_onnxruntime()
    wanted = provider or CPU
    if wanted == CPU:
        return Opened(session=_load(onnxruntime, weights, threads, CPU), provider=CPU, notes=())
    if PROVIDERS[wanted] not in onnxruntime.get_available_providers():
        note = f"this build of ONNX Runtime has no {wanted}: the model runs on the CPU"
        return Opened(session=_load(onnxruntime, weights, threads, CPU), provider=CPU, notes=(note,))
    try:
        session = _load(onnxruntime, weights, threads, wanted)
    except EngineError as error:
        note = f"{wanted} refuses this model ({error.message}): it runs on the CPU"
        return Opened(session=_load(onnxruntime, weights, threads, CPU), provider=CPU, notes=(note,))
    if PROVIDERS[wanted] not in session.get_providers():
        return Opened(
            session=session, provider=CPU, notes=(f"{wanted} did not start: the model runs on the CPU",)
        )
    return Opened(session=session, provider=wanted, notes=())


def check_operators(file: OnnxFile) -> None:
    """Raise EngineError for operators, an opset or an IR version that the installed ONNX Runtime lacks."""
    operators.check(file, str(load_onnxruntime().__version__))


def load_onnxruntime() -> Any:
    """The module; EngineError with the way out where it is missing or does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"onnxruntime is not installed or does not load: {first_line(error)}",
            hint="pip install 'edgeslm[onnx]'",
        ) from error
    return onnxruntime


def _load(onnxruntime: Any, weights: Path, threads: int, provider: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # failures come as exceptions, with the same words
    try:
        return onnxruntime.InferenceSession(weights, options, providers=_chain(provider, threads))
    except Exception as error:  # the engine's errors share no class of their own
        raise EngineError(
            f"{weights.name}: ONNX Runtime does not load this model: {first_line(error)}",
            hint="a newer onnxruntime may know its operators",
        ) from error


def _chain(provider: str, threads: int) -> list[Any]:
    """Providers in the order of preference; XNNPACK has a pool of threads of its own."""
    if provider == CPU:
        return [PROVIDERS[CPU]]
    own = {"intra_op_num_threads": str(threads)} if provider == "xnnpack" else {}
    return [(PROVIDERS[provider], own), PROVIDERS[CPU]]
