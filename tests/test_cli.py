"""The command line as a user meets it: help, JSON, exit codes, and one clear message for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from edgeslm.cli import cli
from tests.conftest import write_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = (
    "bench",
    "build",
    "chat",
    "classify",
    "deploy",
    "device",
    "devices",
    "distill",
    "doctor",
    "eval",
    "finetune",
    "fit",
    "generate",
    "init",
    "inspect",
    "predict",
    "prune",
    "quantize",
    "report",
    "run",
    "serve",
    "wheelhouse",
)


def edgeslm(
    *arguments: str | Path, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeslm", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, check=False, cwd=cwd, timeout=240,
    )  # fmt: skip


def test_every_command_is_there_with_help_an_example_and_json() -> None:
    assert sorted(cli.commands) == list(COMMANDS)
    for name in COMMANDS:
        done = edgeslm(name, "--help")
        assert done.returncode == 0
        assert "Example:" in done.stdout, name
        assert name == "serve" or "--json" in done.stdout, name


def test_help_fits_a_terminal_and_cuts_no_sentence() -> None:
    text = edgeslm("--help").stdout
    assert "..." not in text.replace("[ARGS]...", "")
    assert max(map(len, text.splitlines())) <= 110


def test_version() -> None:
    assert edgeslm("--version").stdout.startswith("edgeslm, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    environment = {**os.environ, "_EDGESLM_COMPLETE": f"{shell}_source"}
    code = "from edgeslm.cli import cli; cli.main(prog_name='edgeslm')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "_EDGESLM_COMPLETE" in done.stdout or "bash" in done.stderr.lower()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing model": (["quantize", "nowhere", "--out", "x.gguf"], "no model at"),
    "missing artifact": (["bench", "nowhere.gguf"], "nowhere.gguf"),
    "missing recipe": (["build", "nowhere.toml", "--out", "x"], "nowhere.toml"),
    "missing option": (["quantize", "tiny.gguf"], "--out"),
    "unknown command": (["quantise"], "quantise"),
    "unknown scheme": (["quantize", "tiny.gguf", "--scheme", "Q4_KM", "--out", "x.gguf"], "Q4_K_M"),
    "type without equals": (["quantize", "tiny.gguf", "--type", "ffn", "--out", "x.gguf"], "REGEX=TYPE"),
    "pattern of nothing": (
        ["quantize", "tiny.gguf", "--type", "zzz=Q8_0", "--out", "x.gguf"],
        "matches none",
    ),
    "not a number": (["bench", "tiny.gguf", "-t", "two"], "two"),
    "unknown KV type": (["bench", "tiny.gguf", "--kv-type", "q9"], "q9"),
    "unknown device": (["devices", "rpi9"], "rpi9"),
    "not a model": (["inspect", "notes.txt"], "notes.txt"),
    "not a record": (["report", "notes.txt"], "notes.txt"),
    "not text": (["eval", "tiny.gguf", "--text", "nowhere.txt"], "nowhere.txt"),
    "truncated": (["inspect", "cut.gguf"], "cut.gguf"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("user")
    tiny = write_tiny_gguf(folder / "tiny.gguf")
    (folder / "cut.gguf").write_bytes(tiny.read_bytes()[:-5000])
    (folder / "notes.txt").write_text("no model and no record\n")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_message_and_exit_code_2(mistake: str, folder: Path) -> None:
    if "quantize" in MISTAKES[mistake][0]:
        pytest.importorskip("transformers")
    before = sorted(folder.iterdir())
    arguments, said = MISTAKES[mistake]
    done = edgeslm(*arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before


@pytest.mark.workstation
def test_the_way_of_a_user_without_a_recipe(folder: Path) -> None:
    """quantize, inspect, eval, bench, generate, chat and report, each read as JSON."""
    (folder / "held.txt").write_text("the thing and the other thing in the end " * 40)
    done = edgeslm("quantize", "tiny.gguf", "--scheme", "Q8_0", "--out", "bundle", "--json", cwd=folder)
    assert json.loads(done.stdout)["kind"] == "bundle"
    record = json.loads(edgeslm("inspect", "bundle", "--verify", "--json", cwd=folder).stdout)
    assert record["verified"] is True
    options = ("--text", "held.txt", "-c", "64", "-t", "2", "--out", "eval.json", "--json")
    record = json.loads(edgeslm("eval", "bundle", "--reference", "tiny.gguf", *options, cwd=folder).stdout)
    assert 0 < record["kl_nats"]["mean"]["value"] < 0.01
    assert json.loads((folder / "eval.json").read_text()) == record
    sizes = ("-p", "32", "-n", "8", "-t", "1", "-r", "2", "--out", "bench.json", "--json")
    record = json.loads(edgeslm("bench", "bundle", *sizes, cwd=folder).stdout)
    assert [run["kind"] for run in record["runs"]] == ["prefill", "decode"]
    done = edgeslm("generate", "bundle", "the ", "--temperature", "0", "-n", "4", "--json", cwd=folder)
    assert json.loads(done.stdout)["finish_reason"] in ("stop", "length")
    done = edgeslm("chat", "bundle", "--temperature", "0", "-n", "4", cwd=folder, stdin="the end")
    assert done.returncode == 0, done.stderr
    for name in ("run", "chat"):
        again = edgeslm(name, "bundle", "the end", "--temperature", "0", "-n", "4", cwd=folder)
        assert again.stdout == done.stdout
    assert "there is no message" in edgeslm("run", "bundle", " ", cwd=folder).stderr
    done = edgeslm("report", "bundle", "eval.json", "bench.json", "--out", "compared", "--json", cwd=folder)
    assert "<svg" in (folder / json.loads(done.stdout)["html"]).read_text()


@pytest.mark.workstation
def test_a_missed_gate_exits_with_1_and_keeps_the_bundle(folder: Path) -> None:
    (folder / "text.txt").write_text("the thing and the other thing in the end " * 60)
    (folder / "gate.toml").write_text(
        'name = "g"\ntask = "causal-lm"\nmodel = "tiny.gguf"\ndevice = "x86-64-laptop"\n'
        '[data]\ncalibration = "text.txt"\nheldout = "text.txt"\n[calibrate]\ntokens = 256\ncontext = 64\n'
        '[quantize]\nscheme = "Q8_0"\n[evaluate]\ncontext = 64\n[gate]\nmax_file_bytes = 1000\n'
        "[bench]\nprompt_tokens = 16\ndecode_tokens = 4\nrepetitions = 1\n"
    )
    done = edgeslm("build", "gate.toml", "--out", "gated", cwd=folder)
    assert done.returncode == 1, done.stderr
    assert "max_file_bytes" in done.stdout + done.stderr
    assert edgeslm("inspect", "gated", "--verify", cwd=folder).returncode == 0
