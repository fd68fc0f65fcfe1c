"""Sensor readings to scores, posteriors and alarms as they come, window by window.

The score of a window is P(E|D) as the network learned it, under the base rates of its training data; the
posterior is the same under those where it runs.  An alarm is a posterior at or above the threshold in
`hold` windows of one machine in a row.

L classes.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import EngineError, RecipeError
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.runtime.rows import format_of, open_input, read_rows
from edgeslm.runtime.rule import Answer, make_rule, open_for, rounded, scored
from edgeslm.runtime.windows import Window, WindowCutter, read_cutting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.runtime.rows import Row
    from edgeslm.runtime.rule import Rule

SCHEMA = "edgeslm.predict/1"
BATCH_WINDOWS = 64


@dataclass
class Tally:
    """What became of the rows that came.  alarms: windows in alarm; begun: how often one began."""

    hold: int
    failed: int = 0
    windows: int = 0
    left_out: int = 0
    alarms: int = 0
    begun: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""
    first_alarm: Answer | None = None

    def count(self, answer: Answer) -> None:
        if "error" in answer:
            self.failed += 1
            self.first_failure = self.first_failure or f"line {answer['line']}: {answer['error']}"
        elif "left_out" in answer:
            self.left_out += 1
        else:
            self.windows += 1
            self.classes[answer["label"]] += 1
            if answer.get("alarm"):
                self.alarms += 1
                self.begun += answer["held"] == self.hold
                self.first_alarm = self.first_alarm or answer


def predict(
    path: Path,
    source: Path | None,
    sink: Callable[[Sequence[Answer]], object] | None,
    *,
    kind: str | None = None,
    hold: int = 1,
    stride: int | None = None,
    threads: int | None = None,
    **wishes: Any,
) -> dict[str, Any]:
    """Score a table of readings, or standard input (None); the record edgeslm.predict/1.

    sink: takes lists of answers in order: of windows, and of rows that can't be used.  kind: of
    rows.FORMATS but lines; None: what the file's name or first line says.  hold: windows in a row that make
    an alarm.  stride: rows from one window to the next; None: the bundle's.  wishes: see make_rule.
    Raises BundleError, ModelError, EngineError, RecipeError or DataError; a bad row is an answer, no error.
    """
    bundle = open_for(path, "sensor-classification")
    classifier = OrtClassifier(bundle, threads=threads)
    rule = make_rule(classifier.decision, **wishes)
    cutting = read_cutting(bundle.manifest or {}, classifier.preprocessing, str(path), stride=stride)
    if hold < 1:
        raise RecipeError(f"hold is {hold}", hint="give how many windows in a row make an alarm, from 1 up")
    cutter, tally = WindowCutter(cutting), Tally(hold)
    with open_input(source) as opened:
        rows = read_rows(opened, kind or format_of(source), columns=cutting.columns, table=True)
        for answers in watched(classifier, rows, rule, cutter, hold=hold):
            for one in answers:
                tally.count(one)
            if sink is not None:
                sink(answers)
    return {
        "schema": SCHEMA,
        "artifact": {"name": bundle.name, "path": str(path), "digest": bundle.digest},
        "decision": rule.as_record() | {"hold": hold},
        "rows": cutter.rows + tally.failed,
        "rows_of_window": cutting.rows,
        "stride": cutting.stride,
        "answered": tally.windows,
        "left_out": tally.left_out,
        "failed": tally.failed,
        "first_failure": tally.first_failure or None,
        "gaps": cutter.gaps,
        "units": cutter.units if cutting.unit is not None else None,
        "classes": {label: tally.classes[label] for label in classifier.labels},
        "alarms": None if rule.watched is None else {
            "windows": tally.alarms, "begun": tally.begun, "first": tally.first_alarm,
        },
    }  # fmt: skip


def watched(
    classifier: OrtClassifier, rows: Iterable[list[Row]], rule: Rule, cutter: WindowCutter, *, hold: int
) -> Iterator[list[Answer]]:
    """The answers to each list of rows, in order: of windows, and of rows that can't be used."""
    judge = _Judge(classifier, rule, hold)
    for some in rows:
        found: list[Answer | Window] = []
        for row in some:
            try:
                if row.error or isinstance(row.values, str):
                    raise ValueError(row.error or "holds a text, not an object")
                window = cutter.take(row.line, row.values)
            except ValueError as error:
                cutter.lose()
                found.append({"line": row.line, "error": str(error)})
                continue
            if window is not None:
                found.append(window)
            if len(found) == BATCH_WINDOWS:
                yield judge.answers(found)
                found = []
        if found:
            yield judge.answers(found)


class _Judge:
    """Scores windows, and knows of each machine for how many in a row the posterior was at the threshold."""

    def __init__(self, classifier: OrtClassifier, rule: Rule, hold: int) -> None:
        self._classifier, self._rule, self._hold = classifier, rule, hold
        self._held: dict[str, tuple[int, int]] = {}
        """Machine to its run, and windows of it."""

    def answers(self, found: Sequence[Answer | Window]) -> list[Answer]:
        """As many as there are, in order."""
        windows = [one.readings for one in found if isinstance(one, Window) and one.readings is not None]
        scores = iter(scored(self._predict, windows) if windows else [])
        answers = []
        for one in found:
            if not isinstance(one, Window):
                answers.append(one)
            elif one.readings is None:
                answers.append(_place(one) | {"left_out": f"{one.missing:.0%} of its readings are missing"})
            else:
                score = next(scores)
                answers.append(
                    _place(one) | {"error": score.message}
                    if isinstance(score, EngineError)
                    else _place(one) | self._judged(one, score)
                )
        return answers

    def _predict(self, windows: Sequence[Any]) -> Any:
        return self._classifier.predict_readings(np.stack(windows), batch=BATCH_WINDOWS)

    def _judged(self, window: Window, score: NDArray[np.float64]) -> Answer:
        """score: [L] under the base rates of training."""
        rule = self._rule
        posterior = rule.decision.posterior(score[None])
        chosen = int(rule.choose(posterior)[0])
        label = self._classifier.labels[chosen]
        if rule.watched is None:
            names = self._classifier.labels
            told = {name: [rounded(value) for value in row] for name, row in
                    (("scores", score.tolist()), ("posteriors", posterior[0].tolist()))}  # fmt: skip
            return {"label": label} | {key: dict(zip(names, row, strict=True)) for key, row in told.items()}
        run, held = self._held.get(window.unit, (window.run, 0))
        held = (held if run == window.run else 0) + 1 if chosen == rule.watched else 0
        self._held[window.unit] = (window.run, held)
        return {
            "label": label,
            "score": rounded(float(score[rule.watched])),
            "posterior": rounded(float(posterior[0, rule.watched])),
            "held": held,
            "alarm": held >= self._hold,
        }


def _place(window: Window) -> Answer:
    """Which window it is: the line of its last row, its machine and time."""
    answer: Answer = {"line": window.line}
    if window.unit:
        answer["unit"] = window.unit
    if window.time is not None:
        answer["time"] = _plain(window.time)
    return answer


def _plain(time: Any) -> Any:
    """A time as a number where it is one, else as it was written."""
    for kind in (int, float):
        with suppress(TypeError, ValueError):
            if isinstance(time, str) and math.isfinite(value := kind(time)):
                return value
    return time if isinstance(time, int | float) else str(time)
