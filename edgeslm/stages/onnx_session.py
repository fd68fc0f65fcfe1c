"""Running a decoder's graph on calibration text, from memory, with the weights where they lie.

B windows, S tokens, P tokens before, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import EngineError, ModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

FOLDER_KEY = "session.model_external_initializers_file_folder_path"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def load_onnxruntime(without: str) -> Any:
    """The module; EngineError, which says what can't be done without it, where it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            f"onnxruntime is not installed: {without}", hint="pip install 'edgeslm[workstation]'"
        ) from error
    return onnxruntime


def open_session(model: Any, folder: Path, *, threads: int = 0) -> Any:
    """An onnxruntime.InferenceSession of a ModelProto whose external data lie in `folder`.

    threads: 0: as many as there are cores.  Raises EngineError without onnxruntime, ModelError for a graph
    that it refuses.
    """
    onnxruntime = load_onnxruntime("nothing can be measured on the graph")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry(FOLDER_KEY, str(folder.resolve()))
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the engine's own errors share no class
        raise ModelError(f"ONNX Runtime refuses the graph: {first_line(error)}") from error


def feeds(
    session: Any, tokens: NDArray[np.int64], *, first: int = 0, past: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs for [B, S] tokens behind a cache (None: an empty one); first: of the logits, where the graph can."""
    held = 0 if not past else next(iter(past.values())).shape[2]
    given: dict[str, NDArray[Any]] = {
        "input_ids": tokens.astype(np.int64),
        "attention_mask": np.ones((len(tokens), held + tokens.shape[1]), np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            empty = np.zeros((len(tokens), value.shape[1], 0, value.shape[3]), TYPES[value.type])
            given[value.name] = past[value.name] if past else empty
        elif value.name == "position_ids":
            given["position_ids"] = np.broadcast_to(np.arange(held, held + tokens.shape[1]), tokens.shape)
    if takes_first(session):
        given["first_logit"] = np.array([first], np.int64)
    return given


def takes_first(session: Any) -> bool:
    """Whether the graph can leave out logits before `first_logit`."""
    return any(value.name == "first_logit" for value in session.get_overridable_initializers())


def logits(
    session: Any, tokens: NDArray[np.int64], *, first: int = 0, more: Mapping[str, NDArray[Any]] | None = None
) -> NDArray[np.float32]:
    """Logits [B * (S - first), V] of [B, S] tokens; more: further inputs."""
    found = session.run(["logits"], {**feeds(session, tokens, first=first), **(more or {})})[0]
    if not takes_first(session):
        found = found[:, first:]
    result: NDArray[np.float32] = found.reshape(-1, found.shape[-1]).astype(np.float32, copy=False)
    return result
