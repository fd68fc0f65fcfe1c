"""What this machine has, which engines import here, and what to install for what doesn't.

An engine's wheel can die of an instruction that the processor lacks, and takes the process with it:
so each import is tried in a process of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from edgeslm.device import probe
from edgeslm.versions import TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Attempt = Callable[[str], "Outcome"]

INSTALL = {
    "onnx": "pip install 'edgeslm[onnx]'",
    "gguf": "pip install 'edgeslm[gguf]'  "
    "(compiles llama.cpp for some minutes; on Debian first: sudo apt install g++ cmake)",
    "workstation": "pip install 'edgeslm[workstation]'  (on Linux torch comes with CUDA, several GB; "
    "install its CPU build first if you have no use for that)",
}
"""Extra of the package to the command that adds it to this installation, wherever that came from."""

REBUILD = "pip install --force-reinstall --no-cache-dir --no-binary {name} {name}=={version}"

LIBRARIES = {"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6", "libatomic.so.1": "libatomic1"}
"""Shared library that a wheel may miss to the Debian package that holds it."""

HOT_C = 80.0
"""Raspberry Pi and most laptops begin to throttle here."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A library that edgeslm uses: distribution, module and the extra that brings it."""

    name: str
    module: str
    extra: str
    release: str = ""
    """The beginning of the version that edgeslm needs; "" any."""


PURPOSES = {"gguf": "run GGUF files", "onnx": "run ONNX bundles", "workstation": "make bundles"}
"""Extra to what it is for."""

ENGINES = (
    Engine(name="llama-cpp-python", module="llama_cpp", extra="gguf"),
    Engine(name="onnxruntime", module="onnxruntime", extra="onnx"),
    Engine(name="gguf", module="gguf", extra="workstation"),
    Engine(name="safetensors", module="safetensors", extra="workstation"),
    Engine(name="torch", module="torch", extra="workstation"),
    Engine(name="transformers", module="transformers", extra="workstation", release=TRANSFORMERS),
    Engine(name="peft", module="peft", extra="workstation"),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an import in its own process ended: returncode below 0 is a signal, None the time limit."""

    returncode: int | None
    error: str = ""
    """The last line on standard error."""


def diagnose(
    *,
    machine: Mapping[str, Any] | None = None,
    installed: Callable[[str], str | None] | None = None,
    attempt: Attempt | None = None,
) -> dict[str, Any]:
    """Record edgeslm.doctor/1.  What is found out can be given instead: the machine as device.probe()
    tells it, the version of a distribution (None: missing), and the outcome of importing a module.
    """
    machine = probe() if machine is None else machine
    installed, attempt = installed or _installed, attempt or try_import
    versions = {engine.name: installed(engine.name) for engine in ENGINES}
    present = [engine for engine in ENGINES if versions[engine.name]]
    with ThreadPoolExecutor(machine.get("usable_cores") or 1) as pool:
        outcomes = dict(zip(present, pool.map(attempt, [engine.module for engine in present]), strict=True))
    engines, advice = [], _machine_advice(machine)
    for engine in ENGINES:
        detail, hint = _judge(engine, versions[engine.name], outcomes.get(engine), machine)
        imports = engine in outcomes and outcomes[engine].returncode == 0
        engines.append(
            {"name": engine.name, "version": versions[engine.name], "imports": imports, "detail": detail}
        )
        if hint and hint not in advice:
            advice.append(hint)
    return {"schema": "edgeslm.doctor/1", "machine": dict(machine), "engines": engines, "advice": advice}


def try_import(module: str, timeout_s: float = 120.0) -> Outcome:
    """Import `module` in a process of its own; -P keeps a file of that name in the current folder out."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {module}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(returncode=None, error=f"no answer within {timeout_s:g} s")
    return Outcome(returncode=done.returncode, error=(done.stderr.strip().splitlines() or [""])[-1])


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _judge(
    engine: Engine, found: str | None, outcome: Outcome | None, machine: Mapping[str, Any]
) -> tuple[str, str]:
    """(what is so, what to do about it or "") for one engine."""
    if found is None or outcome is None:
        return "not installed", f"to {PURPOSES[engine.extra]} here: {INSTALL[engine.extra]}"
    if outcome.returncode == 0:
        return _judge_release(engine, found)
    if outcome.returncode is None:
        return outcome.error, f"{engine.name}: {outcome.error}; try again on an idle machine"
    name = _signal_name(outcome.returncode)
    if name is None:
        return outcome.error or "the import failed", _failed_import_hint(engine, found, outcome.error)
    rebuild = f"build it here: {REBUILD.format(name=engine.name, version=found)}"
    if name != "SIGILL":
        return f"killed by {name} while importing", f"{engine.name} dies of {name}; {rebuild}"
    sets = " ".join(machine.get("instruction_sets") or ()) or "none known"
    cpu = f"{machine.get('cpu_model') or 'this processor'} (which has: {sets})"
    why = f"illegal instruction: the wheel was built for a processor with more than {cpu}"
    return why, f"{engine.name} {found} can't run on {cpu}; {rebuild}"


def _judge_release(engine: Engine, found: str) -> tuple[str, str]:
    needed = engine.release.split(".") if engine.release else []
    if found.split(".")[: len(needed)] == needed:
        return "", ""
    return (
        f"edgeslm needs {engine.release}",
        f"{engine.name} {found} is not what edgeslm knows: pip install '{engine.name}=={engine.release}.*'",
    )


def _failed_import_hint(engine: Engine, found: str, error: str) -> str:
    for library, package in LIBRARIES.items():
        if library in error:
            return f"{engine.name} needs {library}; on Debian: sudo apt install {package}"
    return f"{engine.name} doesn't import ({error}): pip install --force-reinstall {engine.name}=={found}"


def _signal_name(returncode: int) -> str | None:
    """The signal of a return code: negative from the system, 128 + number from a shell or an emulator."""
    number = -returncode if returncode < 0 else returncode - 128
    try:
        return signal.Signals(number).name if number > 0 else None
    except ValueError:
        return f"signal {number}" if returncode < 0 else None


def _machine_advice(machine: Mapping[str, Any]) -> list[str]:
    """What would spoil a measurement on this machine as it is now."""
    advice = []
    governor, temperature = machine.get("governor"), machine.get("temperature_c")
    if governor and "powersave" in governor and machine.get("architecture") == "aarch64":
        advice.append(
            f"the frequency governor is {governor}: for full speed, "
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if temperature is not None and temperature >= HOT_C:
        advice.append(
            f"the processor is at {temperature:.0f} C and may throttle: let it cool, or cool it better"
        )
    if machine.get("emulated"):
        advice.append("this system is emulated: its answers are right, its speed means nothing")
    return advice
