"""Texts to classes as they come: in order, on all cores, in a bounded piece of memory.

Rows come in lists.  Each list is tokenized at once, cut into batches of texts of about one length, and
computed while the next list is read; where no more input waits, what is there is answered first.  So a
file keeps every core busy, and a program that asks one line at a time gets each answer at once.

B texts of a batch, L classes.
"""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import EngineError
from edgeslm.runtime.host import usable_cores
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.runtime.rows import Row, format_of, open_input, read_rows
from edgeslm.runtime.rule import as_lines, make_rule, open_for, rounded, scored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from edgeslm.runtime.rule import Answer, Rule

SCHEMA = "edgeslm.classify/1"
BATCH_TEXTS = 32
BATCH_TOKENS = 2048
"""Tokens of a batch with its padding, at most: attention's memory grows with texts times tokens squared."""


@dataclass
class Tally:
    """What became of the rows that came."""

    answered: int = 0
    failed: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    """Texts that go on behind the model's length."""
    first_failure: str = ""

    def count(self, answer: Answer) -> None:
        if "error" in answer:
            self.failed += 1
            self.first_failure = self.first_failure or f"line {answer['line']}: {answer['error']}"
        else:
            self.answered += 1
            self.classes[answer["label"]] += 1
            self.cut += "truncated" in answer


def classify(
    path: Path,
    source: Path | str | None,
    sink: Callable[[bytes], object] | None,
    *,
    kind: str | None = None,
    column: str | None = None,
    each: bool = False,
    threads: int | None = None,
    **wishes: Any,
) -> dict[str, Any]:
    """Classify a text, the rows of a file, or of standard input (None); the record edgeslm.classify/1.

    sink: takes each list of answers as JSON lines; None: only the record is wanted.  kind: of rows.FORMATS;
    None: what the file's name or first line says.  column: of the texts; None: the bundle's.  each: every
    line is JSON and gets its line.  wishes: see make_rule.
    Raises BundleError, ModelError, EngineError, RecipeError or DataError; a bad row is an answer, no error.
    """
    cores = threads or usable_cores()
    # One text at a time is computed by all cores together, many by one core each.
    alone = each or isinstance(source, str)
    bundle = open_for(path, "text-classification")
    classifier = OrtClassifier(bundle, threads=cores if alone else 1)
    rule = make_rule(classifier.decision, **wishes)
    data = (bundle.manifest or {}).get("data") or {}
    wanted = column or str((data.get("columns") or {}).get("text") or "text")
    tally = Tally()
    last: Answer | None = None

    def answer(rows: Iterable[list[Row]]) -> None:
        nonlocal last
        for answers in answered(classifier, rows, rule, column=wanted, workers=1 if alone else cores):
            for last in answers:
                tally.count(last)
            if sink is not None:
                sink(as_lines(answers))

    if isinstance(source, str):
        answer([[Row(1, source)]])
    else:
        with open_input(source) as opened:
            found = "jsonl" if each else kind or format_of(source)
            answer(read_rows(opened, found, columns=(wanted,), every=each))
    return {
        "schema": SCHEMA,
        "artifact": {"name": bundle.name, "path": str(path), "digest": bundle.digest},
        "decision": rule.as_record(),
        "answered": tally.answered,
        "failed": tally.failed,
        "first_failure": tally.first_failure or None,
        "truncated": tally.cut,
        "classes": {label: tally.classes[label] for label in classifier.labels},
        "answer": last if isinstance(source, str) else None,
    }


def answered(
    classifier: OrtClassifier,
    rows: Iterable[list[Row]],
    rule: Rule,
    *,
    column: str = "text",
    workers: int = 1,
) -> Iterator[list[Answer]]:
    """The answers to each list of rows, in order; two lists are at work at most."""
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: _Work | None = None
        for some in rows:
            work = _Work(classifier, some, column, pool) if some else None
            if waiting is not None:
                yield waiting.answers(rule)
            waiting = work
        if waiting is not None:
            yield waiting.answers(rule)
    finally:
        pool.shutdown(cancel_futures=True)


class _Work:
    """A list of rows whose texts are being computed."""

    def __init__(
        self, classifier: OrtClassifier, rows: Sequence[Row], column: str, pool: ThreadPoolExecutor
    ) -> None:
        self._labels = classifier.labels
        self._asked = [_asked(row, column) for row in rows]
        self._good = [number for number, one in enumerate(self._asked) if "error" not in one]
        tokens = classifier.encode([self._asked[number].pop("_text") for number in self._good])
        self._cut = [cut for _, cut in tokens]
        self._parts: list[tuple[list[int], Future[list[Any]]]] = []
        for batch in batches([len(ids) for ids, _ in tokens]):
            ids = [tokens[number][0] for number in batch]
            self._parts.append((batch, pool.submit(scored, classifier.predict_tokens, ids)))

    def answers(self, rule: Rule) -> list[Answer]:
        """As many as there are rows, in their order."""
        places, found = [], []
        for batch, part in self._parts:
            for place, one in zip(batch, part.result(), strict=True):
                if isinstance(one, EngineError):
                    self._asked[self._good[place]]["error"] = one.message
                else:
                    places.append(place)
                    found.append(one)
        if not found:
            return self._asked
        posterior = rule.decision.posterior(np.stack(found))
        for place, chosen, row in zip(
            places, rule.choose(posterior).tolist(), posterior.tolist(), strict=True
        ):
            told = [rounded(value) for value in row]
            answer = self._asked[self._good[place]]
            answer |= {
                "label": self._labels[chosen], "probability": told[chosen],
                "probabilities": dict(zip(self._labels, told, strict=True)),
            }  # fmt: skip
            if self._cut[place]:
                answer["truncated"] = True
        return self._asked


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of about one length together, within BATCH_TEXTS and BATCH_TOKENS; the longest first.

    lengths: tokens of each text.  Long batches first leave no worker with a long one at the end.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) == BATCH_TEXTS or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _asked(row: Row, column: str) -> Answer:
    """The beginning of an answer: its line, what tells the row from others, and its text or what is wrong."""
    values = row.values if isinstance(row.values, dict) else {column: row.values}
    answer: Answer = {"line": row.line}
    name = values.get("id")
    if isinstance(name, str | int) or (isinstance(name, float) and math.isfinite(name)):
        answer["id"] = name
    if row.error:
        return answer | {"error": row.error}
    if column not in values:
        return answer | {"error": f"has no {column!r}, but {sorted(map(str, values))[:6]}"}
    text = values[column]
    if not isinstance(text, str) or not text.strip():
        return answer | {"error": f"its {column!r} holds no text"}
    return answer | ({} if "id" in answer else {"text": text}) | {"_text": text}
