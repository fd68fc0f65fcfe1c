"""The benchmark in a process of its own: the record and the errors come back; a death is explained."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bench.child import bench_classifier_in_subprocess, bench_in_subprocess
from edgeslm.errors import BundleError, EngineError, RecipeError
from edgeslm.runtime.runner import RunnerOptions

if TYPE_CHECKING:
    from pathlib import Path


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def test_its_memory_is_not_ours(tiny_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    ballast = np.ones(300 * 2**20, np.uint8)
    notes: Any = Notes()
    record = bench_in_subprocess(
        tiny_gguf, prompt_tokens=(16,), decode_tokens=(4,), threads=(1,), repetitions=2,
        options=RunnerOptions(context=64), progress=notes,
    )  # fmt: skip
    assert notes.texts == [
        "bench: prefill 16 tokens, 1 threads, 2 times",
        "bench: decode 4 tokens, 1 threads, 2 times",
    ]
    assert [run["kind"] for run in record["runs"]] == ["prefill", "decode"]
    assert record["runs"][0]["threads"] == 1
    peak = record["memory"]["peak_rss_bytes"]
    assert peak is None or peak < ballast.nbytes


def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere\.gguf"):
        bench_in_subprocess(tmp_path / "nowhere.gguf")
    with pytest.raises(RecipeError, match="nothing to measure") as caught:
        bench_in_subprocess(tmp_path, prompt_tokens=(), decode_tokens=())
    assert caught.value.hint == "give prompt_tokens or decode_tokens"


def test_what_a_library_prints_is_no_answer() -> None:
    program = (
        'print(\'llama: hello\'); print(\'{"note": "working"}\'); print(\'{"record": {"valid": true}}\')'
    )
    notes: Any = Notes()
    assert bench_in_subprocess("x.gguf", progress=notes, command=python(program)) == {"valid": True}
    assert notes.texts == ["working"]


def test_the_request_holds_every_argument() -> None:
    program = "import sys, json; print(json.dumps({'record': json.load(sys.stdin)}))"
    request = bench_in_subprocess(
        "x.gguf", prompt_tokens=(1, 2), decode_tokens=(3,), threads=(4,), repetitions=6, seed=7,
        options=RunnerOptions(kv_type="q8_0"), command=python(program),
    )  # fmt: skip
    assert request.pop("options")["kv_type"] == "q8_0"
    assert request == {
        "what": "model", "artifact": "x.gguf", "prompt_tokens": [1, 2], "decode_tokens": [3], "threads": [4],
        "repetitions": 6, "seed": 7,
    }  # fmt: skip
    assert json.dumps(request)
    assert bench_classifier_in_subprocess(
        "bundle", batch_sizes=(1, 8), threads=(4,), repetitions=6, seed=7, command=python(program)
    ) == {
        "what": "classifier", "artifact": "bundle", "batch_sizes": [1, 8], "threads": [4], "repetitions": 6, "seed": 7,
    }  # fmt: skip


@pytest.mark.parametrize(("signal", "hint"), [("SIGILL", "edgeslm doctor"), ("SIGKILL", "not enough memory")])
def test_a_killed_engine_is_an_error_with_a_diagnosis(signal: str, hint: str) -> None:
    program = (
        "import os, signal, sys; sys.stderr.write('last words\\n'); sys.stderr.flush(); "
        f"os.kill(os.getpid(), signal.{signal})"
    )
    with pytest.raises(EngineError, match=f"died of {signal} while it was measured: last words") as caught:
        bench_in_subprocess("x.gguf", command=python(program))
    assert hint in caught.value.hint


def test_a_bug_in_the_child_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*ZeroDivisionError"):
        bench_in_subprocess("x.gguf", command=python("1 / 0"))
