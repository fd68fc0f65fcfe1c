"""Plots of learning and of decisions: curves over steps, a confusion matrix, how sure against how right.

Pure functions like plots.py; every number that matters is also there as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from edgeslm.bench import svg
from edgeslm.bench.svg import Scale, linear_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

PHONE_PIXELS = 300
"""Width of a plot on the narrowest phone, which decides what text fits into a cell."""
CHARACTER_PIXELS = 7.5
NAMES = 28.0
"""Percent of a confusion matrix's width that the classes' names take where they fit beside it."""
MOST_CLASSES = 16
"""Classes of the largest confusion matrix that is drawn: beyond, no cell could be read."""
SHADE = 0.45
"""Opacity of a cell that holds its whole row: the number on it can be read in both themes."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line over steps, or dots where values are few."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    dots: bool = False


def curves(
    name: str, title: str, lines: Sequence[Curve], *, x_unit: str, y_unit: str, from_zero: bool = False
) -> str:
    """Lines on common axes with their names above; there must be a point.  from_zero: where a ratio is the point."""
    drawn = [line for line in lines if line.points]
    top = 22 * len(drawn) + 28
    bottom = top + 210
    x_ends = [x for line in drawn for x, _ in line.points]
    y_ends = [y for line in drawn for _, y in line.points]
    margin = (max(y_ends) - min(y_ends)) * 0.06 or abs(max(y_ends)) * 0.05 or 1.0
    x = Scale(low=min(0.0, *x_ends), high=max(x_ends) or 1.0)
    low = 0.0 if from_zero else min(y_ends) - margin
    y = Scale(low=low, high=max(y_ends) + margin, start=bottom, end=top)
    y_ticks = linear_ticks(y.low, y.high, 5)
    marks = [f'<line class="grid" {svg.from_to(svg.LEFT, svg.RIGHT, y.at(tick))}/>' for tick in y_ticks]
    for tick in linear_ticks(x.low, x.high, 5):
        marks.append(f'<line class="grid" {svg.down(x.at(tick), bottom, bottom + 5)}/>')
        marks.append(svg.tick_text(x.at(tick), bottom + 19, tick))
    for number, line in enumerate(drawn):
        marks.append(_legend(line, 22 * number + 14))
        marks.append(_path(line, x, y, top, bottom))
    # Above the lines, where their halo keeps them readable.
    marks += [svg.text("tick", svg.LEFT, y.at(tick) - 4, f"{tick:g}") for tick in y_ticks]
    marks.append(svg.text("tick", svg.LEFT, top - 12, y_unit))
    marks.append(svg.text("tick", svg.RIGHT, bottom + 38, x_unit, "end"))
    said = "; ".join(
        f"{line.label}: from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in drawn
    )
    return svg.frame(name, title, f"{y_unit} over {x_unit}. {said}.", bottom + 46, marks)


def _legend(line: Curve, y: float) -> str:
    if line.dots:
        mark = f'<circle class="s{line.colour}" cx="10" cy="{y - 4}" r="4"/>'
    else:
        mark = f'<line class="stroke t{line.colour}" x1="1" x2="19" y1="{y - 4}" y2="{y - 4}"/>'
    return mark + svg.text("label", 0, y, line.label, aside=26)


def _path(line: Curve, x: Scale, y: Scale, top: float, bottom: float) -> str:
    """The line in a box of its own that is stretched with the page; dots keep their shape."""
    points = [(x.at(across), y.at(value)) for across, value in line.points]
    inside = " ".join(f"{across:.2f},{(down - top) / (bottom - top) * 100:.2f}" for across, down in points)
    kind = "stroke thin" if line.dots else "stroke"
    box = (
        f'<svg x="0" y="{top}" width="100%" height="{bottom - top}" viewBox="0 0 100 100" '
        f'preserveAspectRatio="none" overflow="visible" aria-hidden="true">'
        f'<polyline class="{kind} t{line.colour}" vector-effect="non-scaling-stroke" points="{inside}"/></svg>'
    )
    if not line.dots:
        return box
    return box + "".join(
        f'<circle class="s{line.colour}" cx="{across:.2f}%" cy="{down:.1f}" r="4"/>'
        for across, down in points
    )


def columns(
    name: str, title: str, values: Sequence[float], outlined: Sequence[bool], *, x_unit: str, y_unit: str
) -> str:
    """Upright bars from zero, numbered from 0; the outlined ones are told apart without colour."""
    top, bottom = 34, 194
    x = Scale(low=-0.5, high=len(values) - 0.5, start=9.0)
    y = Scale(low=0.0, high=max(values, default=0.0) * 1.05 or 1.0, start=bottom, end=top)
    y_ticks = linear_ticks(y.low, y.high, 4)
    marks = [f'<line class="grid" {svg.from_to(svg.LEFT, svg.RIGHT, y.at(tick))}/>' for tick in y_ticks]
    wide = (x.at(1) - x.at(0)) * 0.76
    described = []
    for number, (value, outline) in enumerate(zip(values, outlined, strict=True)):
        said = f"{number}: {value:.4g}{' (outlined)' if outline else ''}"
        described.append(said)
        box = f'x="{x.at(number) - wide / 2:.2f}%" width="{wide:.2f}%" y="{y.at(value):.1f}"'
        kind = "t1 invalid" if outline else "s1"
        height = max(bottom - y.at(value), 0.0)
        marks.append(f'<rect class="{kind}" {box} height="{height:.1f}"><title>{escape(said)}</title></rect>')
    whole = [tick for tick in linear_ticks(0, len(values) - 1, 8) if tick == int(tick)]
    marks += [svg.text("tick", x.at(tick), bottom + 17, f"{tick:.0f}", "middle") for tick in whole]
    marks += [svg.text("tick", svg.LEFT, y.at(tick) - 4, f"{tick:g}") for tick in y_ticks[1:]]
    marks.append(svg.text("tick", svg.LEFT, 12, y_unit))
    marks.append(svg.text("tick", svg.RIGHT, bottom + 35, x_unit, "end"))
    return svg.frame(name, title, f"{y_unit} by {x_unit}. {'; '.join(described)}.", bottom + 42, marks)


def confusion(name: str, title: str, classes: Sequence[str], counts: Sequence[Sequence[float]]) -> str:
    """A row for each true class, a column for each chosen one, shaded by the share of the row.

    counts: [L, L], with at most MOST_CLASSES classes.
    """
    longest = max(map(len, classes), default=0) * CHARACTER_PIXELS
    beside = longest <= (NAMES / 100) * PHONE_PIXELS - 3 * CHARACTER_PIXELS
    start, height, drop = (NAMES, 34, 0) if beside else (0.0, 54, 20)
    width = (100 - start) / len(classes)
    pixels = width / 100 * PHONE_PIXELS
    named = longest <= pixels
    numbers = [[f"{count:,.0f}" for count in row] for row in counts]
    fits = max(len(number) for row in numbers for number in row) * CHARACTER_PIXELS <= pixels
    marks = [svg.text("tick", start, 12, "chosen:")]
    for column, label in enumerate(classes):
        heading = label if named else str(column + 1)
        marks.append(svg.text("label", start + (column + 0.5) * width, 32, heading, "middle"))
    for row, label in enumerate(classes):
        top, total = 40 + row * height + drop, sum(counts[row])
        said = label if named else f"{row + 1} {label}"
        marks.append(svg.text("label", 0, top + (21 if beside else -5), said if beside else svg.short(said)))
        for column, count in enumerate(counts[row]):
            share = count / total if total else 0.0
            x = start + column * width
            box = f'x="{x:.2f}%" width="{width:.2f}%" y="{top}" height="34"'
            said = escape(f"{label} taken for {classes[column]}: {count:,.0f}, {share:.1%}")
            shade = f'class="segment {"s3" if row == column else "s8"}" fill-opacity="{SHADE * share:.3f}"'
            marks.append(f"<rect {shade} {box}><title>{said}</title></rect>")
            if fits:
                marks.append(svg.text("cell", x + width / 2, top + 21, numbers[row][column], "middle"))
    described = []
    for label, row_counts in zip(classes, counts, strict=True):
        parts = [f"{n:,.0f} as {name}" for n, name in zip(row_counts, classes, strict=True) if n]
        described.append(f"{label}: {', '.join(parts) or 'no examples'}")
    description = "; ".join(described)
    return svg.frame(name, title, f"{description}.", 44 + len(classes) * height, marks)


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Examples whose likeliest class has a probability between low and high."""

    low: float
    high: float
    examples: float
    accuracy: float


def reliability(name: str, title: str, bins: Sequence[Bin]) -> str:
    """Bars of how often it was right over how sure it was, the diagonal that they should reach, and how many."""
    top, bottom, foot = 40, 250, 344
    x = Scale(low=0.0, high=1.0)
    y = Scale(low=0.0, high=1.0, start=bottom, end=top)
    most = max((each.examples for each in bins), default=0) or 1
    count = Scale(low=0.0, high=most, start=foot, end=foot - 46)
    marks = []
    for tick in linear_ticks(0, 1, 6):
        marks.append(f'<line class="grid" {svg.from_to(svg.LEFT, svg.RIGHT, y.at(tick))}/>')
        marks.append(svg.tick_text(x.at(tick), bottom + 18, tick * 100))
    for each in bins:
        left, wide = x.at(each.low), x.at(each.high) - x.at(each.low)
        box = f'x="{left + 0.15:.2f}%" width="{wide - 0.3:.2f}%"'
        for colour, place, base in ((1, y.at(each.accuracy), bottom), (5, count.at(each.examples), foot)):
            size = f'y="{place:.1f}" height="{base - place:.1f}"'
            marks.append(f'<rect class="s{colour}" {box} {size}><title>{escape(_said(each))}</title></rect>')
    diagonal = f'x1="{svg.LEFT}%" x2="{svg.RIGHT}%" y1="{y.at(0):.1f}" y2="{y.at(1):.1f}"'
    marks += [f'<line class="{kind}" {diagonal}/>' for kind in ("halo", "ideal")]
    marks += [
        svg.text("tick", svg.LEFT, y.at(tick) - 4, f"{tick * 100:g}") for tick in linear_ticks(0, 1, 6)[1:]
    ]
    marks.append(svg.text("tick", svg.LEFT, 12, "right, %"))
    marks.append(svg.text("tick", svg.RIGHT, bottom + 36, "how sure the model is, %", "end"))
    marks.append(svg.text("tick", svg.LEFT, foot - 52, f"examples (most: {most:,.0f})"))
    return svg.frame(name, title, f"{'; '.join(map(_said, bins))}.", foot + 4, marks)


def _said(each: Bin) -> str:
    return f"{each.low:.0%} to {each.high:.0%} sure: right {each.accuracy:.1%} of {each.examples:,.0f}"
