"""Whole and decimal numbers within bounds, as JSON writes them, as nodes of a grammar."""

from __future__ import annotations

import math
from decimal import Decimal

from edgeslm.runtime.grammar import Alt, Byte, Node, Rep, Seq, literal, mask_of

DIGITS = 15
"""Digits before or behind the point, unless bounds ask for more: what a double holds."""
_DIGIT = Byte(mask_of(48, 57))
_FRACTION = Seq([literal("."), Rep(_DIGIT, 1, DIGITS)])
_EXPONENT = Seq([Byte(1 << 69 | 1 << 101), Rep(Byte(1 << 43 | 1 << 45), 0, 1), Rep(_DIGIT, 1, 2)])
_MINUS = literal("-")


def any_number() -> Node:
    """Any decimal number, with an exponent or not."""
    whole = _natural(0, 10**DIGITS - 1)
    return Seq([Rep(_MINUS, 0, 1), whole, Rep(_FRACTION, 0, 1), Rep(_EXPONENT, 0, 1)])


def integers(low: float, high: float) -> Node | None:
    """Whole numbers from low to high (infinite: no bound); None when there is none."""
    first = -(10**DIGITS) + 1 if low == -math.inf else math.ceil(low)
    last = 10**DIGITS - 1 if high == math.inf else math.floor(high)
    first, last = (
        (min(first, last) if low == -math.inf else first),
        (max(first, last) if high == math.inf else last),
    )
    if first > last:
        return None
    options: list[Node] = []
    if first < 0:
        options.append(Seq([_MINUS, _natural(max(1, -last), -first)]))
    if last >= 0:
        options.append(_natural(max(0, first), last))
    return options[0] if len(options) == 1 else Alt(options)


def numbers(low: float, high: float, *, above: bool = False, below: bool = False) -> Node | None:
    """Decimal numbers from low to high (infinite: no bound), with bounds no exponents; None when there is none.

    above, below: low or high itself is left out.
    """
    if low == -math.inf and high == math.inf:
        return any_number()
    options = [] if high < 0 else [_sizes(max(low, 0), high, above and low >= 0, below)]
    if low < 0:
        negative = _sizes(max(-high, 0), -low, high >= 0 or below, above)
        options += [negative and Seq([_MINUS, negative])]
    found = [option for option in options if option is not None]
    return Alt(found) if found else None


def _sizes(least: float, most: float, above: bool, below: bool) -> Node | None:
    """Numbers from least to most, 0 <= least; above, below: without these."""
    if least > most or (least == most and (above or below)):
        return None
    first, start = _digits(least)
    last, end = (max(first, 10**DIGITS - 1), None) if most == math.inf else _digits(most)
    if below and end == "":  # whatever stands behind the point of the whole number before
        last, end = last - 1, None
    if first == last:
        options = [_behind(first, start, end, above, below)]
    else:
        options = [_behind(first, start, None, above, False), _behind(last, None, end, False, below)]
        if first + 1 < last:
            options.append(Seq([_natural(first + 1, last - 1), Rep(_FRACTION, 0, 1)]))
    found = [option for option in options if option is not None]
    return Alt(found) if found else None


def _digits(value: float) -> tuple[int, str]:
    """The whole part of a number, and the digits behind its point."""
    whole, _, behind = format(Decimal(repr(value)), "f").partition(".")
    return int(whole), behind.rstrip("0")


def _behind(whole: int, low: str | None, high: str | None, above: bool, below: bool) -> Node | None:
    """A whole number with digits behind the point from low to high (None: any); above, below: without these."""
    # A number with no more digits than a double holds is no other double's: a bound left out stays so.
    exact = max(0, DIGITS - len(str(whole)))
    size = exact if above or below else max(DIGITS, len(low or ""), len(high or ""))
    digits = _more(low, high, above, below, size, some=True)
    options: list[Node] = [Seq([])] if _may_end(low, high, above, below) else []
    options += [Seq([literal("."), digits])] if digits is not None else []
    return Seq([literal(str(whole)), Alt(options)]) if options else None


def _more(
    low: str | None, high: str | None, above: bool, below: bool, left: int, *, some: bool
) -> Node | None:
    """At most `left` digits, as decimals from low to high; some: at least one."""
    if some and not left:
        return None
    if low is None and high is None:
        return Rep(_DIGIT, int(some), left)
    options: list[Node] = [] if some or not _may_end(low, high, above, below) else [Seq([])]
    least = 0 if low is None else int(low[:1] or 0)
    most = 9 if high is None else int(high[:1] or 0)
    ways: dict[tuple[str | None, str | None], int] = {}
    for digit in range(least, most + 1) if left else ():
        then = (
            low[1:] if low is not None and digit == least else None,
            high[1:] if high is not None and digit == most else None,
        )
        ways[then] = ways.get(then, 0) | 1 << (48 + digit)
    for (next_low, next_high), mask in ways.items():
        rest = _more(next_low, next_high, above, below, left - 1, some=False)
        if rest is not None:
            options.append(Seq([Byte(mask), rest]))
    return Alt(options) if options else None


def _may_end(low: str | None, high: str | None, above: bool, below: bool) -> bool:
    """Whether no further digits are from low to high."""
    return (low is None or not (low.strip("0") or above)) and (
        high is None or bool(high.strip("0")) or not below
    )


def _natural(low: int, high: int) -> Node:
    """Whole numbers from low to high, 0 <= low <= high, without leading zeros."""
    options: list[Node] = []
    for size in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (size - 1) if size > 1 else 0)
        most = min(high, 10**size - 1)
        options.append(_padded(str(least), str(most)))
    return options[0] if len(options) == 1 else Alt(options)


def _padded(low: str, high: str) -> Node:
    """Digits of one length, from low to high as numbers."""
    size = len(low)
    if not size:
        return Seq([])
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return Seq([Byte(mask_of(ord(low[0]), ord(high[0]))), Rep(_DIGIT, size - 1, size - 1)])
    if low[0] == high[0]:
        return Seq([literal(low[0]), _padded(low[1:], high[1:])])
    options: list[Node] = []
    start, end = ord(low[0]), ord(high[0])
    if set(low[1:]) != {"0"}:
        options.append(Seq([literal(low[0]), _padded(low[1:], "9" * (size - 1))]))
        start += 1
    if set(high[1:]) != {"9"}:
        options.append(Seq([literal(high[0]), _padded("0" * (size - 1), high[1:])]))
        end -= 1
    if start <= end:
        options.append(Seq([Byte(mask_of(start, end)), Rep(_DIGIT, size - 1, size - 1)]))
    return Alt(options)
