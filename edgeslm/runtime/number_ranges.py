"""Whole and decimal numbers within bounds, as JSON writes them, as nodes of a grammar."""

from __future__ import annotations

import math

from edgeslm.runtime.grammar import Alt, Byte, Node, Rep, Seq, literal, mask_of

DIGITS = 15
"""Digits before or behind the point, unless bounds ask for more: what a double holds."""
_DIGIT = Byte(mask_of(48, 57))
_FRACTION = Seq([literal("."), Rep(_DIGIT, 1, DIGITS)])
_ZEROS = Seq([literal("."), Rep(Byte(1 << 48), 1, DIGITS)])
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


def numbers(low: float, high: float) -> Node | None:
    """Decimal numbers from low to high; with bounds no exponents, and None without a whole number between."""
    if low == -math.inf and high == math.inf:
        return any_number()
    first = -(10**DIGITS) + 1 if low == -math.inf else math.ceil(low)
    last = 10**DIGITS - 1 if high == math.inf else math.floor(high)
    if first > last:
        return None
    options: list[Node] = []
    # Away from zero a fraction makes a number larger in size: the outermost whole number has none but zeros.
    if last >= 0:
        start = max(0, first)
        options.append(Seq([_natural(last, last), Rep(_ZEROS, 0, 1)]))
        if start < last:
            options.append(Seq([_natural(start, last - 1), Rep(_FRACTION, 0, 1)]))
    if first < 0:
        start = max(1, -last)
        options.append(Seq([_MINUS, _natural(-first, -first), Rep(_ZEROS, 0, 1)]))
        if start < -first:
            options.append(Seq([_MINUS, _natural(start, -first - 1), Rep(_FRACTION, 0, 1)]))
        if last >= 0 and first <= -1:
            options.append(Seq([_MINUS, literal("0"), _FRACTION]))
    return options[0] if len(options) == 1 else Alt(options)


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
