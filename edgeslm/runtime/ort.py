"""OrtClassifier: an ONNX bundle on ONNX Runtime, from texts or sensor readings to probabilities.

What the device must do to raw data is in the manifest: where a text is cut and what pads it, or the
channels of a window and the numbers that normalize them.

B examples, S tokens, R rows of a window, C channels, L labels.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import BundleError, DataError, EngineError, RecipeError, first_line
from edgeslm.onnx_file import read_onnx
from edgeslm.runtime.host import usable_cores
from edgeslm.runtime.ort_session import MAX_THREADS, check_operators, open_session
from edgeslm.runtime.posterior import Decision, read_decision
from edgeslm.runtime.tokenizer import TOKENIZER_NAME, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from edgeslm.bundle import Bundle

BATCH = 32
"""Examples computed at once unless the caller says otherwise."""
CHARACTERS_PER_TOKEN = 64
"""Text beyond so many characters for each token that the model reads is not tokenized, as in training."""
INPUTS = {
    "text": {"input_ids": "tensor(int64)", "attention_mask": "tensor(int64)"},
    "sensors": {"readings": "tensor(float)"},
}
"""Kind of preprocessing to the graph's inputs and their types."""
_AGAIN = "build the bundle again"


class OrtClassifier:
    """One classifier of a bundle in the format onnx."""

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Load a bundle; threads None: the physical cores that this process may use.

        Raises BundleError for a manifest that does not fit its graph, ModelError for a damaged file,
        EngineError when ONNX Runtime is missing or refuses it.
        """
        if bundle.format != "onnx" or bundle.manifest is None:
            raise BundleError(
                f"{bundle.path}: a {bundle.format} artifact is no classifier",
                hint="give the directory of a bundle in the format onnx",
            )
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise RecipeError(f"threads is {threads}", hint=f"give a whole number from 1 to {MAX_THREADS}")
        model = bundle.manifest.get("model") or {}
        self.threads = threads or usable_cores()
        self.labels = _labels(model, bundle.path)
        self.preprocessing = _preprocessing(model, bundle.path)
        self.kind = str(self.preprocessing["kind"])
        self.decision: Decision = read_decision(
            bundle.manifest.get("decision"), self.labels, str(bundle.path)
        )
        check_operators(read_onnx(bundle.weights))
        start = clock()
        self._session = open_session(bundle.weights, threads=self.threads).session
        self._tokenizer = _tokenizer(bundle, self.preprocessing) if self.kind == "text" else None
        self.load_s = clock() - start
        self._check_graph(bundle.path)

    def predict_texts(self, texts: Sequence[str], *, batch: int = BATCH) -> NDArray[np.float64]:
        """Probabilities [B, L] of texts, under the base rates of training."""
        tokens = self.tokenize(texts)
        # Texts of one length beside each other need little padding.
        order = sorted(range(len(tokens)), key=lambda number: len(tokens[number]))
        result = np.empty((len(tokens), len(self.labels)))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            result[chosen] = self._run(*self._padded([tokens[number] for number in chosen]))
        return result

    def predict_readings(self, windows: ArrayLike, *, batch: int = BATCH) -> NDArray[np.float64]:
        """Probabilities [B, L] of windows [B, R, C] in physical units, under the base rates of training.

        NaN is a missing reading: the channel's last one before it stands in, or its centre at the start.
        """
        readings = np.asarray(windows, np.float64)
        self._expect("sensors")
        expected = (self.preprocessing["rows"], len(self.preprocessing["channels"]))
        if readings.ndim != 3 or readings.shape[1:] != expected:
            raise DataError(
                f"the readings have the shape {readings.shape}",
                hint=f"give windows of {expected[0]} rows and {expected[1]} channels: (windows, rows, channels)",
            )
        if np.isinf(readings).any():
            raise DataError(
                "the readings hold infinity", hint="leave out what the sensor could not read (NaN)"
            )
        result = np.empty((len(readings), len(self.labels)))
        for start in range(0, len(readings), batch):
            part = normalized(readings[start : start + batch], self.preprocessing["normalization"])
            result[start : start + batch] = self._run(part)
        return result

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the model's own marks around them, cut at the model's length."""
        return [encoding.ids or [self.preprocessing["pad_id"]] for encoding in self._encode(texts)]

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Both of each text in one pass: its tokens as `tokenize` gives them, and whether it is cut."""
        longest = CHARACTERS_PER_TOKEN * self.preprocessing["max_tokens"]
        encodings = self._encode([text[:longest] for text in texts])
        none = [self.preprocessing["pad_id"]]
        return [
            (encoding.ids or none, bool(encoding.overflowing) or len(text) > longest)
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def predict_tokens(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Probabilities [B, L] of rows of tokens in one call; several threads may call at once."""
        return self._run(*self._padded(rows))

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text goes on behind the model's length, where nothing is seen of it."""
        return [bool(encoding.overflowing) for encoding in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> Sequence[Any]:
        self._expect("text")
        assert self._tokenizer is not None
        # What no tokenizer can encode (half of a surrogate pair) becomes a question mark.
        clean = [text.encode("utf-8", errors="replace").decode() for text in texts]
        encodings: Sequence[Any] = self._tokenizer.encode_batch(clean)
        return encodings

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids [B, S] padded on the right, and their mask [B, S]."""
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.preprocessing["pad_id"], np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        return ids, mask

    def _run(self, *arrays: NDArray[Any]) -> NDArray[np.float64]:
        try:
            logits = self._session.run(None, dict(zip(INPUTS[self.kind], arrays, strict=True)))[0]
        except Exception as error:  # the engine's errors share no class of their own
            raise EngineError(f"ONNX Runtime could not compute: {first_line(error)}") from error
        if not np.isfinite(logits).all():
            raise EngineError(
                "the model's scores are not finite numbers", hint="a weight overflowed: train or export again"
            )
        return softmax(logits)

    def _check_graph(self, where: Path) -> None:
        """Inputs and outputs of the graph against what the manifest says of them."""
        found = {value.name: value.type for value in self._session.get_inputs()}
        if found != INPUTS[self.kind]:
            raise BundleError(
                f"{where}: the graph takes {', '.join(found)}; {self.kind} need {', '.join(INPUTS[self.kind])}",
                hint=_AGAIN,
            )
        width = self._session.get_outputs()[0].shape[-1]
        if isinstance(width, int) and width != len(self.labels):
            raise BundleError(
                f"{where}: the graph gives {width} scores, the manifest names {len(self.labels)} labels",
                hint=_AGAIN,
            )

    def _expect(self, kind: str) -> None:
        if self.kind != kind:
            raise DataError(f"this model classifies {self.kind}, not {kind}")


def normalized(readings: NDArray[np.float64], normalization: Mapping[str, Any]) -> NDArray[np.float32]:
    """Windows [B, R, C] with gaps filled by the last reading, less the centre [C], over the scale [C]."""
    center, scale = (np.asarray(normalization[key], np.float64) for key in ("center", "scale"))
    filled = (filled_forward(readings) - center) / scale
    return np.nan_to_num(filled, nan=0.0, posinf=None, neginf=None).astype(np.float32)


def filled_forward(readings: NDArray[np.float64]) -> NDArray[np.float64]:
    """[B, R, C] with each NaN replaced by the last reading of its channel; NaN stays where none came before."""
    known = ~np.isnan(readings)
    rows = np.where(known, np.arange(readings.shape[1])[None, :, None], 0)
    return np.take_along_axis(readings, np.maximum.accumulate(rows, axis=1), axis=1)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities [B, L] of logits [B, L], in float64."""
    exact = logits.astype(np.float64)
    exponential = np.exp(exact - exact.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True))


def _tokenizer(bundle: Bundle, preprocessing: Mapping[str, Any]) -> Any:
    tokenizer = load_tokenizer(bundle.path / TOKENIZER_NAME)
    tokenizer.no_padding()
    tokenizer.enable_truncation(preprocessing["max_tokens"])
    return tokenizer


def _labels(model: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    labels = model.get("labels")
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
        raise BundleError(f"{where}: the manifest names no labels of the classifier", hint=_AGAIN)
    if len(set(labels)) != len(labels):
        raise BundleError(f"{where}: the manifest names a label twice", hint=_AGAIN)
    return tuple(labels)


def _preprocessing(model: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The manifest's facts on raw data, with what is relied on checked."""
    facts = model.get("preprocessing")
    facts = facts if isinstance(facts, dict) else {}
    if facts.get("kind") == "text":
        usable = (
            _is_count(facts.get("max_tokens"))
            and isinstance(facts.get("pad_id"), int)
            and facts["pad_id"] >= 0
        )
    elif facts.get("kind") == "sensors":
        usable = _is_count(facts.get("rows")) and _is_normalization(facts)
    else:
        usable = False
    if not usable:
        raise BundleError(
            f"{where}: the manifest does not say how raw data become the model's input", hint=_AGAIN
        )
    return facts


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_normalization(facts: Mapping[str, Any]) -> bool:
    channels, numbers = facts.get("channels"), facts.get("normalization")
    if not isinstance(channels, list) or not channels or not isinstance(numbers, dict):
        return False
    try:
        center, scale = (np.asarray(numbers[key], np.float64) for key in ("center", "scale"))
    except (KeyError, TypeError, ValueError):
        return False
    fits = center.shape == scale.shape == (len(channels),)
    return fits and bool(np.isfinite(center).all() and np.isfinite(scale).all() and (scale > 0).all())
