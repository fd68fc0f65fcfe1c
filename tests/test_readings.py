"""Cells of sensor tables: what is missing, what is a time, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgeslm.readings import LARGEST, label_text, number, seconds


@pytest.mark.parametrize("value", ["", " NA ", "nan", "-", "?", None, "inf", math.inf, 1e39, float("nan")])
def test_missing(value: Any) -> None:
    assert math.isnan(number(value))


@pytest.mark.parametrize(("value", "expected"), [("1.5", 1.5), (" -2 ", -2.0), (3, 3.0), ("1e3", 1000.0)])
def test_numbers(value: Any, expected: float) -> None:
    assert number(value) == expected


@pytest.mark.parametrize("value", ["1,5", "on", [1.0], {}])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match="not a number"):
        number(value)


def test_the_largest_is_that_of_32_bits() -> None:
    assert float(np.finfo(np.float32).max) == LARGEST


@pytest.mark.parametrize(
    ("value", "expected"),
    [(12, 12.0), ("12.5", 12.5), ("1970-01-01T00:01:00", 60.0), ("1970-01-01 01:00:00+01:00", 0.0)],
)
def test_times(value: Any, expected: float) -> None:
    assert seconds(value) == expected


@pytest.mark.parametrize("value", ["", None, "soon", "12:61:00"])
def test_what_is_no_time(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        seconds(value)


def test_names() -> None:
    assert [label_text(value) for value in (1.0, 1, " a ", None, math.nan)] == ["1", "1", "a", "", ""]
