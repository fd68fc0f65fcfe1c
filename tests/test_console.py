"""Records as text: what must be said is said, in columns that line up."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm import console
from tests import learned_records, records

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

INSPECTED: dict[str, Any] = {
    "schema": "edgeslm.inspect/1",
    "path": "smollm2-q4.gguf",
    "kind": "gguf",
    "name": "SmolLM2 135M Instruct",
    "architecture": "llama",
    "parameters": 134_515_008,
    "file_bytes": 98_713_600,
    "weight_bytes": 97_013_600,
    "bits_per_weight": 5.77,
    "context_length": 8192,
    "hidden_size": 576,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "tied_embeddings": True,
    "tokenizer": {"model": "gpt2", "pre": "smollm", "vocab_size": 49_152, "bos": 1, "eos": 2, "chat_template": False},
    "kinds": [
        {"kind": "attn_q", "tensors": 30, "types": {"Q4_1": 30}, "parameters": 9_953_280, "bytes": 6_220_800,
         "bits_per_weight": 5.0},
        {"kind": "ffn_down", "tensors": 30, "types": {"Q4_1": 15, "Q8_0": 15}, "parameters": 26_542_080,
         "bytes": 22_394_880, "bits_per_weight": 6.75},
    ],
    "tensors": [{"name": "token_embd.weight", "shape": [49152, 576], "type": "Q8_0", "bytes": 30_081_024}],
    "memory": {"context": 2048, "weights_bytes": 98_713_600, "kv_cache_bytes": 47_185_920,
               "compute_bytes": 105_906_176, "total_bytes": 251_805_696},
    "traps": [{"kind": "chat_template", "text": "no chat template", "hint": "edgeslm chat needs one"}],
    "verified": None,
}  # fmt: skip
DOCTOR = {
    "schema": "edgeslm.doctor/1",
    "machine": records.machine(),
    "engines": [
        {"name": "llama-cpp-python", "version": "0.3.36", "imports": True, "detail": ""},
        {"name": "torch", "version": "2.13.0", "imports": False, "detail": "illegal instruction"},
        {"name": "onnxruntime", "version": None, "imports": False, "detail": ""},
    ],
    "advice": ["pip install torch==2.13.0"],
}
DEVICES = [
    {
        "name": name,
        "description": "Raspberry Pi 5, 8 GB, with a description that goes on for longer than a row has room",
        "cpu_model": "BCM2712",
        "architecture": "aarch64",
        "cores": 4,
        "frequency_hz": 2_400_000_000,
        "instruction_sets": ["neon", "dotprod"],
        "memory_bytes": 2**33,
        "memory_bandwidth_bytes_per_s": 1e10,
        "prefill_ops_per_s": None,
        "max_power_w": 12.0,
        "sources": {"cpu": "the data sheet", "bandwidth": "published runs"},
    }
    for name in ("rpi5-8gb", "other")
]
TEXTS: dict[str, tuple[Callable[[Mapping[str, Any]], str], dict[str, Any]]] = {
    "build": (console.build_text, records.build()),
    "quantize": (console.quantize_text, records.quantized()),
    "inspect": (console.inspect_text, INSPECTED),
    "quality": (console.quality_text, records.quality()),
    "bench": (console.bench_text, records.bench()),
    "invalid bench": (console.bench_text, records.invalid_bench()),
    "doctor": (console.doctor_text, DOCTOR),
    "devices": (console.devices_text, {"devices": DEVICES}),
    "device": (console.devices_text, {"devices": DEVICES[:1]}),
    "build of a classifier": (console.build_text, learned_records.build()),
    "build of a cut model": (console.build_text, learned_records.language_build()),
    "build of sensors": (
        console.build_text,
        learned_records.build(quality=learned_records.deployed_quality(), data=learned_records.sensor_data()),
    ),
    "classifier": (console.quality_text, learned_records.task_quality()),
    "grades": (
        console.quality_text,
        learned_records.task_quality(classes=learned_records.GRADES, skill=1.5, ordinal=True),
    ),
    "deployed": (console.quality_text, learned_records.deployed_quality()),
    "latency": (console.bench_text, learned_records.bench()),
    "checkpoint": (console.checkpoint_text, learned_records.checkpoint()),
    "paths": (
        console.paths_text,
        {"html": "report/report.html", "markdown": None, "json": "report/report.json"},
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_ascii_within_the_width(name: str) -> None:
    show, record = TEXTS[name]
    text = show(record)
    assert text.isascii()
    assert not text.endswith("\n")
    for line in text.split("\n"):
        assert len(line) <= 100, line
        assert line == line.rstrip()


def test_build_ends_with_what_a_reader_wants() -> None:
    lines = console.build_text(records.build()).split("\n")
    names = [line.split("  ")[0] for line in lines if not line.startswith(" ")]
    assert names == [
        "stages", "bundle", "bits per weight", "measured on", "KL divergence", "perplexity", "prefill", "decode",
        "TTFT", "peak RSS", "warning", "gate", "report",
    ]  # fmt: skip
    text = "\n".join(lines)
    for said in (
        "out/smollm2-iq4_nl, 87.5 MiB", "5.35", "0.0817 [0.0760, 0.0874] nats", "95 % intervals",
        "16.23 [14.91, 17.54], reference 15.00 [13.80, 16.20]", "366 tokens/s (512 tokens, 2 threads)",
        "89.0 tokens/s (128 tokens, 2 threads)", "1.40 s", "159 MiB", "MISSED",
        "mean KL divergence 0.0817 nats is 0.0317 nats over max_kl_nats = 0.0500 nats", "calibrate skipped",
    ):  # fmt: skip
        assert said in text
    assert lines[-1].split() == ["report", "out/smollm2-iq4_nl/report.html"]


def test_build_gate_passed_or_absent() -> None:
    assert "gate             passed" in console.build_text(records.build(gate={"passed": True, "misses": []}))
    assert "gate             no bounds set" in console.build_text(records.build(gate=None))


def test_build_marks_speed_that_is_not_valid() -> None:
    text = console.build_text(records.build(bench=records.invalid_bench()))
    assert f"41.2 tokens/s (128 tokens, 2 threads) INVALID: {records.NOISY[:20]}" in text


def test_build_without_measurements() -> None:
    text = console.build_text(records.build(quality=None, bench=None))
    assert "quality          not measured" in text
    assert "decode           n/a" in text


def test_build_of_a_classifier_says_what_a_reader_wants() -> None:
    text = console.build_text(learned_records.build())
    for said in (
        "5,290 examples (3,643 ham, 1,647 spam), 1,204,113 tokens", "8,112 emails, 930 addresses, 411 phones",
        "12 held-out examples are among the training examples too", "900 held-out examples, 95 % intervals",
        "2.44 ms p50, 3.41 ms p99 (batch of 1, 256 tokens, 2 threads)",
        "590 examples/s (batch of 32, 256 tokens, 2 threads)", "240 steps, 3.00 epochs, stopped early",
        "under min_accuracy = 99.9 %",
    ):  # fmt: skip
        assert said in " ".join(text.split())
    assert "prefill" not in text
    assert "KL divergence" not in text


def test_build_of_a_cut_model_tells_each_stage_in_order() -> None:
    text = " ".join(console.build_text(learned_records.language_build()).split())
    told = [
        "220 examples, 71 documents, 112,640 tokens, 87 % of them counted", "tokens of the vocabulary 49,152",
        "layers 30 -> 24; MLP width 1,536 -> 1,280", "fine-tuning 240 steps", "distilling 110 steps",
        "perplexity 15.03 -> 9.910", "KL divergence",
    ]  # fmt: skip
    places = [text.index(said) for said in told]
    assert places == sorted(places)


def test_a_classifier_s_quality_names_rates_and_thresholds() -> None:
    text = console.quality_text(learned_records.deployed_quality())
    assert "announced 33.0 s before failure against 10.3 s" in " ".join(text.split())
    assert "failure 1.0 %, normal 99.0 % (in training 20.0 %, 80.0 %)" in text
    assert "failure from a probability of 4.8 % on" in text
    grades = console.quality_text(learned_records.task_quality(classes=learned_records.GRADES, ordinal=True))
    assert "quadratic weighted kappa" in grades
    assert "4 very good" in grades


def test_quantize_says_fallbacks_aloud() -> None:
    text = console.quantize_text(records.quantized())
    assert "180 of 272 tensors fell back" in text
    assert "165 tensors: rows of 576 are not divisible by 256, the block of Q4_K -> Q5_0, 5.50 bits" in text
    assert "the source is quantized already" in text
    assert "importance       none" in text


def test_bench_says_invalid_and_why() -> None:
    text = console.bench_text(records.invalid_bench())
    assert "INVALID: do not quote these numbers" in text
    assert records.NOISY in text
    assert "INVALID" not in console.bench_text(records.bench())


def test_a_build_marks_the_first_token_of_a_spoiled_prefill() -> None:
    slow = records.prefill(231.0, valid=False, reasons=[records.NOISY])
    text = console.build_text(records.build(bench=records.bench(runs=[slow, records.decode(89)])))
    assert re.search(r"^TTFT .* INVALID: see prefill$", text, re.M)


def test_table_columns_line_up() -> None:
    text = console.bench_text(records.bench(runs=[records.decode(89), records.decode(123.4, tokens=1024)]))
    header, _, one, two = text.split("\n\n")[1].split("\n")
    for column in ("threads", "tokens/s", "spread", "reached"):
        end = header.index(column) + len(column)
        assert one[end - 1] != " "
        assert two[end - 1] != " "
        assert [row[end : end + 1] for row in (one, two)] in (["", ""], [" ", " "])


def test_inspect_kinds_tensors_and_traps_last() -> None:
    text = console.inspect_text(INSPECTED)
    assert "Q4_1 x 15, Q8_0 x 15" in text
    assert "9 heads, 3 KV heads" in text
    assert text.endswith("traps\n  - no chat template (try: edgeslm chat needs one)")
    listed = console.inspect_text(INSPECTED, tensors=True)
    assert "token_embd.weight  49152 x 576  Q8_0" in listed
    assert console.inspect_text(INSPECTED | {"traps": []}).endswith("traps: none found")
    assert "all files match" in console.inspect_text(INSPECTED | {"verified": True})


def test_doctor_marks_read_without_colour() -> None:
    lines = console.doctor_text(DOCTOR).split("\n")
    assert "[ok]  llama-cpp-python  0.3.36" in lines
    assert any(line.startswith("[!!]  torch") and line.endswith("illegal instruction") for line in lines)
    assert "[--]  onnxruntime       not installed" in lines


def test_device_names_its_sources() -> None:
    text = console.devices_text({"devices": DEVICES[:1]})
    assert "source: the data sheet" in text
    assert "prefill    n/a" in text


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    name = "evil\x1b[2J\x07\r\nname"
    text = console.inspect_text(
        INSPECTED | {"name": name, "traps": [{"kind": "x", "text": name, "hint": name}]}
    )
    quality = records.quality()
    quality["artifact"]["name"] = name
    for shown in (
        text,
        console.quality_text(quality),
        console.quantize_text(records.quantized() | {"path": name}),
    ):
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "\r" not in shown


DRAWN_ELSEWHERE = ("quantize", "inspect", "doctor", "devices", "device", "paths")


@given(st.data())
def test_any_measured_value_may_be_null(data: st.DataObject) -> None:
    """Whatever could not be read is left out or n/a, never an exception and never 'None'."""
    name = data.draw(st.sampled_from([name for name in TEXTS if name not in DRAWN_ELSEWHERE]))
    show, record = TEXTS[name]
    record = copy.deepcopy(record)
    for _ in range(data.draw(st.integers(1, 6))):
        where: Any = record
        while isinstance(where, dict) and where:
            key = data.draw(st.sampled_from(sorted(where)))
            if not isinstance(where[key], dict) or data.draw(st.booleans()):
                if key not in ("bundle", "stages", "kind", "passed", "path"):
                    where[key] = None
                break
            where = where[key]
    assert "None" not in show(record)
