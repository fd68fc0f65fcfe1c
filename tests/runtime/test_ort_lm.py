"""The ONNX runner against what its models compute by hand: in pieces, from kept beginnings, and beyond bounds."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bench.measure import bench_artifact
from edgeslm.bench.quality import measure_quality
from edgeslm.bench.weights import onnx_decode_bytes
from edgeslm.bundle import open_bundle, write_bundle
from edgeslm.errors import BundleError, EngineError, ModelError, RecipeError
from edgeslm.onnx_file import OnnxNode, read_onnx
from edgeslm.runtime import ort_session
from edgeslm.runtime.chat import Streams, chat_session, generate_once
from edgeslm.runtime.ort_lm import ALL_LOGITS_UBATCH, OrtRunner
from edgeslm.runtime.runner import RunnerOptions, open_runner
from tests.onnx_decoders import (
    CONTEXT,
    GRAPHS,
    D,
    E,
    H,
    V,
    expected_logits,
    manifest,
    shared_graph,
    write_decoder,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytest.importorskip("onnxruntime")

TOKENS = np.random.default_rng(3).integers(3, V, 40).tolist()
VARIANTS = {
    **{kind: (kind, None) for kind in GRAPHS},
    "all logits": ("shared", shared_graph(first_logit=False)),
}


def options(**changes: Any) -> RunnerOptions:
    return RunnerOptions(**({"threads": 1, "context": CONTEXT} | changes))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., OrtRunner]]:
    """Runners of a variant, closed at the end; `model` changes the manifest's model."""
    runners: list[OrtRunner] = []

    def make(variant: str = "shared", model: dict[str, Any] | None = None, **changes: Any) -> OrtRunner:
        kind, data = VARIANTS[variant]
        bundle = write_decoder(tmp_path / f"bundle-{len(runners)}", kind, data=data, **(model or {}))
        runner = open_runner(bundle, options(**changes))
        assert isinstance(runner, OrtRunner)
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.close()


def close_to(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ubatch", [1, 7, 512])
def test_logits_are_those_of_the_whole_sequence(
    variant: str, ubatch: int, make: Callable[..., OrtRunner]
) -> None:
    runner, wanted = make(variant, ubatch=ubatch), expected_logits(VARIANTS[variant][0], TOKENS)
    for first in (0, 1, 6, 7, 13, 39, 40):
        got = runner.logits(TOKENS, first)
        assert got.shape == (len(TOKENS) - first, V)
        assert got.dtype == np.float32
        close_to(got, wanted[first:]) if len(got) else None
        assert runner.position == 0
    with pytest.raises(ValueError, match="first=41"):
        runner.logits(TOKENS, 41)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ubatch", [3, 512])
def test_prefill_and_steps_continue_each_other(
    variant: str, ubatch: int, make: Callable[..., OrtRunner]
) -> None:
    runner, wanted = make(variant, ubatch=ubatch), expected_logits(VARIANTS[variant][0], TOKENS)
    runner.prefill(TOKENS[:10])
    close_to(runner.last_logits(), wanted[9])
    for place in (10, 11):
        runner.step(TOKENS[place])
        close_to(runner.last_logits(), wanted[place])
    runner.prefill(TOKENS[12:13])
    close_to(runner.last_logits(), wanted[12])
    runner.prefill(TOKENS[13:30])
    runner.synchronize()
    close_to(runner.last_logits(), wanted[29])
    assert runner.position == 30
    runner.step(TOKENS[30])
    close_to(runner.last_logits(), wanted[30])
    runner.prefill([])
    assert runner.position == 31


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_kept_beginning_is_as_good_as_computed(variant: str, make: Callable[..., OrtRunner]) -> None:
    runner, kind = make(variant), VARIANTS[variant][0]
    runner.prefill(TOKENS[:20])
    runner.reset(8)
    assert runner.position == 8
    other = [*TOKENS[:8], *TOKENS[30:36]]
    runner.prefill(other[8:])
    close_to(runner.last_logits(), expected_logits(kind, other)[-1])
    runner.reset(99)
    assert runner.position == len(other)
    runner.reset()
    with pytest.raises(EngineError, match="before the first token"):
        runner.last_logits()
    runner.step(TOKENS[5])
    close_to(runner.last_logits(), expected_logits(kind, TOKENS[5:6])[-1])


def test_a_step_takes_no_new_memory(make: Callable[..., OrtRunner]) -> None:
    runner = make()
    runner.step(TOKENS[0])
    row = runner.last_logits()
    runner.step(TOKENS[1])
    assert runner.last_logits().ctypes.data == row.ctypes.data
    assert np.shares_memory(runner.last_logits(), row)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_context_is_bounded(variant: str, make: Callable[..., OrtRunner]) -> None:
    runner = make(variant, context=16)
    wanted = expected_logits(VARIANTS[variant][0], TOKENS)
    with pytest.raises(EngineError, match=r"0 of 16 tokens taken, 17 more"):
        runner.prefill(TOKENS[:17])
    with pytest.raises(EngineError, match="17 more"):
        runner.logits(TOKENS[:17])
    runner.prefill(TOKENS[:16])
    close_to(runner.last_logits(), wanted[15])
    with pytest.raises(EngineError, match="the context is full"):
        runner.step(1)
    assert runner.position == 16


@pytest.mark.parametrize("token", [-1, V, 2**40])
def test_tokens_outside_of_the_vocabulary(token: int, make: Callable[..., OrtRunner]) -> None:
    runner = make()
    for call in (
        lambda: runner.step(token), lambda: runner.prefill([1, token]), lambda: runner.logits([token]),
        lambda: runner.token_bytes(token),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=f"token {token} is outside the vocabulary of {V}"):
            call()
    assert runner.position == 0


@pytest.mark.parametrize("variant", ["shared", "handed"])
def test_a_failed_run_leaves_the_state(
    variant: str, make: Callable[..., OrtRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make(variant)
    runner.prefill(TOKENS[:4])
    session = runner._session

    class Broken:
        def run_with_iobinding(self, _binding: Any) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 6 : out of memory\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_session", Broken())
        with pytest.raises(
            EngineError, match=r"could not compute: \[ONNXRuntimeError\] : 6 : out of memory$"
        ):
            runner.step(TOKENS[4])
    assert runner.position == 4
    runner._session = session
    runner.step(TOKENS[4])
    close_to(runner.last_logits(), expected_logits(VARIANTS[variant][0], TOKENS[:5])[-1])


def test_options_in_force(make: Callable[..., OrtRunner]) -> None:
    assert make(ubatch=4096, batch=5000).options == RunnerOptions(
        threads=1, context=CONTEXT, batch=CONTEXT, ubatch=CONTEXT, kv_type="f32", provider="cpu"
    )
    assert (
        make("all logits", model={"context_length": 4096}, context=4096).options.ubatch == ALL_LOGITS_UBATCH
    )
    defaults = make(model={"context_length": 9999}, context=None, threads=None).options
    assert defaults.context == 4096
    assert (defaults.threads or 0) >= 1
    noted = make(mlock=True, mmap=False, flash_attention=True, gpu_layers=9)
    assert [note.removeprefix("ONNX Runtime has no choice of ") for note in noted.notes] == [
        "flash attention", "reading instead of mapping the file", "locking weights in memory", "layers on a GPU",
    ]  # fmt: skip
    assert make().notes == ()


def test_options_that_can_not_be(make: Callable[..., OrtRunner]) -> None:
    with pytest.raises(RecipeError, match="is f32, not q8_0"):
        make(kv_type="q8_0")
    assert make(kv_type="f32").options.kv_type == "f32"
    with pytest.raises(RecipeError, match=f"context is 65 tokens, the model has positions for {CONTEXT}"):
        make(context=CONTEXT + 1)
    with pytest.raises(RecipeError, match="threads is 0"):
        make(threads=0)
    with pytest.raises(RecipeError, match="unknown execution provider 'gpu'"):
        make(provider="gpu")


def test_more_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_decoder(tmp_path / "bundle", context_length=2**30)
    monkeypatch.setattr("edgeslm.runtime.ort_lm.memory_bytes", lambda: 2**30)
    with pytest.raises(EngineError, match=r"KV cache of 1073741824 tokens 65,536\.0 MiB"):
        open_runner(bundle, options(context=2**30))


def test_a_provider_that_this_build_lacks_is_said(make: Callable[..., OrtRunner]) -> None:
    import onnxruntime

    assert ort_session.PROVIDERS["nnapi"] not in onnxruntime.get_available_providers()
    runner = make(provider="nnapi")
    assert runner.options.provider == "cpu"
    assert runner.notes == ("this build of ONNX Runtime has no nnapi: the model runs on the CPU",)
    close_to(runner.logits(TOKENS[:4]), expected_logits("shared", TOKENS[:4]))


def test_facts_are_the_manifests(make: Callable[..., OrtRunner]) -> None:
    facts = make(model={"adds_bos": True, "stop_tokens": [0]}).facts
    assert (facts.architecture, facts.vocab_size, facts.context_length) == ("hand", V, CONTEXT)
    assert (facts.bos_token, facts.eos_token, facts.adds_bos) == (1, 2, True)
    assert facts.stop_tokens == {0, 2}
    assert facts.chat_template is not None
    assert "<|im_start|>" in facts.chat_template


def test_text_there_and_back(make: Callable[..., OrtRunner]) -> None:
    runner = make()
    ids = runner.tokenize("Grüße\n<|im_end|>", add_special=True, parse_special=True)
    assert ids[-1] == 2
    assert b"".join(map(runner.token_bytes, ids)).decode() == "Grüße\n"
    assert runner.token_bytes(2, special=True) == b"<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, f"its graph has {V} tokens, its manifest 300"),
        ({"vocab_size": None}, "vocab_size of the model in its manifest is None"),
        ({"context_length": 0}, "context_length of the model in its manifest is 0"),
        ({"parameters": "many"}, "parameters of the model in its manifest is 'many'"),
        ({"stop_tokens": None}, "names 'none' as a token"),
        ({"stop_tokens": [V]}, f"names {V} as a token"),
        ({"eos_token": -1}, "names -1 as a token"),
        ({"bos_token": True}, "names True as a token"),
    ],
)
def test_manifests_that_make_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle", **changes)
    with pytest.raises(BundleError, match=message):
        open_runner(bundle, options())


def test_graphs_that_are_no_language_model(tmp_path: Path) -> None:
    from tests.onnx_models import text_model, write_classifier

    bundle = write_decoder(tmp_path / "scores", data=text_model())
    with pytest.raises(BundleError, match="its graph has 3 tokens, its manifest 259"):
        open_runner(bundle, options())
    bundle = write_decoder(tmp_path / "more", data=shared_graph(extra_input=True))
    with pytest.raises(BundleError, match="token_type_ids is not known"):
        open_runner(bundle, options())
    with pytest.raises(BundleError, match="for text-classification generates no text"):
        open_runner(write_classifier(tmp_path / "classifier"), options())


def test_damaged_files(tmp_path: Path) -> None:
    data = shared_graph()
    bundle = write_decoder(tmp_path / "cut", data=data[: len(data) // 2])
    with pytest.raises(ModelError, match="longer than the file"):
        open_runner(bundle, options())
    unknown = data.replace(b"GroupQueryAttention", b"GroupQueryAttentioX")
    with pytest.raises(EngineError, match="which no ONNX Runtime has by itself"):
        open_runner(write_decoder(tmp_path / "unknown", data=unknown), options())
    bare = write_bundle(tmp_path / "bare", files={"model.onnx": data}, manifest=manifest())
    with pytest.raises(BundleError, match="no usable tokenizer"):
        open_runner(bare, options())


def test_a_missing_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="onnxruntime is not installed") as caught:
        open_runner(bundle, options())
    assert caught.value.hint == "pip install 'edgeslm[onnx]'"


def test_loading_is_timed(tmp_path: Path) -> None:
    ticks = iter([10.0, 12.5])
    runner = OrtRunner(write_decoder(tmp_path / "bundle"), options(), clock=lambda: next(ticks))
    assert runner.load_s == 2.5
    runner.close()


def test_quality_through_the_runner(make: Callable[..., OrtRunner]) -> None:
    """A model against itself: no divergence; perplexity by hand."""
    text = "It was the best of times, it was the worst of times." * 3
    runner, other = make(), make("all logits")
    record = measure_quality(runner, other, [text], context=32)
    assert record["kl_nats"]["mean"]["value"] < 1e-6
    assert record["top1_agreement"]["value"] == 1
    tokens = runner.tokenize(text, add_special=True, parse_special=False)
    surprise = []
    for start in range(0, len(tokens) - 31, 32):
        window = tokens[start : start + 32]
        rows = expected_logits("shared", window)[16:31]
        rows -= rows.max(axis=1, keepdims=True)
        surprise.append(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(15), window[17:]])
    assert record["perplexity"]["value"] == pytest.approx(np.exp(np.mean(surprise)), rel=1e-4)


def test_bench_record(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    record = bench_artifact(bundle.path, prompt_tokens=(8,), decode_tokens=(4,), repetitions=2)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    artifact = record["artifact"]
    parameters = 2 * V * E + 2 * E * H * D + 2 * E * D
    assert (artifact["format"], artifact["parameters"]) == ("onnx", parameters)
    assert artifact["bits_per_weight"] == 32
    # The embedding gives one row; the numbers beside the weights are 3 of 8 bytes, and the axis that Gather reads.
    assert artifact["decode_bytes_per_token"] == 4 * (parameters - V * E) + 8 * 4
    assert {run["kv_type"] for run in record["runs"]} == {"f32"}
    assert {run["provider"] for run in record["runs"]} == {"cpu"}


def test_a_tied_table_is_read_whole(tmp_path: Path) -> None:
    """The embedding through a Reshape, and the same bytes as the head."""
    file = read_onnx(write_decoder(tmp_path / "untied").weights)
    untied = onnx_decode_bytes(file)
    head = OnnxNode(operator="ai.onnx:MatMul", inputs=("hidden", "view"), outputs=("logits",), attributes={})
    view = OnnxNode(operator="ai.onnx:Transpose", inputs=("embedding",), outputs=("view",), attributes={})
    tied = dataclasses.replace(file, nodes=(view, *file.nodes, head))
    assert onnx_decode_bytes(tied) == untied + 4 * V * E
    row = OnnxNode(operator="ai.onnx:Gather", inputs=("view", "input_ids"), outputs=("again",), attributes={})
    assert onnx_decode_bytes(dataclasses.replace(file, nodes=(view, *file.nodes, row))) == untied


def test_chat_over_an_onnx_bundle(tmp_path: Path) -> None:
    bundle = write_decoder(tmp_path / "bundle")
    streams = Streams(source=io.StringIO("Hi"), sink=io.StringIO(), notes=io.StringIO())
    chat_session(
        bundle.path, system=None, as_json=False, max_tokens=4, streams=streams, temperature=0.0, mlock=True
    )
    assert "note: ONNX Runtime has no choice of locking weights in memory" in streams.notes.getvalue()
    assert "prompt 21 tokens" in streams.notes.getvalue()
    streams = Streams(source=io.StringIO(), sink=io.StringIO(), notes=io.StringIO())
    generate_once(
        bundle.path, "Once", as_json=True, max_tokens=5, streams=streams, temperature=0.0, threads=1
    )
    record = json.loads(streams.sink.getvalue())
    runner = open_runner(open_bundle(bundle.path), options())
    tokens = runner.tokenize("Once", add_special=True, parse_special=True)
    runner.close()
    generated = []
    while len(generated) < 5 and (
        best := int(expected_logits("shared", tokens + generated)[-1].argmax())
    ) not in (0, 2):
        generated.append(best)
    assert record["tokens"] == len(generated)
