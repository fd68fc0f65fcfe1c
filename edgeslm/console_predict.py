"""Answers of classifiers as text: a table that grows row by row, and what is said at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Record = Mapping[str, Any]

UNIT_WIDTH, TIME_WIDTH = 12, 20
MOST_CLASSES = 8
"""Classes that are counted one by one in a summary."""


def classify_text(record: Record) -> str:
    """'10,000 rows: 9,998 answered, 2 failed (line 17: ...); 7,001 ham, 2,997 spam'."""
    parts = [_rows(record, record["answered"] + record["failed"]), _classes(record)]
    if record["truncated"]:
        parts.append(f"{wording.count(record['truncated'], 'text')} longer than the model reads")
    return "; ".join(part for part in parts if part)


def predict_text(record: Record) -> str:
    """'600 rows: 569 windows, 1 failed (...); 12 of them in alarm, from line 588 on'."""
    parts = [
        _rows(record, record["rows"]),
        f"{wording.count(record['answered'], 'window')} of {wording.count(record['rows_of_window'], 'row')}",
    ]
    if record["left_out"]:
        parts.append(f"{wording.count(record['left_out'])} left out, with too many readings missing")
    if record["gaps"]:
        parts.append(wording.count(record["gaps"], "gap"))
    alarms, decision = record["alarms"], record["decision"]
    if alarms is None:
        return "; ".join([*parts, _classes(record)])
    said = f"{wording.count(alarms['windows'])} in alarm for {decision['positive']}"
    if decision["threshold"] is not None:
        said += f" (posterior from {wording.percent(decision['threshold'])} on)"
    if first := alarms["first"]:
        said += f", {wording.count(alarms['begun'], 'time')}, first at line {first['line']}"
    return "; ".join([*parts, said])


class Table:
    """Lists of answers as lines of a table; its header comes with the first of them."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, answers: Sequence[Record]) -> bytes:
        lines = [line for answer in answers for line in self._lines(answer)]
        return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="backslashreplace")

    def _lines(self, answer: Record) -> list[str]:
        said = answer.get("error") or answer.get("left_out")
        if said is not None:
            return [f"{answer['line']:>8}  {'error' if 'error' in answer else 'left out'}: {said}"]
        row = [f"{answer['line']:>8}"]
        head = [f"{'line':>8}"]
        for key, width in (("unit", UNIT_WIDTH), ("time", TIME_WIDTH)):
            if key in answer:
                row.append(f"{answer[key]!s:<{width}}")
                head.append(f"{key:<{width}}")
        if "score" in answer:
            row += [f"{answer['score']:>9.6f}", f"{answer['posterior']:>9.6f}"]
            row += [f"{answer['held']:>5}", "ALARM" if answer["alarm"] else ""]
            head += [f"{'P(E|D)':>9}", f"{'posterior':>9}", f"{'held':>5}", "alarm"]
        else:
            row += [answer["label"], f"{max(answer['posteriors'].values()):.6f}"]
            head += ["label", "posterior"]
        first = [] if self._begun else ["  ".join(head).rstrip()]
        self._begun = True
        return [*first, "  ".join(row).rstrip()]


def _rows(record: Record, rows: int) -> str:
    text = wording.count(rows, "row")
    if record["failed"]:
        text += f", {wording.count(record['failed'])} of them failed ({record['first_failure']})"
    return text


def _classes(record: Record) -> str:
    counts = {name: number for name, number in record["classes"].items() if number}
    if len(counts) > MOST_CLASSES:
        return f"{len(counts)} classes"
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())
