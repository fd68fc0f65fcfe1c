"""Pareto's order held against a sweep, and what a report says of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.bench import pareto, report
from edgeslm.bench.pareto import Standing, dominators, standings
from edgeslm.bench.records import report_document
from tests import learned_records, records

coarse = st.integers(0, 6).map(float)
points = st.lists(st.tuples(coarse, coarse), max_size=12)


def front_by_sweep(given_points: list[tuple[float, float]]) -> set[tuple[float, float]]:
    """Kung, Luccio & Preparata 1975 in two dimensions: sorted by cost, each front point lowers the least loss."""
    front, least = set(), float("inf")
    for cost, loss in sorted(set(given_points)):
        if loss < least:
            front.add((cost, loss))
            least = loss
    return front


@given(points)
def test_who_is_not_dominated_is_the_sweep_s_front(found: list[tuple[float, float]]) -> None:
    by = dominators(found)
    assert {point for point, others in zip(found, by, strict=True) if not others} == front_by_sweep(found)


@given(points)
def test_the_order_is_strict_and_transitive(found: list[tuple[float, float]]) -> None:
    by = dominators(found)
    for number, others in enumerate(by):
        assert number not in others
        for other in others:
            assert number not in by[other]
            assert set(by[other]) <= set(others)


@given(points)
def test_what_dominates_first_is_on_the_front(found: list[tuple[float, float]]) -> None:
    """So that a reader who follows one step arrives."""
    by = dominators(found)
    assert all(not by[others[0]] for others in by if others)


def test_dominators_known() -> None:
    assert dominators([(1, 5), (2, 5), (2, 3), (2, 3), (3, 1), (3, 4)]) == [
        (), (2, 3, 0), (), (), (), (4, 2, 3)
    ]  # fmt: skip
    assert dominators([]) == []
    assert dominators([(1, 1), (1, 1)]) == [(), ()]


def loss(value: float, spread: float | None = None) -> dict[str, Any]:
    ends = (None, None) if spread is None else (value - spread, value + spread)
    return {"value": value, "low": ends[0], "high": ends[1]}


@pytest.mark.parametrize(
    ("costs", "losses", "last"),
    [
        ([1, 2], [loss(0.1, 0.01), loss(0.2, 0.01)], Standing(by=(0,), clear=True)),
        ([1, 2], [loss(0.1, 0.06), loss(0.2, 0.06)], Standing(by=(0,), clear=False)),
        ([1, 2], [loss(0.2, 0.01), loss(0.1, 0.01)], Standing(over=0, clear=True)),
        ([1, 2], [loss(0.2, 0.06), loss(0.1, 0.06)], Standing(over=0, clear=False)),
        ([1, 2], [loss(0.1), loss(0.2)], Standing(by=(0,), clear=True)),
        ([1, 2], [loss(0.1), loss(0.1)], Standing(by=(0,), clear=False)),
        ([2, 1], [loss(0.1), loss(0.2)], Standing()),
        ([1, 2, 3], [loss(0.3, 0.01), loss(0.2, 0.01), loss(0.19, 0.02)], Standing(over=1, clear=False)),
        ([1, 2, 3], [loss(0.2, 0.09), loss(0.1, 0.001), loss(0.25, 0.01)], Standing(by=(1, 0), clear=True)),
    ],
)
def test_standings_know_what_chance_explains(
    costs: list[float], losses: list[dict[str, Any]], last: Standing
) -> None:
    assert standings(costs, losses)[-1] == last


DIGEST = {"a": "a1" * 32, "b": "b2" * 32, "c": "c3" * 32}


def of(name: str, file_bytes: int, kl: float, rate: float, **changes: Any) -> list[dict[str, Any]]:
    """The records of one variant: quality and benchmark."""
    about = {"name": f"model-{name}", "path": f"out/{name}", "digest": DIGEST[name], "file_bytes": file_bytes,
             "format": "gguf"}  # fmt: skip
    quality = records.quality(kl=kl) | {"artifact": about}
    bench = records.bench(runs=[records.decode(rate, **changes)]) | {"artifact": about}
    return [quality, bench]


def three(**changes: Any) -> dict[str, Any]:
    """b is bigger and slower than a and worse; c is the biggest and best."""
    return report_document([
        *of("a", 80 << 20, 0.08, 90.0), *of("b", 100 << 20, 0.2, 70.0, **changes), *of("c", 140 << 20, 0.001, 60.0),
    ])  # fmt: skip


def test_comparisons_name_the_dominated_in_si_units() -> None:
    by_size, by_time = three()["comparisons"]
    assert (by_size["cost"], by_size["loss"]) == ("file_bytes", "kl_nats")
    assert (by_time["cost"], by_time["loss"]) == ("time_per_token_s", "kl_nats")
    assert [each["dominated_by"] for each in by_size["results"]] == [[], ["model-a"], []]
    assert [each["dominated_by"] for each in by_time["results"]] == [[], ["model-a"], []]
    assert by_size["results"][0]["cost"] == 80 << 20
    assert by_time["results"][0]["cost"] == pytest.approx(1 / 90)


def test_report_says_who_is_dominated_in_every_form() -> None:
    html, markdown = report.render_html(three()), report.render_markdown(three())
    assert "| b | dominated by a | dominated by a | 100 MiB | 14.3 ms | 0.2000 [0.1860, 0.2140] |" in markdown
    assert "| c | not dominated | not dominated |" in markdown
    for name in ("size-kl", "time-kl"):
        (plot,) = re.findall(rf'<svg[^>]*aria-labelledby="{name}-title.*?</svg>', html)
        assert plot.count('class="hollow t2"') == 1
        assert plot.count("<circle") == 3
        assert "nats, dominated; c: " in plot


def test_an_invalid_benchmark_is_not_compared_by_time() -> None:
    document = three(valid=False, reasons=["noise"])
    by_size, by_time = document["comparisons"]
    assert len(by_size["results"]) == 3
    assert [each["label"] for each in by_time["results"]] == ["model-a", "model-c"]
    markdown = report.render_markdown(document)
    assert "| b | dominated by a | n/a | 100 MiB | n/a |" in markdown
    assert "- b: the benchmark is INVALID" in markdown


def test_times_of_other_conditions_are_not_compared() -> None:
    (by_size,) = three(tokens=64)["comparisons"]
    assert by_size["cost"] == "file_bytes"


def test_other_texts_are_not_compared_at_all_and_other_machines_not_by_time() -> None:
    given_records = [*of("a", 80 << 20, 0.08, 90.0), *of("b", 100 << 20, 0.2, 70.0)]
    given_records[3]["machine"] = records.machine(cpu_model="Cortex-A76")
    assert [each["cost"] for each in report_document(given_records)["comparisons"]] == ["file_bytes"]
    given_records[2]["text"] = given_records[2]["text"] | {"sha256": "00" * 32}
    assert report_document(given_records)["comparisons"] == []


def test_classifiers_are_compared_by_errors_and_latency() -> None:
    better, worse = learned_records.task_quality(skill=4.0), learned_records.task_quality("gru", skill=1.0)
    document = report_document([
        better, learned_records.bench(), worse, learned_records.bench("gru", [learned_records.predict(900.0)]),
    ])  # fmt: skip
    assert [(each["cost"], each["loss"]) for each in document["comparisons"]] == [
        ("file_bytes", "error_rate"), ("latency_s", "error_rate")
    ]  # fmt: skip
    first = document["comparisons"][0]["results"][0]
    assert first["loss"] == pytest.approx(1 - better["accuracy"]["value"])
    html = report.render_html(document)
    assert 'aria-labelledby="size-errors-title' in html
    assert 'aria-labelledby="latency-errors-title' in html


def test_perplexity_where_there_is_no_reference() -> None:
    given_records = [*of("a", 80 << 20, 0.08, 90.0), *of("b", 100 << 20, 0.2, 70.0)]
    for record in (given_records[0], given_records[2]):
        record["kl_nats"] = None
    assert {each["loss"] for each in report_document(given_records)["comparisons"]} == {"perplexity"}


def test_one_result_is_compared_with_nothing() -> None:
    assert report_document([records.bundle(), records.build()])["comparisons"] == []
    assert pareto.trade_offs([]) == []
