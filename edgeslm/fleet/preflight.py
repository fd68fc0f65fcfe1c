"""What is held against a device before anything is copied: each check with what is so and what to do.

The far side only reports (far_facts.py); it is judged here.  A `fault` stops a deployment, a `warning`
does not.
"""

from __future__ import annotations

import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm import __version__, operators, wording
from edgeslm.device import MAC_INSTRUCTION_SETS, probe
from edgeslm.doctor import LIBRARIES, REBUILD
from edgeslm.errors import EdgeslmError
from edgeslm.fleet import far_facts
from edgeslm.onnx_file import read_onnx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeslm.bundle import Bundle
    from edgeslm.fleet.ssh import Connection

    Facts = Mapping[str, Any]
    Check = dict[str, str]

OLDEST_PYTHON = (3, 11)
LARGEST_SKEW_S = 60.0
"""From about here on, logs and certificates of both sides no longer fit together."""
MARGIN_BYTES = 2**20

RUNTIMES = {
    "gguf": ("llama-cpp-python", "import llama_cpp; llama_cpp.llama_backend_init()"),
    "onnx": ("onnxruntime", "import onnxruntime"),
}
"""Format to the distribution that runs it, and to what is tried in a process of its own."""

MAKE_WHEELS = "make wheels for this processor: edgeslm wheelhouse --for PROFILE --out DIR"

READ = (
    "proc/cpuinfo", "proc/meminfo", "proc/loadavg", "proc/self/status", "proc/sys/kernel/osrelease",
    "proc/device-tree/model", "etc/os-release", "sys/devices/system/cpu/online",
    "sys/devices/system/cpu/modalias", "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "sys/class/thermal/thermal_zone0/type", "sys/class/thermal/thermal_zone0/temp",
)  # fmt: skip
"""Files from which device.probe() tells what a Linux machine is."""
SYSCTLS = (
    "machdep.cpu.brand_string", "hw.physicalcpu", "hw.logicalcpu", "hw.memsize", "hw.pagesize",
    "vm.page_free_count", "vm.loadavg", "kern.osproductversion", "kern.osrelease", "sysctl.proc_translated",
    *MAC_INSTRUCTION_SETS.values(),
)  # fmt: skip


def examine(
    connection: Connection,
    bundle: Bundle,
    directory: str,
    *,
    files: Sequence[Mapping[str, Any]],
    python: str | None = None,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """{machine, python, directory, checks}: the device as device.probe() tells it, the interpreter that has
    edgeslm (None: none), and [{check, result: ok | warning | fault, detail, hint}].

    Raises EdgeslmError when the device can't be reached or has no python3.
    """
    distribution, trial = RUNTIMES[bundle.format]
    request = {
        "interpreters": [python] if python else interpreters(directory),
        "wanted": python is not None,
        "distribution": distribution,
        "trial": trial,
        "directory": directory,
        "files": list(files),
        "read": READ,
        "sysctl": SYSCTLS,
    }
    before = clock()
    with connection.talk(far_facts, request) as talk:
        facts = next(talk.answers(), None)
        if facts is None:
            raise talk.broken()
    return judge(facts, bundle, started_s=before, ended_s=clock())


def interpreters(directory: str) -> list[str]:
    """Where an interpreter with edgeslm may be, likeliest first."""
    folders = (directory, "~/edgeslm", "~/.edgeslm", "~/.local/share/edgeslm", "~")
    inside = [f"{folder}/{name}/bin/python3" for folder in folders for name in ("venv", ".venv")]
    near = [path if path.startswith(("/", "~")) else f"~/{path}" for path in inside]
    return [*dict.fromkeys(near), "~/.local/share/pipx/venvs/edgeslm/bin/python3", "python3"]


def judge(facts: Facts, bundle: Bundle, *, started_s: float, ended_s: float) -> dict[str, Any]:
    """The record of examine() out of what the far side reported between two readings of this clock."""
    machine = machine_of(facts)
    python, place = facts["python"], facts["place"]
    checks = [
        _architecture(facts, machine),
        _python(python),
        _edgeslm(python),
        _runtime(facts, bundle, machine),
        *_instruction_sets(bundle, machine),
        _memory(bundle, machine),
        _disk(place),
        _clock(facts["clock_s"], started_s, ended_s),
    ]
    usable = python is not None and python["edgeslm"]
    return {
        "machine": machine,
        "python": python["path"] if usable else None,
        "directory": place["directory"],
        "checks": checks,
    }


def machine_of(facts: Facts) -> dict[str, Any]:
    """The far machine as device.probe() tells it of this one."""
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as folder:
        root = Path(folder)
        for name in READ:
            text = facts["files"].get(name)
            if isinstance(text, str):
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        machine = probe(
            root, system=facts["system"], machine=facts["machine"], sysctl=dict(facts["sysctl"]).get
        )
    return machine | {"python": facts["python"]["version"] if facts["python"] else None}


def faults(checks: Sequence[Mapping[str, str]]) -> EdgeslmError | None:
    """One error for all checks that stop a deployment."""
    found = [check for check in checks if check["result"] == "fault"]
    if not found:
        return None
    return EdgeslmError("; ".join(check["detail"] for check in found), hint=found[0]["hint"])


def _check(check: str, result: str, detail: str, hint: str = "") -> Check:
    return {"check": check, "result": result, "detail": detail, "hint": hint}


def _architecture(facts: Facts, machine: Facts) -> Check:
    name, bits = machine["architecture"], facts["pointer_bits"]
    if bits != 64:
        return _check(
            "architecture", "fault", f"its Python is a {bits}-bit program on {name}",
            "install the 64-bit edition of its operating system",
        )  # fmt: skip
    if name not in ("aarch64", "x86_64"):
        return _check(
            "architecture", "fault", f"its processor is {name}; the engines run on aarch64 and x86_64",
            "use another device",
        )  # fmt: skip
    emulated = ", emulated: its answers are right, its speed means nothing" if machine["emulated"] else ""
    detail = f"{name}, {machine['cpu_model'] or 'model unknown'}{emulated}"
    return _check("architecture", "warning" if emulated else "ok", detail)


def _python(python: Facts | None) -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if python is None:
        return _check("python", "fault", "no Python runs there", f"install Python {oldest} or newer there")
    version = tuple(int(part) for part in python["version"].split(".")[:2])
    if version < OLDEST_PYTHON:
        return _check(
            "python", "fault", f"{python['path']} is Python {python['version']}; edgeslm needs {oldest}",
            f"install Python {oldest} or newer there, and name it with --python",
        )  # fmt: skip
    return _check("python", "ok", f"{python['version']}, {python['path']}")


def _edgeslm(python: Facts | None) -> Check:
    if python is None or not python["edgeslm"]:
        return _check(
            "edgeslm", "warning", "edgeslm is not installed there",
            "install it there (edgeslm wheelhouse makes what an offline device needs), or name the "
            "interpreter that has it with --python",
        )  # fmt: skip
    version = python["edgeslm_version"]
    if version not in (None, __version__):
        return _check(
            "edgeslm",
            "warning",
            f"edgeslm {version} there, {__version__} here",
            "install the same version there",
        )
    return _check("edgeslm", "ok", version or __version__)


def _runtime(facts: Facts, bundle: Bundle, machine: Facts) -> Check:
    """The import of the engine, tried in a process of its own."""
    name, _ = RUNTIMES[bundle.format]
    tried = facts["trial"]
    if tried is None:
        return _check(
            "runtime", "warning", f"{name} is not installed there",
            f"install it there: pip install 'edgeslm[{bundle.format}]', or what edgeslm wheelhouse makes",
        )  # fmt: skip
    version, code, error = facts["python"]["runtime_version"], tried["returncode"], tried["error"]
    sets = set(machine["instruction_sets"])
    lacking = sorted(set(facts["python"].get("runtime_needs", ())) - sets)
    if lacking and "neon" in sets:  # which all of these processors have: the others are known too
        detail = (
            f"{name} {version} was compiled for a processor with {', '.join(lacking)}, and this one has none"
        )
        return _check("runtime", "fault", detail, MAKE_WHEELS)
    if code == 0:
        return _knows_operators(bundle, name, version)
    if code is None:
        return _check("runtime", "fault", f"{name} {version}: {error}", "try again when the device is idle")
    detail, hint = _death(code, f"{name} {version}", error, machine)
    rebuild = REBUILD.format(name=name, version=version)
    return _check("runtime", "fault", detail, hint or f"there: {rebuild}")


def _death(code: int, engine: str, error: str, machine: Facts) -> tuple[str, str]:
    """(what happened, what to do or "": build it again) for an import that ended with `code`."""
    name = signal_name(code)
    if name == "SIGILL":
        sets = " ".join(machine["instruction_sets"]) or "none known"
        why = f"it was built for a processor with more than {machine['cpu_model'] or 'this one'}"
        return (
            f"{engine} dies of an illegal instruction: {why} (which has: {sets})",
            MAKE_WHEELS,
        )
    if name:
        return f"{engine} is killed by {name} while it is imported", ""
    for library, package in LIBRARIES.items():
        if library in error:
            return f"{engine} needs {library}", f"there: sudo apt install {package}"
    return f"{engine} does not import: {error}", ""


def _knows_operators(bundle: Bundle, name: str, version: str) -> Check:
    """An engine that imports, against the operators of an ONNX graph."""
    if bundle.format == "onnx":
        try:
            operators.check(read_onnx(bundle.weights), version)
        except EdgeslmError as error:
            return _check("runtime", "fault", error.message, error.hint)
    return _check("runtime", "ok", f"{name} {version}")


def signal_name(code: int) -> str | None:
    """The signal of an exit status: negative from the system, 128 + number from a shell or an emulator."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name if number > 0 else None
    except ValueError:
        return f"signal {number}" if code < 0 else None


def _instruction_sets(bundle: Bundle, machine: Facts) -> list[Check]:
    """What the artifact was made for against what the processor has: slow, not wrong."""
    plan = (bundle.manifest or {}).get("quantization") or {}
    sets = set(machine["instruction_sets"])
    arm = machine["architecture"] == "aarch64"
    target = (plan.get("onnx") or {}).get("target")
    wanted = {"avx2": {"avx2"}, "avx512-vnni": {"avx512_vnni"}, "arm64": {"neon"}}.get(target or "", set())
    if wanted - sets:
        detail = f"the bundle was made for {target}, which this processor has not"
        return [_check("instruction sets", "warning", detail, "build it for this device: it will be slow")]
    codebook = sorted(name for name in plan.get("types") or {} if str(name).upper().startswith("IQ"))
    if arm and codebook and "dotprod" not in sets:
        detail = f"{', '.join(codebook)} run at about half speed without dotprod"
        return [_check("instruction sets", "warning", detail, "use Q4_0 or another plain type")]
    return [_check("instruction sets", "ok", " ".join(machine["instruction_sets"]) or "unknown")]


def _memory(bundle: Bundle, machine: Facts) -> Check:
    """The weights alone; edgeslm fit adds the KV cache and the buffers."""
    need, total, free = bundle.weights_bytes, machine["memory_bytes"], machine["memory_available_bytes"]
    said = f"{wording.size(need)} of weights, {wording.size(free)} free of {wording.size(total)}"
    if total is not None and need >= total:
        return _check("memory", "fault", said, "use a smaller model or fewer bits")
    if free is not None and need >= free:
        return _check("memory", "warning", said, "end other programs there, or use a smaller model")
    return _check("memory", "ok", said)


def _disk(place: Facts) -> Check:
    need, free = place["missing_bytes"], place["free_bytes"]
    if not place["writable"]:
        return _check(
            "disk", "fault", f"{place['exists']} can't be written to", "name another directory, as HOST:DIR"
        )
    said = f"{wording.size(need)} to come, {wording.size(free)} free"
    if need and need + MARGIN_BYTES > free:
        return _check(
            "disk", "warning", said, "free some space there, or name a directory on another disk, as HOST:DIR"
        )
    return _check("disk", "ok", said)


def _clock(far_s: float, started_s: float, ended_s: float) -> Check:
    """Its clock was read at some moment between two readings of this one."""
    off_s = max(started_s - far_s, far_s - ended_s, 0.0)
    if off_s <= LARGEST_SKEW_S:
        return _check("clock", "ok", "agrees with this one" if off_s < 1 else f"{off_s:.0f} s off")
    way = "behind" if far_s < started_s else "ahead of"
    return _check(
        "clock", "warning", f"its clock is {wording.duration(off_s)} {way} this one",
        "set it: sudo timedatectl set-ntp true",
    )  # fmt: skip
