"""Minutes of requests: its own description as the source of hostile ones, and memory that stays flat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("llama_cpp")

from tests.runtime.live import ask, process

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def test_memory_is_flat_over_2000_requests(tiny_gguf: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    with process(tiny_gguf, "-c", "256") as (server, port), ThreadPoolExecutor(4) as pool:

        def one(number: int) -> int:
            if number % 7 == 0:
                texts = ["x" * (1 + number % 200), f"text {number}"]
                return ask(port, "/v1/embeddings", {"input": texts})[0]
            body: dict[str, object] = {
                "messages": [{"role": "user", "content": f"question {number} " + "x" * (number % 80)}],
                "max_tokens": 8, "logprobs": True, "top_logprobs": 3, "stream": number % 3 == 0,
            }  # fmt: skip
            if number % 5 == 0:
                form = {"name": "n", "schema": schema | {"description": f"{number}"}}
                body["response_format"] = {"type": "json_schema", "json_schema": form}
            return ask(port, "/v1/chat/completions", body)[0]

        def resident() -> int:
            return int(psutil.Process(server.pid).memory_info().rss)

        assert set(pool.map(one, range(600))) == {200}
        before = resident()
        assert set(pool.map(one, range(600, 2000))) == {200}
        assert resident() - before < 3 * 2**20, (before, resident())


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_requests_out_of_its_own_description(tiny_gguf: Path, tmp_path: Path) -> None:
    """More than a thousand requests, right and wrong; no 5xx but the 501 of what the model can't do."""
    with process(tiny_gguf, "-c", "128") as (server, port):
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json", "--checks",
            "status_code_conformance,content_type_conformance,response_schema_conformance", "--max-examples", "250",
            "--phases", "coverage,fuzzing", "--continue-on-failure", "--seed", "1", "--generation-database", "none",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=1500, check=False, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.poll() is None
        assert ask(port, "/healthz")[0] == 200
        text = ask(port, "/metrics")[1]
    counted = [
        line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("edgeslm_requests_total{")
    ]
    statuses = {json.loads(line.split("status=")[1].rstrip("}")): int(count) for line, count in counted}
    assert sum(int(count) for _, count in counted) >= 1000
    assert not {status for status in statuses if status.startswith("5")} - {"501"}, statuses
