"""Inline SVG as pure functions: rows of numbers in, one <svg> element out.

Widths are percentages of the element and heights are pixels, so text keeps its size on a phone and on
a desk and nothing needs a script.  Colours are classes (s1 to s8, "muted", ...) that the page defines
for its light and its dark theme.  Every number that is drawn is also there as text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    Rows = Sequence["Interval | Bar | Stack"]

LEFT, RIGHT = 2.0, 98.0
"""Percent of the width between which values are drawn."""
LINE_CHARACTERS = 34
"""Characters of 13 px that fit beside each other on a phone, whatever its font."""
LABEL_CHARACTERS = 38
"""Characters of a label alone on its line; the rest of a longer one is in the plot's description."""
COLOURS = 8


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


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mark of a scatter plot with its interval on the y axis."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    colour: int = 1


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Maps values between low and high to a position between start and end."""

    low: float
    high: float
    start: float = LEFT
    end: float = RIGHT
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Position of a value; outside values are drawn at the edge."""
        low, high, here = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, here = math.log(low), math.log(high), math.log(here)
        return self.start + (self.end - self.start) * ((here - low) / (high - low) if high > low else 0.5)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `most` of them."""
    if not (high - low) / most > 0:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * 10.0**exponent
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers of ten alone where those are too many."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            float(f"{factor}e{exponent}")
            for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for factor in factors
            if low * (1 - 1e-9) <= float(f"{factor}e{exponent}") <= high * (1 + 1e-9)
        ]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


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
            marks.append(f'<line class="whisker t{row.colour}" {_from_to(low, high, y)}/>')
            marks += [
                f'<line class="whisker t{row.colour}" {_down(end, y - 5, y + 5)}/>' for end in (low, high)
            ]
        marks.append(f'<circle class="s{row.colour}" cx="{scale.at(row.value):.2f}%" cy="{y}" r="5.5"/>')
        top += 26
    described = f"{'Logarithmic s' if logarithmic else 'S'}cale in {unit}."
    return _svg(name, title, _describe(described, rows), top + 24, [*_axis(scale, ticks, top), *marks])


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
            marks.append(f'<rect class="ceiling" {_box(scale, 0, row.ceiling)} y="{top + 2}" height="16"/>')
        kind = f"s{row.colour}" if row.valid else f"t{row.colour} invalid"
        marks.append(f'<rect class="{kind}" {_box(scale, 0, row.value)} y="{top + 2}" height="16" rx="2"/>')
        if row.low is not None and row.high is not None and row.high > row.low:
            low, high = scale.at(row.low), scale.at(row.high)
            marks.append(f'<line class="spread" {_from_to(low, high, top + 23)}/>')
            marks += [f'<line class="spread" {_down(end, top + 20, top + 26)}/>' for end in (low, high)]
        if row.ceiling is not None:
            marks.append(f'<line class="limit" {_down(scale.at(row.ceiling), top - 1, top + 21)}/>')
        top += 32
    axis = _axis(scale, linear_ticks(scale.low, scale.high), top)
    return _svg(name, title, _describe(f"Bars from zero in {unit}.", rows), top + 24, [*axis, *marks])


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
            box = _box(scale, start, start + value)
            tip = f"<title>{escape(segment)}</title>"
            marks.append(f'<rect class="s{colour} segment" {box} y="{top + 2}" height="24">{tip}</rect>')
            if value / longest * 320 > 9 * len(segment) + 8:  # even on the narrowest phone
                middle = (scale.at(start) + scale.at(start + value)) / 2
                marks.append(_text("on", middle, top + 18, segment, "middle"))
            start += value
        top += 38
    return _svg(name, title, _describe("Stacked bars.", rows), top, marks)


def scatter(name: str, title: str, points: Sequence[Point], *, x_unit: str, y_unit: str) -> str:
    """Marks with intervals; less is better on both axes, so the best are at the lower left."""
    height, top, bottom = 320, 30, 270
    across = [point.x for point in points]
    margin = (max(across) - min(across)) * 0.15 or abs(max(across)) * 0.1 or 1.0
    x = Scale(low=min(across) - margin, high=max(across) + margin)
    highest = max(end for point in points for end in (point.y, point.high) if end is not None)
    y = Scale(low=0.0, high=highest * 1.1 or 1.0, start=bottom, end=top)
    marks = []
    for tick in linear_ticks(y.low, y.high):
        marks.append(f'<line class="grid" {_from_to(LEFT, RIGHT, y.at(tick))}/>')
        marks.append(_text("tick", LEFT, y.at(tick) - 4, f"{tick:g}"))
    for tick in linear_ticks(x.low, x.high, 5):
        marks.append(f'<line class="grid" {_down(x.at(tick), bottom, bottom + 5)}/>')
        marks.append(_tick_text(x.at(tick), bottom + 19, tick))
    marks.append(_text("tick", LEFT, 14, y_unit))
    marks.append(_text("tick", RIGHT, height - 8, x_unit, "end"))
    for number, point in enumerate(sorted(points, key=lambda each: each.x)):
        here, there = x.at(point.x), y.at(point.y)
        if point.low is not None and point.high is not None:
            ends = (y.at(point.high), y.at(point.low))
            marks.append(f'<line class="whisker t{point.colour}" {_down(here, *ends)}/>')
        marks.append(f'<circle class="s{point.colour}" cx="{here:.2f}%" cy="{there:.1f}" r="6"/>')
        anchor, aside = ("end", -11) if here > 50 else ("start", 11)
        drop = -8 if number % 2 else 15  # neighbours write on different lines
        marks.append(_text("label", here, there + drop, _short(point.label), anchor, aside=aside))
    said = "; ".join(f"{point.label}: {point.x:.4g} {x_unit}, {point.y:.4g} {y_unit}" for point in points)
    return _svg(name, title, f"Less is better on both axes. {said}.", height, marks)


def _headings(rows: Rows) -> list[list[tuple[str, str]]]:
    """For each row its (label, value) lines, as many for each: what fits beside each other does so in all.

    A label of two lines becomes one where that is short enough in every row.
    """
    labels = [[_short(part) for part in row.label.split("\n", 1)] for row in rows]
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
            texts.append(_text("label", 0, top - 3, label))
        if value:
            texts.append(
                _text("value", 100, top - 3, value, "end") if label else _text("value", 0, top - 3, value)
            )
    return "".join(texts), top + 4


def _short(label: str) -> str:
    return label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 3] + "..."


def _axis(scale: Scale, ticks: Sequence[float], bottom: float) -> list[str]:
    """Grid lines behind the rows with their values below."""
    return [
        part
        for tick in ticks
        for part in (
            f'<line class="grid" {_down(scale.at(tick), 0, bottom)}/>',
            _tick_text(scale.at(tick), bottom + 16, tick),
        )
    ]


def _tick_text(position: float, y: float, tick: float) -> str:
    anchor = "start" if position < 5 else "end" if position > 95 else "middle"
    return _text("tick", position, y, f"{tick:,.10g}", anchor)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start", *, aside: int = 0) -> str:
    """x in percent, y and aside in pixels."""
    moved = f' dx="{aside}"' if aside else ""
    place = f'x="{x:.2f}%" y="{y:.1f}"{moved} text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _from_to(start: float, end: float, y: float) -> str:
    return f'x1="{start:.2f}%" x2="{end:.2f}%" y1="{y:.1f}" y2="{y:.1f}"'


def _down(x: float, start: float, end: float) -> str:
    return f'x1="{x:.2f}%" x2="{x:.2f}%" y1="{start:.1f}" y2="{end:.1f}"'


def _box(scale: Scale, start: float, end: float) -> str:
    return f'x="{scale.at(start):.2f}%" width="{scale.at(end) - scale.at(start):.2f}%"'


def _describe(what: str, rows: Rows) -> str:
    said = [f"{row.label}: {row.text}".replace("\n", ", ") for row in rows]
    return f"{what} {'; '.join(said)}."


def _svg(name: str, title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """name: an id that no other plot of the page has."""
    name = escape(name)
    return (
        f'<svg class="plot" role="img" aria-labelledby="{name}-title {name}-text" width="100%" '
        f'height="{height:.0f}" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
