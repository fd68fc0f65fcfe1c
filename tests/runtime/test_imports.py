"""What importing the device half loads: no engine, no server, no template language before they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {"llama_cpp", "onnxruntime", "tokenizers"}
SERVERS = {"starlette", "uvicorn", "anyio", "h11"}
CONSOLE = {"click", "rich", "jinja2"}
LIGHT = {
    "edgeslm": {"numpy", "asyncio", *ENGINES, *SERVERS, *CONSOLE, "psutil"},
    "edgeslm.runtime": {"numpy", "asyncio", *ENGINES, *SERVERS, *CONSOLE, "psutil"},
    "edgeslm.runtime.runner": {"numpy", "asyncio", *ENGINES, *SERVERS, *CONSOLE, "psutil"},
    "edgeslm.runtime.llama": {"asyncio", *ENGINES, *SERVERS, *CONSOLE},
    "edgeslm.runtime.ort_lm": {"asyncio", *ENGINES, *SERVERS, *CONSOLE},
    "edgeslm.runtime.answering": {"asyncio", *ENGINES, *SERVERS, *CONSOLE, "psutil"},
    "edgeslm.runtime.server": {*ENGINES, *SERVERS, *CONSOLE, "psutil"},
    "edgeslm.runtime.serving": {*ENGINES, *SERVERS, *CONSOLE},
}
"""Module to the packages that importing it may not load; benchmarks/import_time.py has its seconds."""


@pytest.mark.parametrize("module", LIGHT)
def test_importing_is_light(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "edgeslm" in loaded
    assert not loaded & LIGHT[module]
