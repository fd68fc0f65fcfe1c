"""The demo's recipe on the real model: killed, resumed, verified, skipped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.workstation]

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.toml"


def build(out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "edgeslm", "build", str(RECIPE), "--out", str(out), "--json"],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_the_quickstart_survives_a_kill_and_keeps_its_promises(smollm2_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeslm", "build", str(RECIPE), "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("bundle.work/calibrate-*/stage.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not out.exists()

    record = build(out)
    assert [(stage["name"], stage["skipped"]) for stage in record["stages"]] == [
        ("calibrate", True), ("quantize", False), ("evaluate", False), ("bench", False),
    ]  # fmt: skip
    assert record["gate"]["passed"]
    assert record["bits_per_weight"] == pytest.approx(5.35, abs=0.01)
    # The measurement depends on the processor's instructions in the last digits only.
    kl = record["quality"]["kl_nats"]["mean"]
    assert kl["value"] == pytest.approx(0.0853, rel=0.05)
    assert kl["low"] < kl["value"] < kl["high"]
    assert record["bench"]["memory"]["peak_rss_bytes"] < 400e6
    assert (out / "report.html").read_text(encoding="utf-8").count("<svg") > 3
    assert all(stage["skipped"] for stage in build(out)["stages"])
    verify = subprocess.run(
        [sys.executable, "-m", "edgeslm", "inspect", str(out), "--verify", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(verify.stdout)["verified"] is True
    said = subprocess.run(
        [sys.executable, "-m", "edgeslm", "generate", str(out), "The capital of France is", "-n", "8",
         "--temperature", "0", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Paris" in json.loads(said.stdout)["text"]
