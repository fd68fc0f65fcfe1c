"""The scatter plot held against the geometry that its numbers ask for, read back out of the SVG."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.bench import scatter
from edgeslm.bench.scatter import BOTTOM, PHONE_PIXELS, TOP, Point
from tests.bench.test_plots import HOSTILE, SVG, marked, numbers, parse, percent, texts


def draw(points: list[Point]) -> str:
    return scatter.scatter("s", "Size", points, x_unit="MiB", y_unit="nats")


def test_marks_keep_their_order_on_both_axes() -> None:
    svg = draw([
        Point(label="small", x=80, y=0.08, low=0.07, high=0.09), Point(label="big", x=140, y=0.001, colour=2)
    ])  # fmt: skip
    small, big = marked(svg, "circle", "s1")[0], marked(svg, "circle", "s2")[0]
    assert percent(small, "cx") < percent(big, "cx")
    assert float(small.attrib["cy"]) < float(big.attrib["cy"])
    (whisker,) = marked(svg, "line", "whisker")
    assert float(whisker.attrib["y1"]) < float(small.attrib["cy"]) < float(whisker.attrib["y2"])
    assert {"small", "big"} <= set(texts(svg, "label"))


def test_dominated_marks_are_hollow_quiet_and_said() -> None:
    svg = draw([Point(label="a", x=1, y=1), Point(label="b", x=2, y=2, colour=2, dominated=True)])
    assert len(marked(svg, "circle", "s1")) == len(marked(svg, "circle", "hollow")) == 1
    assert texts(svg, "label") == ["a"]
    assert "b" in texts(svg, "tick")
    described = "".join(parse(svg).find(f"{SVG}desc").itertext())  # type: ignore[union-attr]
    assert "b: 2 MiB, 2 nats, dominated" in described
    assert "a: 1 MiB, 1 nats;" in described


def test_no_dominated_mark_hides_one_to_choose_from() -> None:
    svg = draw([Point(label="a", x=1, y=1), Point(label="b", x=1, y=1.01, colour=2, dominated=True)])
    assert svg.index("hollow") < svg.index('class="s1"')


def test_stairs_pass_through_the_front_and_below_all_else() -> None:
    """Every front mark lies on a stair, every dominated one above or right of the stairs."""
    points = [
        Point(label="a", x=1, y=3), Point(label="b", x=2, y=2), Point(label="c", x=3, y=1),
        Point(label="d", x=2.5, y=2.5, dominated=True, colour=2),
    ]  # fmt: skip
    svg = draw(points)
    lines = [
        [float(line.attrib[key].rstrip("%")) for key in ("x1", "x2", "y1", "y2")]
        if "x1" in line.attrib
        else [float(line.attrib["x"].rstrip("%"))] * 2
        for line in marked(svg, "line", "front")
    ]
    assert len(lines) == 6
    for mark in marked(svg, "circle", "s1"):
        x, y = percent(mark, "cx"), float(mark.attrib["cy"])
        assert any(
            low - 0.02 <= x <= high + 0.02 and top - 0.2 <= y <= foot + 0.2 for low, high, top, foot in lines
        )
    (aside,) = marked(svg, "circle", "hollow")
    level = [top for low, high, top, foot in lines if top == foot and low <= percent(aside, "cx") <= high]
    assert float(aside.attrib["cy"]) < level[0]


@pytest.mark.parametrize(("ratio", "is_log"), [(3, False), (8, True)])
def test_sizes_far_apart_are_on_a_logarithm(ratio: float, is_log: bool) -> None:
    svg = draw([Point(label=f"{x:.0f}", x=x, y=1) for x in (50, 50 * math.sqrt(ratio), 50 * ratio)])
    left, middle, right = (percent(mark, "cx") for mark in marked(svg, "circle", "s1"))
    assert math.isclose(middle - left, right - middle, abs_tol=0.02) is is_log


def test_zero_has_a_place_on_a_logarithm() -> None:
    """An unquantized variant's KL divergence is 0, and another one's a thousandth."""
    svg = draw([
        Point(label="f32", x=500, y=0.0, low=0.0, high=0.0),
        Point(label="q8", x=140, y=0.001, low=0.0009, high=0.0011),
        Point(label="q4", x=80, y=0.1),
    ])  # fmt: skip
    zero, *others = (float(mark.attrib["cy"]) for mark in marked(svg, "circle", "s1"))
    assert zero == BOTTOM
    assert all(TOP <= other < BOTTOM - 20 for other in others)
    assert "under 0.0002" in texts(svg, "tick")
    assert "0.001" in texts(svg, "tick")


def test_rounding_does_not_press_what_matters_to_the_top() -> None:
    """The same model in float32 by another engine: a KL divergence of half a millionth."""
    svg = draw(
        [
            Point(label="f32", x=500, y=5e-7),
            Point(label="q8", x=140, y=0.004),
            Point(label="q4", x=80, y=0.15),
        ]
    )
    rounding, q8, q4 = (float(mark.attrib["cy"]) for mark in marked(svg, "circle", "s1"))
    assert rounding == BOTTOM
    assert q8 - q4 > (BOTTOM - TOP) / 3
    assert "under 5e-05" in texts(svg, "tick")


def test_ticks_and_marks_share_a_scale() -> None:
    svg = draw(
        [Point(label="a", x=100, y=0.01), Point(label="b", x=200, y=0.1), Point(label="c", x=500, y=1)]
    )
    ticks = {"".join(each.itertext()): each for each in marked(svg, "text", "tick")}
    for mark, x, y in zip(
        marked(svg, "circle", "s1"), ("100", "200", "500"), ("0.01", "0.1", "1"), strict=True
    ):
        assert percent(ticks[x], "x") == pytest.approx(percent(mark, "cx"), abs=0.02)
        assert float(ticks[y].attrib["y"]) + 4 == pytest.approx(float(mark.attrib["cy"]), abs=0.2)


CLUSTERS = [
    [(85.8, 0.173), (85.8, 0.082), (98.9, 0.065), (100.2, 0.057), (138, 0.0011), (258, 0.001), (539, 0.0)],
    [(1, 1), (1.02, 1), (1.04, 1), (1.06, 1)],
    [(1, 1), (1, 1.03), (1, 1.06), (2, 0.5)],
]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_labels_cover_no_label_even_on_a_phone(cluster: list[tuple[float, float]]) -> None:
    points = [Point(label=f"variant-{n}", x=x, y=y) for n, (x, y) in enumerate(cluster)]
    boxes = []
    for label in marked(draw(points), "text", "label"):
        wide = len("".join(label.itertext())) * scatter.CHARACTER_PIXELS
        start = percent(label, "x") / 100 * PHONE_PIXELS + float(label.get("dx", 0))
        start -= {"start": 0.0, "middle": wide / 2, "end": wide}[label.attrib["text-anchor"]]
        y = float(label.attrib["y"])
        boxes.append((start, start + wide, y - 11, y + 3))
        assert start >= 0
        assert start + wide <= PHONE_PIXELS
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            across, down = (
                min(one[1], other[1]) - max(one[0], other[0]),
                min(one[3], other[3]) - max(one[2], other[2]),
            )
            assert across <= 0.5 or down <= 0.5, (one, other)


@given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=5), st.text(max_size=60))
def test_any_numbers_make_one_well_formed_element(rows: list[tuple[float, float, bool]], label: str) -> None:
    label = "".join(character for character in label if character.isprintable()) + HOSTILE
    plot = draw([Point(label=label, x=x, y=y, low=y, high=y, dominated=of) for x, y, of in rows])
    root = parse(plot)
    assert root.tag == SVG + "svg"
    assert not list(root.iter(SVG + "script"))
    assert "nan" not in plot.replace(label, "")
