"""The doctor: imports tried in processes of their own, and advice that carries the command to type."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edgeslm import doctor
from edgeslm.doctor import ENGINES, INSTALL, Outcome, diagnose, try_import

PI4: dict[str, Any] = {
    "cpu_model": "Raspberry Pi 4 Model B Rev 1.4 (4 x Cortex-A72)", "architecture": "aarch64", "usable_cores": 4,
    "instruction_sets": ["neon"], "governor": "performance", "temperature_c": 50.0, "emulated": False,
}  # fmt: skip


VERSIONS = {engine.name: engine.release or "1.2" for engine in ENGINES}


def examine(outcomes: dict[str, Outcome], machine: dict[str, Any] = PI4) -> dict[str, Any]:
    """A diagnosis of a machine on which just the modules in `outcomes` are installed, in VERSIONS."""
    modules = {engine.name: engine.module for engine in ENGINES}
    return diagnose(
        machine=machine,
        installed=lambda name: VERSIONS[name] if modules[name] in outcomes else None,
        attempt=lambda module: outcomes[module],
    )


def engine(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in record["engines"] if one["name"] == name)


def test_all_is_well() -> None:
    record = examine({one.module: Outcome(returncode=0) for one in ENGINES})
    assert record["schema"] == "edgeslm.doctor/1"
    assert record["machine"] == PI4
    assert [one["name"] for one in record["engines"]] == [one.name for one in ENGINES]
    assert record["engines"] == [
        {"name": name, "version": version, "imports": True, "detail": ""}
        for name, version in VERSIONS.items()
    ]
    assert record["advice"] == []


def test_nothing_is_installed() -> None:
    record = examine({})
    assert all(one["version"] is None and not one["imports"] for one in record["engines"])
    assert {one["detail"] for one in record["engines"]} == {"not installed"}
    assert len(record["advice"]) == 3, "one for each engine that runs models, one for making them"
    for extra, line in zip(("gguf", "onnx", "workstation"), record["advice"], strict=True):
        assert f"pip install 'edgeslm[{extra}]'" in line


def test_another_release_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERSIONS, "transformers", "5.23.0")
    record = examine({one.module: Outcome(returncode=0) for one in ENGINES})
    found = engine(record, "transformers")
    assert (found["imports"], found["detail"]) == (True, "edgeslm needs 4.57")
    assert record["advice"] == [
        "transformers 5.23.0 is not what edgeslm knows: pip install 'transformers==4.57.*'"
    ]


def test_illegal_instruction_names_the_processor_and_the_way_out() -> None:
    record = examine({"llama_cpp": Outcome(returncode=-4), "torch": Outcome(returncode=132)})
    for name in ("llama-cpp-python", "torch"):
        found = engine(record, name)
        assert not found["imports"]
        assert "illegal instruction" in found["detail"]
        assert "Cortex-A72" in found["detail"]
        advice = next(text for text in record["advice"] if text.startswith(name))
        assert "which has: neon" in advice
        assert f"pip install --force-reinstall --no-cache-dir --no-binary {name} {name}==1.2" in advice


def test_other_deaths() -> None:
    record = examine({
        "llama_cpp": Outcome(returncode=-11),
        "gguf": Outcome(returncode=None, error="no answer within 120 s"),
        "torch": Outcome(returncode=1, error="ImportError: libgomp.so.1: cannot open shared object file"),
        "peft": Outcome(returncode=1, error="ImportError: cannot import name 'x'"),
        "safetensors": Outcome(returncode=1),
    })  # fmt: skip
    assert engine(record, "llama-cpp-python")["detail"] == "killed by SIGSEGV while importing"
    assert engine(record, "gguf")["detail"] == "no answer within 120 s"
    assert engine(record, "peft")["detail"] == "ImportError: cannot import name 'x'"
    assert engine(record, "safetensors")["detail"] == "the import failed"
    advice = "\n".join(record["advice"])
    assert "sudo apt install libgomp1" in advice
    assert "pip install --force-reinstall peft==1.2" in advice
    assert "SIGSEGV" in advice


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"governor": "powersave"}, "echo performance"),
        ({"temperature_c": 84.6}, "85 C"),
        ({"emulated": True}, "emulated"),
        ({"instruction_sets": [], "cpu_model": None}, ""),
    ],
)
def test_the_machine_as_it_is_now(change: dict[str, Any], part: str) -> None:
    record = examine({one.module: Outcome(returncode=0) for one in ENGINES}, PI4 | change)
    assert len(record["advice"]) == bool(part)
    assert part in "".join(record["advice"])


def test_signals_by_their_names() -> None:
    assert doctor._signal_name(-4) == "SIGILL"
    assert doctor._signal_name(132) == "SIGILL"
    assert doctor._signal_name(-9) == "SIGKILL"
    assert doctor._signal_name(1) is None
    assert doctor._signal_name(0) is None
    assert doctor._signal_name(-250) == "signal 250"


def test_imports_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: one that works, one that fails, one that dies, one that never ends."""
    (tmp_path / "fails.py").write_text("raise ImportError('no such thing')\n")
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise ImportError('shadowed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    assert try_import("json") == Outcome(returncode=0), "a file of that name in the current folder is not it"
    assert try_import("fails") == Outcome(returncode=1, error="ImportError: no such thing")
    assert try_import("dies").returncode == -4
    assert try_import("hangs", timeout_s=0.5) == Outcome(returncode=None, error="no answer within 0.5 s")
    assert "fails" not in sys.modules


def test_this_machine() -> None:
    """The real look-ups, with an import that costs nothing."""
    record = diagnose(attempt=lambda _module: Outcome(returncode=0))
    assert record["machine"]["logical_cores"] >= 1
    assert {one["name"] for one in record["engines"]} == {one.name for one in ENGINES}


def test_install_commands_name_extras_that_exist() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, command in INSTALL.items():
        assert extra in extras
        assert f"edgeslm[{extra}]" in command
    for one in ENGINES:
        assert any(line.startswith(one.name) for line in extras[one.extra]), one
