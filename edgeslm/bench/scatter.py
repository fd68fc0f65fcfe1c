"""Marks on two axes where less is better on both, and the border that no other mark lies below.

A pure function like those of plots.py: points in, one <svg> element out.  A dominated mark is hollow: another
one is as good on both axes and better on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from edgeslm.bench import svg
from edgeslm.bench.svg import Scale, linear_ticks, log_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

HEIGHT, TOP, BOTTOM = 396, 46, 346
"""Pixels of the plot, and between which marks are drawn."""
PHONE_PIXELS = 300
"""Width of a plot on the narrowest phone: what has room there has room everywhere."""
CHARACTER_PIXELS = 7.2
MARK_PIXELS = 8
"""Half the side of the square that a mark keeps free of labels."""
TICK_PIXELS = 14
"""Height of the line that a tick's number takes."""
DEEPEST = 3000
"""Ratio of the highest mark to the foot of a logarithm: rounding of float32 lies millions below, and says no more."""
LOGARITHMIC_X, LOGARITHMIC_Y = 4, 20
"""Ratio between the largest and the smallest value from which an axis is logarithmic."""
PLACES = (
    (11, 4, "start"), (-11, 4, "end"), (9, -9, "start"), (9, 17, "start"), (-9, -9, "end"), (-9, 17, "end"),
    (0, -13, "middle"), (0, 23, "middle"), (9, -23, "start"), (9, 31, "start"), (-9, -23, "end"), (-9, 31, "end"),
)  # fmt: skip
"""Where a label may stand: pixels right of and below its mark, and which end of it is there; the best first."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mark with its interval on the y axis."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    colour: int = 1
    dominated: bool = False


class Box(NamedTuple):
    """Pixels on the narrowest phone."""

    left: float
    right: float
    top: float
    bottom: float


def scatter(name: str, title: str, points: Sequence[Point], *, x_unit: str, y_unit: str) -> str:
    """The marks with their intervals and names, and stairs through those that are not dominated."""
    x = _across([point.x for point in points])
    y = _upward([end for point in points for end in (point.y, point.low, point.high) if end is not None])
    marks = _grid(x, y, under=any(point.y < y.low for point in points))
    marks.append(svg.text("tick", svg.LEFT, 14, y_unit))
    marks.append(svg.text("tick", svg.RIGHT, HEIGHT - 8, x_unit, "end"))
    marks += _stairs([(x.at(p.x), y.at(p.y)) for p in sorted(points, key=_order) if not p.dominated])
    for point in sorted(
        points, key=lambda each: not each.dominated
    ):  # nothing covers the ones to choose from
        here, there = x.at(point.x), y.at(point.y)
        if point.low is not None and point.high is not None:
            ends = (y.at(point.high), y.at(point.low))
            marks.append(f'<line class="whisker t{point.colour}" {svg.down(here, *ends)}/>')
        kind = f"hollow t{point.colour}" if point.dominated else f"s{point.colour}"
        marks.append(f'<circle class="{kind}" cx="{here:.2f}%" cy="{there:.1f}" r="6"/>')
    for point, (aside, drop, anchor) in zip(points, _places(points, x, y), strict=True):
        kind = "tick" if point.dominated else "label"
        label = svg.short(point.label)
        marks.append(svg.text(kind, x.at(point.x), y.at(point.y) + drop, label, anchor, aside=aside))
    said = "; ".join(
        f"{point.label}: {point.x:.4g} {x_unit}, {point.y:.4g} {y_unit}"
        + (", dominated" if point.dominated else "")
        for point in points
    )
    return svg.frame(name, title, f"Less is better on both axes. {said}.", HEIGHT, marks)


def _order(point: Point) -> tuple[float, float]:
    return point.x, -point.y


def _across(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    if low > 0 and high > LOGARITHMIC_X * low:
        return Scale(low=low / 1.25, high=high * 1.25, logarithmic=True)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    return Scale(low=low - margin, high=high + margin)


def _upward(ends: Sequence[float]) -> Scale:
    """From zero unless that would press all marks to the top; zero and what is next to it lie at a logarithm's foot."""
    positive = [end for end in ends if end > 0]
    low, high = min(ends), max(ends)
    if positive and high > LOGARITHMIC_Y * min(positive):
        foot = max(min(positive) / (1.3 if low > 0 else 4), float(f"{high / DEEPEST:.0e}"))
        return Scale(low=foot, high=high * 1.3, start=BOTTOM, end=TOP, logarithmic=True)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    from_zero = 0 <= low < 0.6 * high or high <= 0
    return Scale(low=min(0.0, low) if from_zero else low - margin, high=high + margin, start=BOTTOM, end=TOP)


def _grid(x: Scale, y: Scale, *, under: bool) -> list[str]:
    """under: the foot of a logarithmic y axis stands for all that is less."""
    marks = []
    for tick in log_ticks(y.low, y.high) if y.logarithmic else linear_ticks(y.low, y.high):
        if y.logarithmic and under and y.at(tick) > BOTTOM - 2 * TICK_PIXELS:
            continue
        marks.append(f'<line class="grid" {svg.from_to(svg.LEFT, svg.RIGHT, y.at(tick))}/>')
        marks.append(svg.text("tick", svg.LEFT, y.at(tick) - 4, f"{tick:g}"))
    if y.logarithmic and under:
        marks.append(svg.text("tick", svg.LEFT, BOTTOM - 4, f"under {y.low:.1g}"))
    marks.append(f'<line class="grid" {svg.from_to(svg.LEFT, svg.RIGHT, BOTTOM)}/>')
    for tick in log_ticks(x.low, x.high, 5) if x.logarithmic else linear_ticks(x.low, x.high, 5):
        marks.append(f'<line class="grid" {svg.down(x.at(tick), BOTTOM, BOTTOM + 5)}/>')
        marks.append(svg.tick_text(x.at(tick), BOTTOM + 19, tick))
    return marks


def _stairs(front: Sequence[tuple[float, float]]) -> list[str]:
    """From mark to mark, right and then down: whatever lies above is dominated.  front: percent, pixels."""
    if not front:
        return []
    lines = [svg.down(front[0][0], TOP, front[0][1])]
    for (_, high), (right, low) in pairwise(front):
        lines.append(svg.down(right, high, low))
    turns = [*(right for right, _ in front[1:]), svg.RIGHT]
    lines += [svg.from_to(left, turn, y) for (left, y), turn in zip(front, turns, strict=True)]
    return [f'<line class="front" {line}/>' for line in lines]


def _places(points: Sequence[Point], x: Scale, y: Scale) -> list[tuple[int, int, str]]:
    """For each label the place that covers least; those of marks that are not dominated choose first."""
    at = [(x.at(point.x) / 100 * PHONE_PIXELS, y.at(point.y)) for point in points]
    taken = [Box(u - MARK_PIXELS, u + MARK_PIXELS, v - MARK_PIXELS, v + MARK_PIXELS) for u, v in at]
    for point, (u, _) in zip(points, at, strict=True):
        if point.low is not None and point.high is not None:
            taken.append(Box(u - 2, u + 2, y.at(point.high), y.at(point.low)))
    chosen: dict[int, tuple[int, int, str]] = {}
    for number in sorted(range(len(points)), key=lambda each: points[each].dominated):
        width = len(svg.short(points[number].label)) * CHARACTER_PIXELS
        boxes = [_box(at[number], width, place) for place in PLACES]
        costs = [sum(_overlap(box, other) for other in taken) + _outside(box) for box in boxes]
        best = costs.index(min(costs))
        chosen[number] = PLACES[best]
        taken.append(boxes[best])
    return [chosen[number] for number in range(len(points))]


def _box(at: tuple[float, float], width: float, place: tuple[int, int, str]) -> Box:
    aside, drop, anchor = place
    start = at[0] + aside - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return Box(start, start + width, at[1] + drop - 11, at[1] + drop + 3)


def _overlap(one: Box, other: Box) -> float:
    across = min(one.right, other.right) - max(one.left, other.left)
    down = min(one.bottom, other.bottom) - max(one.top, other.top)
    return max(across, 0.0) * max(down, 0.0)


def _outside(box: Box) -> float:
    """Pixels beyond the plot; a label that is cut is worse than one that covers another."""
    beyond = (-box.left, box.right - PHONE_PIXELS, TOP - 24 - box.top, box.bottom - BOTTOM)
    return 1000 * sum(max(each, 0.0) for each in beyond)
