"""edgeslm.fleet.remote: what runs on a device, its record brought back, several side by side."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from edgeslm import console_fleet
from edgeslm.cli import cli
from edgeslm.errors import EdgeslmError
from edgeslm.fleet import remote
from edgeslm.fleet.deploy import raise_for_failures
from edgeslm.fleet.ssh import Access, Connection
from tests.fleet.conftest import Far, make_bundle

BENCH = ["-p", "8", "-n", "4", "-r", "1", "-t", "1"]


def flags(access: Access) -> list[str]:
    """The command line of an access."""
    given = [word for option in access.options for word in ("--ssh-option", option)]
    return [*given, "--ssh-batch", *(["--python", access.python] if access.python else [])]


@pytest.fixture
def measured(far: Far, far_python: str, tiny_gguf: Path, tmp_path: Path) -> dict[str, Any]:
    """A tiny model measured in two directories of one host, and one host that is off."""
    pytest.importorskip("llama_cpp")
    targets = [far.target(tmp_path / "one"), far.target(tmp_path / "two")]
    targets[1] = type(targets[1])(host="localhost", directory=str(tmp_path / "two"))
    off = type(targets[0])(host="127.0.0.2")
    access = far.access(python=far_python)
    return remote.bench_on(tiny_gguf, [*targets, off], BENCH, access=access)


def test_several_devices_side_by_side(measured: dict[str, Any], tmp_path: Path) -> None:
    one, two, off = measured["hosts"]
    assert (one["status"], two["status"], off["status"]) == ("deployed", "deployed", "failed"), measured
    assert off["bench"] is None
    for host in (one, two):
        assert host["bench"]["schema"] == "edgeslm.bench/1"
        assert {run["kind"] for run in host["bench"]["runs"]} == {"prefill", "decode"}
        assert host["bench"]["artifact"]["path"].startswith(host["path"])
    labels = [entry["label"] for entry in measured["report"]["results"]]
    assert labels == ["tiny on 127.0.0.1", "tiny on localhost"]

    text = console_fleet.bench_text(measured)
    assert "decode tokens/s" in text
    assert "examples/s" not in text
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["127.0.0.1", "localhost", "127.0.0.2"]
    assert "Connection refused" in text
    with pytest.raises(EdgeslmError, match=r"1 of 3 devices failed: 127\.0\.0\.2"):
        raise_for_failures(measured["hosts"])

    written = remote.write_comparison(measured["records"], tmp_path / "report")
    assert "localhost" in Path(written["markdown"]).read_text()
    again = json.loads(Path(written["json"]).read_text())
    assert [entry["label"] for entry in again["results"]] == labels


def test_bench_on_one_device_writes_its_record(
    far: Far, far_python: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    out = tmp_path / "record.json"
    on = ["--on", f"127.0.0.1:{tmp_path / 'far'}", *flags(far.access(python=far_python))]
    done = CliRunner().invoke(cli, ["bench", str(tiny_gguf), *BENCH, *on, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["schema"] == "edgeslm.fleet-bench/1"
    saved = json.loads(out.read_text())
    assert saved["schema"] == "edgeslm.bench/1"
    assert saved["host"] == "127.0.0.1"
    assert [run["tokens"] for run in saved["runs"]] == [8, 4]


def test_generate_on_a_device(far: Far, far_python: str, tiny_gguf: Path, tmp_path: Path) -> None:
    """The same text as here, through a prompt that a shell would take apart."""
    pytest.importorskip("llama_cpp")
    import subprocess

    words = ["generate", str(tiny_gguf), "--temperature", "0", "-n", "4", "-t", "1"]
    prompt = 'the "$HOME" isn\'t *'
    on = ["--on", f"127.0.0.1:{tmp_path / 'far'}", *flags(far.access(python=far_python))]
    command = [sys.executable, "-m", "edgeslm", *words]
    root = Path(__file__).resolve().parents[2]
    here, there, piped = (
        subprocess.run([*command, *more], input=given, capture_output=True, cwd=root, check=True).stdout
        for more, given in (([prompt], b""), ([*on, prompt], b""), (on, prompt.encode()))
    )
    assert there == here != b""
    assert piped == here


def test_an_error_there_is_told_here(far: Far, far_python: str, tmp_path: Path) -> None:
    """Random bytes are no model: the far edgeslm says so."""
    pytest.importorskip("llama_cpp")
    bundle = make_bundle(tmp_path / "b", size=1000)
    record = remote.bench_on(
        bundle.path, [far.target(tmp_path / "far")], access=far.access(python=far_python)
    )
    host = record["hosts"][0]
    assert host["status"] == "failed"
    assert host["error"].startswith("127.0.0.1: ")
    assert "model.gguf" in host["error"]
    assert record["records"] == []


def test_no_edgeslm_there(far: Far, tmp_path: Path) -> None:
    """The bundle is copied; measuring it needs more."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no site-packages
    python.chmod(0o755)
    bundle = make_bundle(tmp_path / "b")
    record = remote.bench_on(
        bundle.path, [far.target(tmp_path / "far")], access=far.access(python=str(python))
    )
    assert "edgeslm is not installed there" in record["hosts"][0]["error"]
    assert (tmp_path / "far/current").is_symlink()


@pytest.mark.parametrize("line", ["", "not JSON", "{}", '{"schema": "edgeslm.bench/1", "runs": 3}', "[1]"])
def test_what_is_no_record_is_refused(far: Far, line: str) -> None:
    with (
        Connection("127.0.0.1", far.access()) as connection,
        pytest.raises(EdgeslmError, match=r"127\.0\.0\.1: its edgeslm bench gave no record"),
    ):
        remote._measured(connection, ["echo", line])


def test_a_benchmark_ends_with_its_connection(far: Far, tmp_path: Path) -> None:
    """Nothing is left running on the device."""
    marker = tmp_path / "pid"
    with (
        Connection("127.0.0.1", far.access()) as connection,
        connection.talk(
            remote.far_run,
            {"command": ["sh", "-c", f"echo $$ > {marker}.new; mv {marker}.new {marker}; sleep 60"]},
        ),
    ):
        assert within(10, marker.exists)
        pid = int(marker.read_text())
        assert psutil.pid_exists(pid)
    assert within(10, lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def within(seconds: float, true: Any) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_deploy_on_the_command_line(far: Far, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    words = ["deploy", str(bundle.path), f"127.0.0.1:{tmp_path / 'far'}", *flags(far.access())]
    first = CliRunner().invoke(cli, words)
    assert first.exit_code == 0, first.output
    assert "deployed" in first.stdout
    assert f"{tmp_path / 'far'}/current" in first.stdout
    second = CliRunner().invoke(cli, [*words, f"127.0.0.1:{tmp_path / 'more'}", "--json"])
    record = json.loads(second.stdout)
    assert [host["status"] for host in record["hosts"]] == ["already there", "deployed"]
    twice = CliRunner().invoke(cli, [*words, words[2]])
    assert "named twice" in str(twice.exception)
    assert os.path.islink(tmp_path / "far/current")  # noqa: PTH114
