"""The workflows of .github: valid, bounded, and about commands that are there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RETIRED = {"macos-12", "macos-13", "macos-14", "ubuntu-20.04"}
"""Images of runners that are no more: a job for one waits for ever."""


def load(path: Path) -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def commands(workflow: dict[Any, Any]) -> list[list[str]]:
    """The words of every command that a workflow runs."""
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [shlex.split(line) for step in steps for line in step.get("run", "").splitlines() if line.strip()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_workflow_is_bounded(path: Path) -> None:
    """What it may do, how long, and which code of others it runs."""
    workflow = load(path)
    assert workflow[True], "when it runs; YAML reads `on` as a truth value"
    assert workflow["permissions"] == {"contents": "read"}
    assert "github.ref" in workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", one) for one in used), used
        images = job.get("strategy", {}).get("matrix", {}).get("os", [job["runs-on"]])
        assert not RETIRED & set(images)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_exists(path: Path) -> None:
    found = commands(load(path))
    assert found
    for program, *arguments in found:
        if program != "make":
            assert (ROOT / program).stat().st_mode & 0o100, program
            continue
        if which("make") is None:
            pytest.skip("make is not installed")
        command = ["make", "--dry-run", "--no-print-directory", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert arguments
        assert done.returncode == 0, done.stderr


def test_the_device_half_is_tested_where_devices_are() -> None:
    workflow = load(ROOT / ".github" / "workflows" / "device-half.yml")
    (job,) = workflow["jobs"].values()
    images = job["strategy"]["matrix"]["os"]
    assert sum(image.startswith("macos-") for image in images) == 2
    assert {"ubuntu-24.04-arm", "ubuntu-latest"} <= set(images)
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"], "3.10 and 3.1 are numbers without quotes"
    assert commands(workflow) == [["make", "test-device"]]
    assert commands(load(ROOT / ".github" / "workflows" / "full.yml")) == [[".ci/run"]]


def test_flags_of_workflows_reach_pip_and_cmake() -> None:
    """They are variables of the environment there, and the Makefile's."""
    if which("make") is None:
        pytest.skip("make is not installed")
    for path in WORKFLOWS:
        for job in load(path)["jobs"].values():
            flags = {name: value for name, value in job["env"].items() if name.endswith("_FLAGS")}
            assert flags
            command = ["make", "--dry-run", "--always-make", "--no-print-directory", "test-device"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True,
                                  env={"PATH": "/usr/local/bin:/usr/bin:/bin", **flags})  # fmt: skip
            assert all(value in done.stdout for value in flags.values())
