"""The parts of a plot as SVG text: scales and their ticks, marks, texts, and the element around them.

Widths are percentages of the element and heights are pixels, so text keeps its size on a phone and on
a desk and nothing needs a script.  Colours are classes (s1 to s8, "muted", ...) that the page defines
for its light and its dark theme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEFT, RIGHT = 2.0, 98.0
"""Percent of the width between which values are drawn."""
LABEL_CHARACTERS = 38
"""Characters of a label alone on its line; the rest of a longer one is in the plot's description."""
COLOURS = 8


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


def short(label: str) -> str:
    return label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 3] + "..."


def axis(scale: Scale, ticks: Sequence[float], bottom: float) -> list[str]:
    """Grid lines behind the rows with their values below."""
    return [
        part
        for tick in ticks
        for part in (
            f'<line class="grid" {down(scale.at(tick), 0, bottom)}/>',
            tick_text(scale.at(tick), bottom + 16, tick),
        )
    ]


def tick_text(position: float, y: float, tick: float) -> str:
    anchor = "start" if position < 5 else "end" if position > 92 else "middle"
    return text("tick", position, y, f"{tick:,.10g}", anchor)


def text(kind: str, x: float, y: float, text: str, anchor: str = "start", *, aside: int = 0) -> str:
    """x in percent, y and aside in pixels."""
    moved = f' dx="{aside}"' if aside else ""
    place = f'x="{x:.2f}%" y="{y:.1f}"{moved} text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def from_to(start: float, end: float, y: float) -> str:
    return f'x1="{start:.2f}%" x2="{end:.2f}%" y1="{y:.1f}" y2="{y:.1f}"'


def down(x: float, start: float, end: float) -> str:
    return f'x1="{x:.2f}%" x2="{x:.2f}%" y1="{start:.1f}" y2="{end:.1f}"'


def box(scale: Scale, start: float, end: float) -> str:
    return f'x="{scale.at(start):.2f}%" width="{scale.at(end) - scale.at(start):.2f}%"'


def frame(name: str, title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """name: an id that no other plot of the page has."""
    name = escape(name)
    return (
        f'<svg class="plot" role="img" aria-labelledby="{name}-title {name}-text" width="100%" '
        f'height="{height:.0f}" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
