"""Plots held against the geometry that their numbers ask for, read back out of the SVG."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.bench import plots, svg

SVG = "{http://www.w3.org/2000/svg}"
numbers = st.floats(-1e12, 1e12)
positive = st.floats(1e-9, 1e12)


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def percent(element: ET.Element, key: str) -> float:
    text = element.attrib[key]
    assert text.endswith("%")
    return float(text[:-1])


def marked(svg: str, tag: str, name: str) -> list[ET.Element]:
    return [each for each in parse(svg).iter(SVG + tag) if name in each.get("class", "").split()]


def texts(svg: str, name: str) -> list[str]:
    return ["".join(each.itertext()) for each in marked(svg, "text", name)]


@given(numbers, numbers)
def test_linear_ticks_are_round_even_and_inside(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = svg.linear_ticks(low, high)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-3):
        return  # closer than a label could say
    slack = (high - low) * 1e-6
    assert 1 <= len(ticks) <= 6
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = [after - before for before, after in pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)
    if steps:
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-4


def test_linear_ticks_known() -> None:
    assert svg.linear_ticks(0, 366) == [0, 100, 200, 300]
    assert svg.linear_ticks(13.8, 17.5) == [14, 15, 16, 17]
    assert svg.linear_ticks(0.0, 0.0874) == [0, 0.02, 0.04, 0.06, 0.08]
    assert svg.linear_ticks(3, 3) == [3]


@given(positive, positive)
def test_log_ticks_are_round_and_inside(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = svg.log_ticks(low, high)
    assert len(ticks) <= 6
    assert ticks == sorted(set(ticks))
    for tick in ticks:
        assert low * (1 - 1e-6) <= tick <= high * (1 + 1e-6)
        assert f"{tick:e}"[0] in "1235"
        assert set(f"{tick:.6e}".split("e")[0][1:]) <= {".", "0"}


def test_log_ticks_known() -> None:
    assert svg.log_ticks(0.04, 3.4) == [0.05, 0.1, 0.2, 0.5, 1, 2]
    assert svg.log_ticks(1e-4, 10) == [1e-4, 1e-3, 1e-2, 0.1, 1, 10]


@given(numbers, numbers, st.floats(0, 1))
def test_scale_is_linear(one: float, other: float, share: float) -> None:
    low, high = sorted((one, other))
    if high - low < 1e-3:
        return
    scale = svg.Scale(low=low, high=high, start=0, end=100)
    assert scale.at(low + share * (high - low)) == pytest.approx(share * 100, abs=1e-3)
    assert scale.at(high * 2 + 1 if high > 0 else 1e13) == 100


def test_scale_logarithmic() -> None:
    scale = svg.Scale(low=0.01, high=100, start=0, end=100, logarithmic=True)
    assert [scale.at(value) for value in (0.01, 0.1, 1, 10, 100)] == pytest.approx([0, 25, 50, 75, 100])
    assert scale.at(0) == 0
    assert svg.Scale(low=5, high=5, start=0, end=100).at(5) == 50


def test_bars_are_as_long_as_their_values() -> None:
    rows = [
        plots.Bar(label="a", text="50 tokens/s", value=50, low=45, high=55, ceiling=100),
        plots.Bar(label="b", text="INVALID 25 tokens/s", value=25, valid=False, colour=2),
    ]
    svg = plots.bars("speed", "Speed", rows, unit="tokens/s")
    (solid,) = marked(svg, "rect", "s1")
    (outline,) = marked(svg, "rect", "invalid")
    (ceiling,) = marked(svg, "rect", "ceiling")
    assert percent(solid, "width") == pytest.approx(2 * percent(outline, "width"), abs=0.02)
    assert percent(ceiling, "width") == pytest.approx(2 * percent(solid, "width"), abs=0.02)
    assert percent(solid, "x") == 0
    line, *caps = marked(svg, "line", "spread")
    middle = (percent(line, "x1") + percent(line, "x2")) / 2
    assert middle == pytest.approx(percent(solid, "width"), abs=0.02)
    assert len(caps) == 2
    (limit,) = marked(svg, "line", "limit")
    assert percent(limit, "x1") == pytest.approx(percent(ceiling, "width"), abs=0.02)
    assert "INVALID 25 tokens/s" in texts(svg, "value")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_interval_marks_lie_where_the_axis_says(logarithmic: bool) -> None:
    """A tick and a dot of the same value share their position."""
    rows = [plots.Interval(label=f"{v}", text=f"{v}", value=v, low=v * 0.9, high=v * 1.1) for v in (1, 2, 5)]
    svg = plots.intervals("x", "X", rows, unit="nats", logarithmic=logarithmic)
    ticks = {"".join(each.itertext()): percent(each, "x") for each in marked(svg, "text", "tick")}
    dots = [percent(each, "cx") for each in marked(svg, "circle", "s1")]
    assert [ticks["1"], ticks["2"], ticks["5"]] == pytest.approx(dots, abs=0.011)
    if logarithmic:
        assert (dots[1] - dots[0]) / (dots[2] - dots[0]) == pytest.approx(math.log(2) / math.log(5), abs=1e-3)
    else:
        assert (dots[1] - dots[0]) / (dots[2] - dots[0]) == pytest.approx(0.25, abs=1e-3)
    whiskers = [each for each in marked(svg, "line", "whisker") if each.get("y1") == each.get("y2")]
    assert len(whiskers) == 3
    for whisker, dot in zip(whiskers, dots, strict=True):
        assert percent(whisker, "x1") < dot < percent(whisker, "x2")


def test_interval_without_bounds_or_above_zero() -> None:
    rows = [plots.Interval(label="max", text="0", value=0.0)]
    svg = plots.intervals("x", "X", rows, unit="nats", logarithmic=True)
    assert not marked(svg, "line", "whisker")
    assert len(marked(svg, "circle", "s1")) == 1


def test_stack_segments_fill_the_bar_in_proportion() -> None:
    rows = [
        plots.Stack(label="a", text="4", segments=[("Q8_0", 1, 1), ("IQ4_NL", 3, 2)]),
        plots.Stack(label="b", text="2", segments=[("F32", 2, 3)]),
    ]
    svg = plots.stacks("types", "Types", rows)
    boxes = [(percent(box, "x"), percent(box, "width")) for box in marked(svg, "rect", "segment")]
    assert boxes == [(0, 25), (25, 75), (0, 50)]
    assert texts(svg, "on") == ["Q8_0", "IQ4_NL", "F32"]
    narrow = plots.stacks(
        "types", "Types", [plots.Stack(label="a", text="", segments=[("Q8_0", 1, 1), ("F32", 99, 2)])]
    )
    assert texts(narrow, "on") == ["F32"]


def test_long_labels_get_a_line_of_their_own() -> None:
    short = plots.bars("a", "A", [plots.Bar(label="short", text="1", value=1)], unit="x")
    label = "smollm2-135m-instruct-with-a-name-that-never-ends"
    long = plots.bars("a", "A", [plots.Bar(label=label, text="1", value=1)], unit="x")
    assert texts(long, "label")[0].endswith("...")
    assert texts(long, "label")[0][:-3] in label
    assert float(parse(long).attrib["height"]) > float(parse(short).attrib["height"])
    assert label in "".join(parse(long).find(f"{SVG}desc").itertext())  # type: ignore[union-attr]


HOSTILE = """</svg><script>alert("1")</script>&'"""


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), st.text(max_size=60))
def test_any_numbers_make_one_well_formed_element(pairs: list[tuple[float, float]], label: str) -> None:
    label = "".join(character for character in label if character.isprintable()) + HOSTILE
    dots = [plots.Interval(label=label, text=label, value=a, low=b, high=b) for a, b in pairs]
    lengths = [plots.Bar(label=label, text=label, value=a, high=b, low=b) for a, b in pairs]
    parts = [plots.Stack(label=label, text=label, segments=[(label, abs(a), 1)]) for a, _ in pairs]
    made = [
        plots.intervals("i", label, dots, unit=label, logarithmic=True),
        plots.bars("b", label, lengths, unit=label),
        plots.stacks("s", label, parts),
    ]
    for plot in made:
        root = parse(plot)
        assert root.tag == SVG + "svg"
        assert not list(root.iter(SVG + "script"))
        assert "nan" not in plot.replace(label, "")
        named = root.attrib["aria-labelledby"].split()
        assert [each.get("id") for each in root if each.tag in (SVG + "title", SVG + "desc")] == named


def test_empty_rows_make_an_empty_plot() -> None:
    for plot in (plots.bars("b", "B", [], unit="x"), plots.stacks("s", "S", [])):
        assert parse(plot).tag == SVG + "svg"


def test_labels_of_two_lines_become_one_where_every_row_has_room() -> None:
    def labels(*names: str) -> list[str]:
        return texts(
            plots.bars("a", "A", [plots.Bar(label=n, text="1", value=1) for n in names], unit="x"), "label"
        )

    assert labels("q4\n128 tokens", "q8\n128 tokens") == ["q4: 128 tokens", "q8: 128 tokens"]
    long = "smollm2-135m-instruct-iq4_nl"
    assert labels(f"{long}\n128 tokens", "q8\n128 tokens") == [long, "128 tokens", "q8", "128 tokens"]
    assert labels(f"{long}\n128 tokens", "q8") == [long, "128 tokens", "q8"]
