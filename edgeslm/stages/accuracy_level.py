"""What MatMulNBits' accuracy levels do to a model: agreement, divergence and speed of each, on real text.

The level says what activations may become inside the product: 0 and 1 float32, 2 float16, 3 bfloat16,
4 int8 in blocks.  Level 4 is the fast one on CPUs, and a channel of large activations spoils the others of
its block there: some models then answer differently (microsoft/onnxruntime#29849).  A level that a kernel
lacks falls back to a more accurate one, which the equal logits show.

B windows, S tokens, V vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import DataError, ModelError
from edgeslm.progress import Quiet
from edgeslm.stages import external_data, onnx_session
from edgeslm.stages.onnx_sensitivity import divergence

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress

SCHEMA = "edgeslm.accuracy-level/1"
LEVELS = (0, 1, 2, 3, 4)
OPERATOR = "MatMulNBits"
DECODED = 32
"""Tokens of which decoding is timed."""


def audit(
    model_path: Path,
    windows: NDArray[np.int64],
    *,
    threads: int = 0,
    levels: tuple[int, ...] = LEVELS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the text through a copy of the graph at each level; the copies share the weights' file.

    windows: [B, S] token ids, all positions of which are scored.  Returns a record: the level that the file
    has (chosen; None where its products differ, or it has none of them), and of each level the share of
    positions with level 0's argmax, the mean KL(level 0 || level) in nats, and tokens a second in prefill of
    the first window and in decoding.  Raises DataError without text, ModelError for a graph that is damaged.
    """
    if windows.ndim != 2 or windows.size == 0:
        raise DataError(
            "the accuracy levels are compared on text, and there is none", hint="give calibration text"
        )
    model = external_data.load_graph(model_path)
    used = {level_of(node) for node in model.graph.node if node.op_type == OPERATOR}
    found = []
    with (progress or Quiet()).task("accuracy levels", windows.size * len(levels), "tokens") as done:
        exact = (
            onnx_session.open_session(at_level(model, 0), model_path.parent, threads=threads)
            if used
            else None
        )
        for level in levels if used else ():
            # Two sessions at a time: each may hold a packed copy of the weights.
            session = onnx_session.open_session(at_level(model, level), model_path.parent, threads=threads)
            compared = []
            for window in windows:
                compared.append(
                    _compared(*(onnx_session.logits(one, window[None]) for one in (exact, session)))
                )
                done(len(window))
            found.append({
                "level": level,
                "top1_agreement": float(np.mean([same for same, _ in compared])),
                "kl_nats": float(np.mean([kl for _, kl in compared])),
                **_speed(session, windows[0], clock),
            })  # fmt: skip
    return {
        "schema": SCHEMA,
        "chosen": used.pop() if len(used) == 1 else None,
        "tokens": int(windows.size),
        "levels": found,
    }


def at_level(model: Any, level: int) -> Any:
    """A copy of a ModelProto all of whose products in blocks have this accuracy level."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type != OPERATOR:
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    return copy


def level_of(node: Any) -> int:
    """The accuracy level of a product in blocks; 0 where it has none."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "accuracy_level"), 0)


def _compared(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> tuple[float, float]:
    """(share of positions with the same argmax, mean KL in nats) of [S, V] logits."""
    if not np.isfinite(reference).all():
        raise ModelError("the model's logits are not finite at accuracy level 0", hint="quantize it again")
    return float((reference.argmax(axis=1) == logits.argmax(axis=1)).mean()), divergence(reference, logits)


def _speed(session: Any, window: NDArray[np.int64], clock: Callable[[], float]) -> dict[str, float]:
    """Prefill of a window and decoding behind it, after both were done once.

    Both fit into the window's length together: it may be all that the model reads.
    """
    decoded = min(DECODED, len(window) // 2)
    window = window[: len(window) - decoded]
    names = [value.name for value in session.get_outputs()]
    first = len(window) - 1
    prefill_s = decode_s = float("inf")
    for _ in range(2):
        start = clock()
        outputs = _run(session, names, onnx_session.feeds(session, window[None], first=first))
        prefill_s = min(prefill_s, clock() - start)
        start = clock()
        for _ in range(decoded):
            token = outputs["logits"][:, -1].argmax(axis=-1)[:, None]
            past = {
                name.replace("present", "past_key_values"): value
                for name, value in outputs.items()
                if name.startswith("present")
            }
            outputs = _run(session, names, onnx_session.feeds(session, token, past=past))
        decode_s = min(decode_s, clock() - start)
    return {"prefill_tokens_per_s": len(window) / prefill_s, "decode_tokens_per_s": decoded / decode_s}


def _run(session: Any, names: list[str], given: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    return dict(zip(names, session.run(None, given), strict=True))
