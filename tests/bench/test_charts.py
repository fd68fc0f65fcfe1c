"""Charts held against the geometry that their numbers ask for, read back out of the SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.bench import charts
from tests.bench.test_plots import HOSTILE, SVG, marked, parse, percent, texts

if TYPE_CHECKING:
    import xml.etree.ElementTree as ET


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    """Each line's points within its box of 100 x 100."""
    lines = [each.attrib["points"] for each in parse(svg).iter(SVG + "polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]  # type: ignore[misc]


def test_a_curve_lies_where_its_values_are() -> None:
    lines = [
        charts.Curve(label="training", points=[(0, 4.0), (50, 2.0), (100, 1.0)]),
        charts.Curve(label="held out", points=[(0, 3.0), (100, 1.5)], colour=2, dots=True),
    ]
    svg = charts.curves("x", "Loss", lines, x_unit="step", y_unit="nats")
    steps, held = points_of(svg)
    assert [x for x, _ in steps] == pytest.approx([2, 50, 98])
    # 4 to 1 with a margin of 6 % of the range at both ends
    heights = [100 * (4.18 - value) / 3.36 for value in (4.0, 2.0, 1.0)]
    assert [y for _, y in steps] == pytest.approx(heights, abs=0.02)
    assert held[0][1] == pytest.approx(100 * (4.18 - 3.0) / 3.36, abs=0.02)
    dots = [each for each in marked(svg, "circle", "s2") if each.attrib["cx"].endswith("%")]
    assert [percent(dot, "cx") for dot in dots] == pytest.approx([2, 98])
    box = next(parse(svg).iter(SVG + "svg"))
    inner = next(each for each in box.iter(SVG + "svg") if each is not box)
    top, height = float(inner.attrib["y"]), float(inner.attrib["height"])
    assert float(dots[0].attrib["cy"]) == pytest.approx(top + held[0][1] / 100 * height, abs=0.1)
    assert texts(svg, "label") == ["training", "held out"]


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=20))
def test_every_curve_stays_inside(points: list[tuple[float, float]]) -> None:
    svg = charts.curves("x", "L", [charts.Curve(label="a", points=points)], x_unit="x", y_unit="y")
    assert "nan" not in svg
    for x, y in points_of(svg)[0]:
        assert -0.01 <= x <= 100.01
        assert -0.01 <= y <= 100.01


def test_a_line_without_points_is_left_out() -> None:
    lines = [charts.Curve(label="a", points=[(1, 2)]), charts.Curve(label="b", points=[])]
    assert texts(charts.curves("x", "L", lines, x_unit="x", y_unit="y"), "label") == ["a"]


def cells(svg: str) -> list[tuple[float, float, float, str]]:
    """(left, top, opacity, colour) of each cell."""
    return [
        (percent(each, "x"), *(float(each.attrib[key]) for key in ("y", "fill-opacity")), each.attrib["class"][8:])
        for each in marked(svg, "rect", "segment")
    ]  # fmt: skip


def test_a_confusion_matrix_is_shaded_by_the_row() -> None:
    svg = charts.confusion("c", "C", ("ham", "spam"), [[75, 25], [0, 10]])
    found = cells(svg)
    assert [opacity for _, _, opacity, _ in found] == pytest.approx(
        [charts.SHADE * s for s in (0.75, 0.25, 0, 1)], abs=1e-3
    )
    assert [colour for *_, colour in found] == ["s3", "s8", "s8", "s3"]
    assert found[0][0] == found[2][0] < found[1][0] == found[3][0]
    assert found[0][1] == found[1][1] < found[2][1] == found[3][1]
    assert texts(svg, "cell") == ["75", "25", "0", "10"]
    assert texts(svg, "label") == ["ham", "spam", "ham", "spam"]


def test_long_names_stand_above_their_rows_and_columns_have_numbers() -> None:
    names = [f"department {number}" for number in range(4)]
    svg = charts.confusion("c", "C", names, [[1] * 4] * 4)
    assert texts(svg, "label") == ["1", "2", "3", "4", *(f"{i} {name}" for i, name in enumerate(names, 1))]
    assert min(left for left, *_ in cells(svg)) == 0


def test_numbers_that_do_not_fit_into_every_cell_are_in_none() -> None:
    names = [f"class {number}" for number in range(16)]
    assert len(texts(charts.confusion("c", "C", names, [[9] * 16] * 16), "cell")) == 256
    counts = [[9] * 16 for _ in range(16)]
    counts[3][4] = 1234
    assert texts(charts.confusion("c", "C", names, counts), "cell") == []


def test_a_class_without_examples_is_blank() -> None:
    svg = charts.confusion("c", "C", ("a", "b"), [[3, 1], [0, 0]])
    assert [opacity for _, _, opacity, _ in cells(svg)][2:] == [0, 0]
    assert "b: no examples" in "".join(parse(svg).find(f"{SVG}desc").itertext())  # type: ignore[union-attr]


def test_reliability_bars_reach_their_accuracy() -> None:
    bins = [charts.Bin(low=0.6, high=0.8, examples=10, accuracy=0.5),
            charts.Bin(low=0.8, high=1.0, examples=40, accuracy=1.0)]  # fmt: skip
    svg = charts.reliability("r", "R", bins)
    half, whole = marked(svg, "rect", "s1")
    (line,) = marked(svg, "line", "ideal")
    floor, ceiling = float(line.attrib["y1"]), float(line.attrib["y2"])
    assert float(whole.attrib["y"]) == pytest.approx(ceiling)
    assert float(half.attrib["y"]) == pytest.approx((floor + ceiling) / 2)
    assert float(half.attrib["y"]) + float(half.attrib["height"]) == pytest.approx(floor)
    assert percent(half, "x") == pytest.approx(2 + 0.6 * 96, abs=0.2)
    few, many = (float(each.attrib["height"]) for each in marked(svg, "rect", "s5"))
    assert many == pytest.approx(4 * few)


def test_columns_are_as_high_as_their_values() -> None:
    svg = charts.columns("c", "C", [0.4, 0.1, 0.2], [False, True, False], x_unit="layer", y_unit="cosine")
    solid, outlined = marked(svg, "rect", "s1"), marked(svg, "rect", "invalid")
    assert [len(solid), len(outlined)] == [2, 1]
    heights = [float(each.attrib["height"]) for each in (solid[0], outlined[0], solid[1])]
    assert heights == pytest.approx([heights[0], heights[0] / 4, heights[0] / 2], abs=0.11)
    assert percent(solid[0], "x") < percent(outlined[0], "x") < percent(solid[1], "x")


def test_hostile_names_stay_text() -> None:
    curve = charts.Curve(label=HOSTILE, points=[(0, 1), (1, 2)])
    for plot in (
        charts.curves(HOSTILE, HOSTILE, [curve], x_unit=HOSTILE, y_unit=HOSTILE),
        charts.confusion(HOSTILE, HOSTILE, (HOSTILE, "b"), [[1, 2], [3, 4]]),
        charts.reliability(HOSTILE, HOSTILE, [charts.Bin(low=0, high=1, examples=1, accuracy=1)]),
        charts.columns(HOSTILE, HOSTILE, [1.0], [True], x_unit=HOSTILE, y_unit=HOSTILE),
    ):
        root: ET.Element = parse(plot)
        assert not list(root.iter("script")) + list(root.iter(SVG + "script"))
        assert HOSTILE in "".join(root.itertext())


def test_nothing_to_draw() -> None:
    for plot in (charts.reliability("r", "R", []), charts.columns("c", "C", [], [], x_unit="x", y_unit="y")):
        assert parse(plot).tag == SVG + "svg"
        assert not math.isnan(float(parse(plot).attrib["height"]))
