"""What a report is made of: a few kinds of blocks that each template renders in its own way.

A result is one entry of a report document (records.py).  A number that nobody measured leaves out its
row; between results side by side it is n/a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgeslm import wording
from edgeslm.bench import svg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Entry = Mapping[str, Any]
    Rows = Sequence[tuple[str, Callable[[Entry], str]]]


@dataclass(frozen=True, kw_only=True)
class Cards:
    """The headline numbers of one result: (name, value, detail)."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first `left` columns hold words, the others numbers.

    colours: for each row the plots' colour that stands for it; empty: none does.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    colours: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot; the numbers in it are in a table too."""

    kind: ClassVar[str] = "figure"
    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Sentences under a title."""

    kind: ClassVar[str] = "notes"
    title: str
    lines: Sequence[str]
    bad: bool = False


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text to be copied."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    language: str


Block = Cards | Table | Figure | Notes | Code


@dataclass(frozen=True, kw_only=True)
class Section:
    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a reader must know first.  state: "passed", "missed" or "invalid"."""

    state: str
    title: str
    lines: Sequence[str]


def at(record: Any, *keys: str) -> Any:
    """The value under nested keys; None where a key is missing or null on the way."""
    for key in keys:
        if record is None:
            return None
        record = record.get(key)
    return record


def matrix(caption: str, rows: Rows, entries: Sequence[Entry], *, numbers: bool = False) -> list[Block]:
    """A table of facts down and results across, without the facts that no result has; [] if none is left.

    numbers: end the cells of several results on the right.
    """
    cells = [(name, *(show(entry) for entry in entries)) for name, show in rows]
    cells = [row for row in cells if any(cell not in ("", wording.NOT_AVAILABLE) for cell in row[1:])]
    header = ("", *(entry["label"] for entry in entries))
    return (
        [
            Table(
                caption=caption,
                header=header,
                rows=cells,
                left=1 if numbers and len(entries) > 1 else len(header),
            )
        ]
        if cells
        else []
    )


def whose(entry: Entry, entries: Sequence[Entry]) -> tuple[str, ...]:
    """The cells that name a row's result: none where there is only one."""
    return (entry["label"],) if len(entries) > 1 else ()


def said_of(entry: Entry, entries: Sequence[Entry], text: str) -> str:
    """A title that names its result where there are several."""
    return f"{entry['label']}: {text}" if len(entries) > 1 else text[:1].upper() + text[1:]


def bench_runs(entry: Entry) -> Sequence[Mapping[str, Any]]:
    """A result's benchmark runs."""
    return at(entry, "bench", "runs") or ()


def colour(number: int) -> int:
    """The colour of the n-th result in every plot."""
    return number % svg.COLOURS + 1
