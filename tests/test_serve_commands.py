"""`edgeslm serve`: its options, its warning, and the unit that it prints."""

from __future__ import annotations

import shlex
import subprocess
from shutil import which
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from edgeslm.cli import cli
from edgeslm.errors import DataError
from edgeslm.runtime.systemd import unit

if TYPE_CHECKING:
    from pathlib import Path


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["serve", *arguments, "--systemd"])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_unit_runs_the_same_command(tiny_gguf: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    text = printed(
        str(tiny_gguf), "--port", "9000", "-fa", "on", "--no-mmap", "-t", "2", "--api-key-file", str(keys)
    )
    [line] = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line.removeprefix("ExecStart="))
    assert words[1:5] == ["-m", "edgeslm", "serve", str(tiny_gguf)]
    assert words[5:] == ["--port", "9000", "--threads", "2", "--flash-attention", "on", "--no-mmap", "--api-key-file",
                         "%d/api-keys"]  # fmt: skip
    assert f"LoadCredential=api-keys:{keys}" in text
    assert "secret" not in text
    assert "IPAddressDeny=any" in text
    assert "IPAddressDeny=any" not in printed(str(tiny_gguf), "--host", "0.0.0.0")


def test_paths_are_quoted_for_systemd(tmp_path: Path) -> None:
    odd = tmp_path / 'a "b" $HOME 100%.gguf'
    text = unit(odd, ["--port", "1"], name="50%\nx", loopback=True, python="/usr/bin/python3")
    assert 'a \\"b\\" $$HOME 100%%.gguf"' in text
    assert "Description=edgeslm: 50%% x" in text
    with pytest.raises(DataError, match="systemd unit"):
        unit(tmp_path / "a\nExecStartPre=x", [], name="x", loopback=True)


@pytest.mark.skipif(which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tiny_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "edgeslm.service"
    file.write_text(printed(str(tiny_gguf)))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
    )
    assert "Unknown" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def test_opening_it_to_all_is_warned_of(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    told: list[str] = []
    monkeypatch.setattr("edgeslm.runtime.serving.run", lambda service, host, port, ready: told.append(host))
    runner = CliRunner()
    opened = runner.invoke(cli, ["serve", str(tiny_gguf), "--host", "0.0.0.0", "-t", "1"])
    closed = runner.invoke(cli, ["serve", str(tiny_gguf), "-t", "1"])
    assert told == ["0.0.0.0", "127.0.0.1"]
    assert "everyone who reaches 0.0.0.0" in opened.output
    assert "warning" not in closed.output


def test_mistakes_in_options(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["serve", "x", "--port", "70000"]).exit_code == 2
    assert runner.invoke(cli, ["serve", "x", "--api-key-file", str(tmp_path / "none")]).exit_code == 2
