"""Cells of a table of sensor readings as numbers, times and names: alike in training and on the device."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime
from typing import Any

MISSING = frozenset(("", "na", "n/a", "nan", "none", "null", "-", "?"))
"""Texts that stand for a missing reading."""
LARGEST = 3.4028234663852886e38
"""Of a 32-bit float; beyond it a reading is taken for infinite."""


def number(value: Any) -> float:
    """A reading; NaN for a missing or infinite one.  Raises ValueError for text and for other things."""
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    if not isinstance(value, str | int | float):
        raise ValueError(f"holds {type(value).__name__}, not a number")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"holds {str(value)[:40]!r}, not a number") from None
    return result if abs(result) <= LARGEST else math.nan


def seconds(value: Any) -> float:
    """A time in seconds; dates count from 1970 (UTC where they name no zone).  Raises ValueError."""
    if isinstance(value, str) and ":" in value:
        value = datetime.fromisoformat(value.strip())
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    result = number(value)
    if math.isnan(result):
        raise ValueError("has no time")
    return result


def label_text(value: Any) -> str:
    """A class's or unit's name, "" without one; 1.0 and 1 are the same."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()
