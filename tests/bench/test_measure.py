"""Speed on a runner that only moves a clock: every number is known.  Then the real engine on the tiny model."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bench import interference, measure
from edgeslm.bench.interference import Conditions
from edgeslm.bench.measure import Plan, Timing, bench_artifact, measure_decode, measure_prefill
from edgeslm.bench.memory import MemoryWatch, ProcessMemory
from edgeslm.bench.weights import decode_bytes
from edgeslm.errors import BundleError, RecipeError
from edgeslm.gguf_file import Field, GgufFile, TensorInfo
from edgeslm.runtime.runner import ModelFacts, RunnerOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

CALM = Conditions(
    wall_s=0.0,
    own_s=0.0,
    busy_s=None,
    frequency_hz=None,
    throttle_events=None,
    throttled=None,
    emulated=False,
)


class Machine:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> float:
        return self.now_s

    def timing(self) -> Timing:
        return Timing(clock=self.clock, observe=lambda: CALM)


class ScriptedRunner:
    """A runner whose work takes scripted seconds, and takes them when it is waited for, as an engine may.

    prefill_s, step_s: seconds of the calls, in order; the last goes on for ever.
    """

    load_s = 0.25
    notes: tuple[str, ...] = ()

    def __init__(
        self, machine: Machine, *, prefill_s: Sequence[float] = (1.0,), step_s: Sequence[float] = (0.01,),
        bos: int | None = None,
    ) -> None:  # fmt: skip
        self.machine = machine
        self.prefill_s, self.step_s = list(prefill_s), list(step_s)
        self.position = 0
        self.calls: list[tuple[str, Any, int]] = []
        self.pending_s = 0.0
        self.options = RunnerOptions(threads=2, context=64)
        self.facts = ModelFacts(
            architecture="scripted", description="", parameters=1, weight_bytes=4, vocab_size=100, context_length=64,
            bos_token=bos, eos_token=None, adds_bos=bos is not None, stop_tokens=frozenset(), chat_template=None,
        )  # fmt: skip

    def _work(self, name: str, tokens: list[int], script: list[float]) -> None:
        self.calls.append((name, tokens, self.position))
        self.position += len(tokens)
        self.pending_s += script.pop(0) if len(script) > 1 else script[0]

    def prefill(self, tokens: Sequence[int]) -> None:
        self._work("prefill", list(tokens), self.prefill_s)

    def step(self, token: int) -> None:
        self._work("step", [token], self.step_s)

    def synchronize(self) -> None:
        self.machine.now_s += self.pending_s
        self.pending_s = 0.0

    def reset(self, keep: int = 0) -> None:
        self.machine.now_s += 7.0  # must not be in any measurement
        self.position = keep

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        self.machine.now_s += 0.001 * len(text.split())
        return [token for word in text.split() for token in (len(word), len(word))]

    def last_logits(self) -> NDArray[np.float32]:
        self.machine.now_s += 0.5
        return np.zeros(100, np.float32)


def test_prefill_times_exactly_the_prefill() -> None:
    machine = Machine()
    runner: Any = ScriptedRunner(machine, prefill_s=(9.0, 2.0, 4.0, 1.0))
    run = measure_prefill(runner, list(range(8)), 3, machine.timing())
    assert run["samples_s"] == pytest.approx([2.0, 4.0, 1.0])  # the first one was the warm-up
    assert run["tokens_per_s"] == pytest.approx((8 / 2 + 8 / 4 + 8 / 1) / 3)
    assert run["tokens_per_s_stdev"] == pytest.approx(statistics.stdev([4.0, 2.0, 8.0]))
    assert runner.calls == [("prefill", list(range(8)), 0)] * 4  # each from an empty state
    # Four words of two tokens each make a prompt of eight tokens: 4 ms; the choice takes 0.5 s.
    assert run["ttft_s"] == pytest.approx({"p50": 2.504, "min": 1.504, "max": 4.504})


def test_decode_times_every_step_from_an_empty_state() -> None:
    machine = Machine()
    steps = [9.0, *(0.01 * n for n in range(1, 9))]
    runner: Any = ScriptedRunner(machine, step_s=steps)
    run = measure_decode(runner, [5, 6, 7, 8], 2, machine.timing())
    assert run["samples_s"] == pytest.approx([0.10, 0.26])
    assert run["tokens_per_s"] == pytest.approx((4 / 0.10 + 4 / 0.26) / 2)
    expected = np.quantile(steps[1:], (0.5, 0.95, 0.99))
    assert [run["tpot_s"][key] for key in ("p50", "p95", "p99")] == pytest.approx(expected)
    warm_up, *timed = runner.calls
    assert warm_up == ("step", [5], 0)
    assert timed == [("step", [token], place) for place, token in enumerate([5, 6, 7, 8])] * 2


def test_one_repetition_has_no_spread() -> None:
    machine = Machine()
    runner: Any = ScriptedRunner(machine)
    assert measure_decode(runner, [1], 1, machine.timing())["tokens_per_s_stdev"] is None


def test_a_run_says_why_it_is_not_valid() -> None:
    machine = Machine()
    runner: Any = ScriptedRunner(machine, prefill_s=(1.0, 1.0, 2.0))
    moments = iter([replace(CALM, frequency_hz=2e9), replace(CALM, frequency_hz=1e9)])
    run = measure_prefill(runner, [1], 2, Timing(clock=machine.clock, observe=lambda: next(moments)))
    assert not run["valid"]
    assert [reason.split()[0:2] for reason in run["reasons"]] == [["repetitions", "differ"], ["the", "clock"]]


def test_measures_every_size_with_tokens_drawn_from_the_vocabulary() -> None:
    machine = Machine()
    runner: Any = ScriptedRunner(machine, bos=1)
    notes: list[str] = []

    class Notes:
        def note(self, text: str) -> None:
            notes.append(text)

        def task(self, *_: object) -> None:
            raise AssertionError("a bar would disturb the measurement")

    plan = Plan(prompt_tokens=(16, 32), decode_tokens=(8,), repetitions=2)
    watch = MemoryWatch(read=lambda: ProcessMemory(rss_bytes=5, peak_rss_bytes=6), reset=lambda: True)
    progress: Any = Notes()
    timing = machine.timing()
    runs = measure.measure(runner, plan, memory=watch, timing=timing, progress=progress, seed=3)
    assert [(run["kind"], run["tokens"], run["threads"]) for run in runs] == [
        ("prefill", 16, 2), ("prefill", 32, 2), ("decode", 8, 2),
    ]  # fmt: skip
    assert notes[1] == "bench: prefill 32 tokens, 2 threads, 2 times"
    assert watch.as_record()["peak_rss_bytes"] == 6
    prompts = [tokens for name, tokens, _ in runner.calls if name == "prefill"]
    assert [len(prompt) for prompt in prompts] == [16] * 3 + [32] * 3
    assert all(prompt[0] == 1 for prompt in prompts)
    drawn = set(prompts[-1][1:])
    assert len(drawn) > 20
    assert drawn <= set(range(100))
    again: Any = ScriptedRunner(machine, bos=1)
    measure.measure(again, plan, memory=watch, timing=timing, progress=progress, seed=3)
    assert again.calls == runner.calls


def model(tensors: dict[str, int], **fields: int) -> GgufFile:
    return GgufFile(
        path=None,  # type: ignore[arg-type]
        version=3, alignment=32, data_offset=0, size_bytes=0,
        fields={"general.architecture": Field(kind="str", item_kind=None, value="llama")}
        | {f"llama.{key}": Field(kind="u32", item_kind=None, value=value) for key, value in fields.items()},
        tensors={name: TensorInfo(name=name, shape=(size,), type="I8", offset=0, nbytes=size)
                 for name, size in tensors.items()},
    )  # fmt: skip


def test_decode_reads_a_tied_table_whole_and_an_untied_one_by_the_row() -> None:
    assert decode_bytes(model({"token_embd.weight": 1000, "blk.0.ffn_up.weight": 30})) == 1030
    untied = {"token_embd.weight": 1000, "output.weight": 900, "blk.0.ffn_up.weight": 30}
    assert decode_bytes(model(untied)) == 930
    assert decode_bytes(model({"token_embd.weight": 1000, "per_layer_token_embd.weight": 7000})) == 1000


def test_decode_reads_only_the_experts_in_use() -> None:
    tensors = {"token_embd.weight": 100, "blk.0.ffn_up_exps.weight": 800, "blk.0.ffn_gate_inp.weight": 10}
    assert decode_bytes(model(tensors, expert_count=8, expert_used_count=2)) == 310


def test_the_ceiling_is_bandwidth_over_bytes_and_none_where_unknown() -> None:
    run = {"kind": "decode", "tokens_per_s": 20.0}
    known = measure._with_ceiling(run, 1000.0, 25)
    assert known == run | {"ceiling_tokens_per_s": 40.0, "ceiling_fraction": 0.5}
    for bandwidth, size in ((None, 25), (0.0, 25), (1000.0, 0)):
        unknown = measure._with_ceiling(run, bandwidth, size)
        assert unknown["ceiling_tokens_per_s"] is unknown["ceiling_fraction"] is None
    prefill = {"kind": "prefill", "tokens_per_s": 20.0}
    assert measure._with_ceiling(prefill, 1000.0, 25) == prefill


@pytest.mark.parametrize(("sizes", "message"), [
    ({"prompt_tokens": (), "decode_tokens": ()}, "nothing to measure"),
    ({"prompt_tokens": (0,)}, "0 is no count"),
    ({"repetitions": 0}, "0 is no count"),
    ({"prompt_tokens": (8, 300), "options": RunnerOptions(context=256)}, "300 tokens does not fit the context of 256"),
])  # fmt: skip
def test_impossible_sizes_are_refused_before_anything_is_loaded(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        bench_artifact("nowhere.gguf", **sizes)


def test_a_missing_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        bench_artifact(tmp_path / "nowhere.gguf")


@pytest.fixture(scope="module")
def record(tiny_gguf: Path) -> dict[str, Any]:
    pytest.importorskip("llama_cpp")
    return bench_artifact(
        tiny_gguf, prompt_tokens=(32, 16), decode_tokens=(8,), threads=(1, 2), repetitions=3
    )


def test_the_record_has_every_promised_key_and_is_json(record: dict[str, Any], tiny_gguf: Path) -> None:
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record) == {
        "schema", "created_at", "artifact", "machine", "machine_after", "versions", "memory_bandwidth_bytes_per_s",
        "load_s", "runs", "sustained", "memory", "power", "valid", "reasons",
    }  # fmt: skip
    common = {
        "kind", "tokens", "threads", "batch", "ubatch", "context", "kv_type", "flash_attention", "mmap",
        "gpu_layers", "provider", "repetitions", "samples_s", "tokens_per_s", "tokens_per_s_stdev", "valid", "reasons",
        "started_unix_s", "ended_unix_s", "power", "thermal",
    }  # fmt: skip
    extra = {"prefill": {"ttft_s"}, "decode": {"tpot_s", "ceiling_tokens_per_s", "ceiling_fraction"}}
    for run in record["runs"]:
        assert set(run) == common | extra[run["kind"]]
        assert len(run["samples_s"]) == run["repetitions"] == 3
        assert run["tokens_per_s"] == pytest.approx(np.mean([run["tokens"] / s for s in run["samples_s"]]))
        assert math.isfinite(run["tokens_per_s"])
        assert run["tokens_per_s"] > 0
    order = [(run["threads"], run["kind"], run["tokens"]) for run in record["runs"]]
    sizes = [("prefill", 32), ("prefill", 16), ("decode", 8)]
    assert order == [(threads, *size) for threads in (1, 2) for size in sizes]
    artifact = record["artifact"]
    assert artifact["name"] == tiny_gguf.stem
    assert artifact["bits_per_weight"] == 32.0
    assert artifact["file_bytes"] == tiny_gguf.stat().st_size
    assert artifact["decode_bytes_per_token"] == artifact["weight_bytes"] == 4 * artifact["parameters"]


def test_parts_add_up_on_the_real_engine(record: dict[str, Any]) -> None:
    memory = record["memory"]
    if memory["peak_rss_bytes"] is not None and memory["anonymous_bytes"] is not None:
        parts = memory["file_backed_bytes"] + memory["anonymous_bytes"]
        assert 0.5 * memory["peak_rss_bytes"] < parts <= memory["peak_rss_bytes"] + 2**22
    assert 0 < record["load_s"] < 60
    for run in record["runs"]:
        if run["kind"] == "prefill":
            assert run["ttft_s"]["min"] > min(run["samples_s"])
            assert run["ttft_s"]["min"] <= run["ttft_s"]["p50"] <= run["ttft_s"]["max"]
        else:
            tpot = run["tpot_s"]
            assert 0 < tpot["p50"] <= tpot["p95"] <= tpot["p99"] <= max(run["samples_s"])
            per_token = record["memory_bandwidth_bytes_per_s"] / record["artifact"]["decode_bytes_per_token"]
            assert run["ceiling_tokens_per_s"] == pytest.approx(per_token)


def test_an_invalid_run_makes_the_whole_invalid(record: dict[str, Any]) -> None:
    assert record["valid"] == all(run["valid"] for run in record["runs"])
    assert bool(record["reasons"]) != record["valid"]
    for reason in record["reasons"]:
        assert reason.startswith(("prefill ", "decode "))


def test_reading_the_clock_does_not_disturb_a_step() -> None:
    """Decode reads it once a step of milliseconds: a thousandth of a millisecond would not show."""
    timing = Timing()
    start = timing.clock()
    for _ in range(1000):
        end = timing.clock()
    assert (end - start) / 1000 < 1e-5
    assert timing.observe is interference.observe
