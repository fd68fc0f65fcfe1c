"""Plots of rows as pure functions: rows of numbers in, one <svg> element out (see svg.py).

Every number that is drawn is also there as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from edgeslm.bench import svg
from edgeslm.bench.svg import Scale, linear_ticks, log_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    Rows = Sequence["Interval | Bar | Stack"]

LINE_CHARACTERS = 34
"""Characters of 13 px that fit beside each other on a phone, whatever its font."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One row of an interval plot; low and high None: no interval is known."""

    label: str
    """May have two lines, here and in the other plots with rows."""
    text: str
    """The value as the reader should see it."""
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 1


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a bar plot."""

    label: str
    text: str
    value: float
    low: float | None = None
    """Slowest and fastest repetition."""
    high: float | None = None
    ceiling: float | None = None
    """What could be reached at most."""
    valid: bool = True
    colour: int = 1


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One row of a stacked plot: (name, value, colour) from left to right."""

    label: str
    text: str
    segments: Sequence[tuple[str, float, int]]


def intervals(
    name: str, title: str, rows: Sequence[Interval], *, unit: str, logarithmic: bool = False
) -> str:
    """A dot with its interval for each row; there must be one.  logarithmic: 0 lies at the left edge."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    logarithmic = logarithmic and max(ends) > 0
    if logarithmic:
        ends = [end for end in ends if end > 0]
        scale = Scale(low=min(ends) / 1.15, high=max(ends) * 1.15, logarithmic=True)
        ticks = log_ticks(scale.low, scale.high)
    else:
        margin = (max(ends) - min(ends)) * 0.08 or abs(max(ends)) * 0.05 or 1.0
        scale = Scale(low=min(ends) - margin, high=max(ends) + margin)
        ticks = linear_ticks(scale.low, scale.high)
    marks, top = [], 0
    for row, lines in zip(rows, _headings(rows), strict=True):
        text, top = _heading(lines, top)
        marks.append(text)
        y = top + 10
        if row.low is not None and row.high is not None:
            low, high = scale.at(row.low), scale.at(row.high)
            marks.append(f'<line class="whisker t{row.colour}" {svg.from_to(low, high, y)}/>')
            marks += [
                f'<line class="whisker t{row.colour}" {svg.down(end, y - 5, y + 5)}/>' for end in (low, high)
            ]
        marks.append(f'<circle class="s{row.colour}" cx="{scale.at(row.value):.2f}%" cy="{y}" r="5.5"/>')
        top += 26
    described = f"{'Logarithmic s' if logarithmic else 'S'}cale in {unit}."
    return svg.frame(
        name, title, _describe(described, rows), top + 24, [*svg.axis(scale, ticks, top), *marks]
    )


def bars(name: str, title: str, rows: Sequence[Bar], *, unit: str) -> str:
    """Bars from zero, the spread of the repetitions on each, and a mark at the ceiling where one is known.

    A run that is not valid is an outline only, and its text should say so.
    """
    ends = [end for row in rows for end in (row.value, row.high, row.ceiling) if end is not None]
    scale = Scale(low=0.0, high=max(ends, default=0.0) * 1.01 or 1.0, start=0.0, end=100.0)
    marks, top = [], 0
    for row, lines in zip(rows, _headings(rows), strict=True):
        text, top = _heading(lines, top)
        marks.append(text)
        if row.ceiling is not None:
            marks.append(
                f'<rect class="ceiling" {svg.box(scale, 0, row.ceiling)} y="{top + 2}" height="16"/>'
            )
        kind = f"s{row.colour}" if row.valid else f"t{row.colour} invalid"
        marks.append(
            f'<rect class="{kind}" {svg.box(scale, 0, row.value)} y="{top + 2}" height="16" rx="2"/>'
        )
        if row.low is not None and row.high is not None and row.high > row.low:
            low, high = scale.at(row.low), scale.at(row.high)
            marks.append(f'<line class="spread" {svg.from_to(low, high, top + 23)}/>')
            marks += [f'<line class="spread" {svg.down(end, top + 20, top + 26)}/>' for end in (low, high)]
        if row.ceiling is not None:
            marks.append(f'<line class="limit" {svg.down(scale.at(row.ceiling), top - 1, top + 21)}/>')
        top += 32
    axis = svg.axis(scale, linear_ticks(scale.low, scale.high), top)
    return svg.frame(name, title, _describe(f"Bars from zero in {unit}.", rows), top + 24, [*axis, *marks])


def stacks(name: str, title: str, rows: Sequence[Stack]) -> str:
    """Bars of segments on one scale; a segment that is wide enough carries its name."""
    longest = max((sum(value for _, value, _ in row.segments) for row in rows), default=0.0) or 1.0
    scale = Scale(low=0.0, high=longest, start=0.0, end=100.0)
    marks, top = [], 0
    for row, lines in zip(rows, _headings(rows), strict=True):
        text, top = _heading(lines, top)
        marks.append(text)
        start = 0.0
        for segment, value, colour in row.segments:
            box = svg.box(scale, start, start + value)
            tip = f"<title>{escape(segment)}</title>"
            marks.append(f'<rect class="s{colour} segment" {box} y="{top + 2}" height="24">{tip}</rect>')
            if value / longest * 320 > 9 * len(segment) + 8:  # even on the narrowest phone
                middle = (scale.at(start) + scale.at(start + value)) / 2
                marks.append(svg.text("on", middle, top + 18, segment, "middle"))
            start += value
        top += 38
    return svg.frame(name, title, _describe("Stacked bars.", rows), top, marks)


def _headings(rows: Rows) -> list[list[tuple[str, str]]]:
    """For each row its (label, value) lines, as many for each: what fits beside each other does so in all.

    A label of two lines becomes one where that is short enough in every row.
    """
    labels = [[svg.short(part) for part in row.label.split("\n", 1)] for row in rows]
    if all(len(": ".join(parts)) <= LINE_CHARACTERS for parts in labels):
        labels = [[": ".join(parts)] for parts in labels]
    beside = all(
        len(parts[-1]) + len(row.text) <= LINE_CHARACTERS for parts, row in zip(labels, rows, strict=True)
    )
    most = max(map(len, labels), default=1)
    found = []
    for parts, row in zip(labels, rows, strict=True):
        lines = [(part, "") for part in [*parts, *[""] * (most - len(parts))]]
        found.append([*lines[:-1], (lines[-1][0], row.text)] if beside else [*lines, ("", row.text)])
    return found


def _heading(lines: Sequence[tuple[str, str]], top: int) -> tuple[str, int]:
    """The lines above a row, values on the right unless they have a line of their own; and where the row starts."""
    texts = []
    for label, value in lines:
        top += 18
        if label:
            texts.append(svg.text("label", 0, top - 3, label))
        if value:
            texts.append(
                svg.text("value", 100, top - 3, value, "end")
                if label
                else svg.text("value", 0, top - 3, value)
            )
    return "".join(texts), top + 4


def _describe(what: str, rows: Rows) -> str:
    said = [f"{row.label}: {row.text}".replace("\n", ", ") for row in rows]
    return f"{what} {'; '.join(said)}."
