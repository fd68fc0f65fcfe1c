"""Calibration examples as a classifier's graph takes them, one at a time: what the device does, with numpy.

S tokens, R rows of a window, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgeslm.stages.onnx_proof import Traced

    Feed = dict[str, NDArray[Any]]


def prepare(examples: Sequence[str | NDArray[Any]], traced: Traced, tokenizer: str | None) -> list[Feed]:
    """Input name to array of each example: ids and mask [1, S], or normalized readings [1, R, C].

    examples: texts, or windows [R, C] in physical units.  tokenizer: the text of tokenizer.json.
    Raises DataError for examples of the other kind, or windows of another shape.
    """
    facts = traced.preprocessing
    wanted = str if tokenizer is not None else np.ndarray
    for example in examples:
        if not isinstance(example, wanted):
            kinds = {str: "texts", np.ndarray: "windows of sensor readings"}
            raise DataError(
                f"the calibration examples are no {kinds[wanted]}",
                hint="name data of the kind that the model takes",
            )
    if not len(examples):
        return []
    if tokenizer is not None:
        return _texts([str(example) for example in examples], facts, tokenizer)
    windows = np.stack([np.asarray(example, np.float64) for example in examples])
    expected = (facts["rows"], len(facts["channels"]))
    if windows.shape[1:] != expected:
        raise DataError(
            f"the calibration windows have the shape {windows.shape[1:]}, the model takes {expected}",
            hint="use the windows and channels that it was trained with",
        )
    from edgeslm.stages.normalization import Normalization

    prepared = Normalization.from_record(facts["normalization"]).apply(windows)
    return [{"readings": window[None].astype(np.float32)} for window in prepared]


def _texts(texts: list[str], facts: dict[str, Any], tokenizer: str) -> list[Feed]:
    from tokenizers import Tokenizer

    reader = Tokenizer.from_str(tokenizer)
    reader.enable_truncation(facts["max_tokens"])
    rows = [encoding.ids or [facts["pad_id"]] for encoding in reader.encode_batch(texts)]
    feeds = []
    for row in rows:
        ids = np.array([row], np.int64)
        feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return feeds
