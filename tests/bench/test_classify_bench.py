"""The classifier's benchmark: a clock that is counted by hand, and the real engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bench import classify_bench
from edgeslm.bench.classify_bench import bench_classifier, measure_predict
from edgeslm.bench.interference import Conditions
from edgeslm.bench.measure import Timing
from edgeslm.errors import BundleError, RecipeError
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path


def quiet(busy_s: float | None = None) -> Conditions:
    return Conditions(wall_s=0.0, own_s=0.0, busy_s=busy_s, frequency_hz=None, throttle_events=None,
                      throttled=None, emulated=False)  # fmt: skip


class Machine:
    """A clock that only a call moves: by the next of the given times, over and over."""

    def __init__(self, *took_s: float) -> None:
        self.now, self.took_s, self.calls = 0.0, took_s, 0

    def clock(self) -> float:
        return self.now

    def call(self) -> None:
        self.now += self.took_s[self.calls % len(self.took_s)]
        self.calls += 1


def test_samples_and_percentiles_by_hand() -> None:
    machine = Machine(0.1, 0.1, 0.2)
    run = measure_predict(machine.call, 4, 3, Timing(clock=machine.clock, observe=quiet))
    assert run["calls"] == 5  # half a second of calls of 0.1 s
    assert machine.calls == 2 + 3 * 5
    took = [0.2, 0.1, 0.1] * 5
    assert run["samples_s"] == pytest.approx([sum(took[i : i + 5]) for i in (0, 5, 10)])
    assert run["items_per_s"] == pytest.approx(np.mean([20 / sum(took[i : i + 5]) for i in (0, 5, 10)]))
    assert run["latency_s"] == pytest.approx({f"p{q}": np.quantile(took, q / 100) for q in (50, 95, 99)})


def test_calls_fill_a_repetition_within_bounds() -> None:
    for took_s, calls in ((10.0, 1), (0.3, 2), (1e-6, 1000)):
        machine = Machine(took_s)
        assert (
            measure_predict(machine.call, 1, 1, Timing(clock=machine.clock, observe=quiet))["calls"] == calls
        )


def test_one_repetition_has_no_spread() -> None:
    machine = Machine(0.1)
    assert (
        measure_predict(machine.call, 1, 1, Timing(clock=machine.clock, observe=quiet))["items_per_s_stdev"]
        is None
    )


def test_a_run_that_others_disturbed_is_not_valid() -> None:
    machine = Machine(0.1)
    seen = iter([quiet(0.0), Conditions(wall_s=10.0, own_s=1.0, busy_s=9.0, frequency_hz=None, throttle_events=None,
                                        throttled=None, emulated=False)])  # fmt: skip
    run = measure_predict(machine.call, 1, 2, Timing(clock=machine.clock, observe=lambda: next(seen)))
    assert run["valid"] is False
    assert "other processes" in run["reasons"][0]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions as short as a call."""
    monkeypatch.setattr(classify_bench, "REPETITION_S", 0.01)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("bundles")
    return {kind: onnx_models.write_classifier(folder / kind, kind) for kind in ("text", "sensors")}


@pytest.mark.usefixtures("short")
def test_a_record_of_every_size(bundles: dict[str, Any]) -> None:
    record = bench_classifier(bundles["text"].path, batch_sizes=(1, 4), tokens=(3, 5, 100), threads=(1, 2),
                              repetitions=2)  # fmt: skip
    sizes = [(run["threads"], run["tokens"], run["batch"]) for run in record["runs"]]
    assert sizes == [
        (threads, tokens, batch) for threads in (1, 2) for tokens in (3, 5, 6) for batch in (1, 4)
    ]
    for run in record["runs"]:
        assert (run["kind"], run["repetitions"], run["rows"]) == ("predict", 2, None)
        assert len(run["samples_s"]) == 2
        assert run["latency_s"]["p50"] <= run["latency_s"]["p95"] <= run["latency_s"]["p99"]
        assert run["items_per_s"] > 0
    assert record["artifact"]["digest"] == bundles["text"].digest
    assert record["artifact"]["weight_bytes"] == 4 * 68
    assert record["memory"]["peak_rss_bytes"] > 0
    assert record["schema"] == "edgeslm.bench/1"
    json.dumps(record, allow_nan=False)


def test_texts_have_the_length_that_is_measured(bundles: dict[str, Any]) -> None:
    from edgeslm.runtime.ort import OrtClassifier

    classifier = OrtClassifier(bundles["text"], threads=1)
    for length in (2, 3, 6):
        text = classify_bench._text(classifier, length)
        assert len(classifier.tokenize([text])[0]) == length
        assert not any(classifier.is_cut([text]))


@pytest.mark.usefixtures("short")
def test_sensors_have_rows(bundles: dict[str, Any]) -> None:
    (run,) = bench_classifier(bundles["sensors"].path, threads=(1,), repetitions=1)["runs"]
    assert (run["tokens"], run["rows"]) == (None, onnx_models.ROWS)


@pytest.mark.usefixtures("short")
def test_the_longest_text_is_measured_unless_told_otherwise(bundles: dict[str, Any]) -> None:
    (run,) = bench_classifier(bundles["text"].path, threads=(1,), repetitions=1)["runs"]
    assert run["tokens"] == 6


@pytest.mark.parametrize(
    "sizes", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"tokens": (0,)}, {"repetitions": 0}]
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="are counts"):
        bench_classifier(tmp_path / "nothing", **sizes)


def test_what_is_no_classifier_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(BundleError, match="no classifier"):
        bench_classifier(tiny_gguf)


@pytest.mark.usefixtures("short")
def test_lengths_on_the_command_line(bundles: dict[str, Any]) -> None:
    from click.testing import CliRunner

    from edgeslm.cli import cli

    for chosen, lengths in ((["-p", "3,5"], [3, 5]), ([], [6])):
        done = CliRunner().invoke(
            cli, ["bench", str(bundles["text"].path), *chosen, "-r", "1", "-t", "1", "--json"]
        )
        assert done.exit_code == 0, done.output
        assert [run["tokens"] for run in json.loads(done.stdout)["runs"]] == lengths
