"""Device profiles, and what can be read of the machine that this runs on.

Linux is read from /proc and /sys below a root that is an argument; macOS by sysctl through a function
that is one too.  What can't be read is None: never 0, never a guess.
"""

from __future__ import annotations

import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.schema import Key, read_table, read_toml, shipped_folder, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Sysctl = Callable[[str], str | None]

ARM_PARTS = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57", (0x41, 0xD08): "Cortex-A72", (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75", (0x41, 0xD0B): "Cortex-A76", (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77", (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C", (0x41, 0xD4D): "Cortex-A715", (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2", (0x41, 0xD80): "Cortex-A520", (0x41, 0xD81): "Cortex-A720",
    (0x4E, 0x004): "Carmel", (0x61, 0x022): "Apple M1 (Icestorm)", (0x61, 0x023): "Apple M1 (Firestorm)",
    (0xC0, 0xAC3): "Ampere-1",
}  # fmt: skip
"""(implementer, part) of the main ID register to a core name; Linux 6.12 arch/arm64/include/asm/cputype.h."""

INSTRUCTION_SETS = {
    "avx": ("avx",), "avx2": ("avx2",), "f16c": ("f16c",), "fma": ("fma",), "avx512f": ("avx512f",),
    "avx512_vnni": ("avx512_vnni",), "avx512_bf16": ("avx512_bf16",), "avx_vnni": ("avx_vnni",),
    "amx_int8": ("amx_int8",),
    "neon": ("asimd", "neon"), "fp16": ("asimdhp",), "dotprod": ("asimddp",), "i8mm": ("i8mm",),
    "bf16": ("bf16",), "sve": ("sve",), "sve2": ("sve2",),
}  # fmt: skip
"""Our name of an instruction set to Linux's names for it in /proc/cpuinfo (flags on x86, Features on Arm)."""

MAC_INSTRUCTION_SETS = {
    "avx": "hw.optional.avx1_0", "avx2": "hw.optional.avx2_0", "f16c": "hw.optional.f16c",
    "fma": "hw.optional.fma", "avx512f": "hw.optional.avx512f",
    "neon": "hw.optional.AdvSIMD", "fp16": "hw.optional.arm.FEAT_FP16",
    "dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}  # fmt: skip

_SOURCE = Key(kind="string", required=True)

PROFILE = {
    "": {
        "name": Key(kind="string", required=True, pattern=r"[a-z0-9][a-z0-9-]*"),
        "description": Key(kind="string", required=True),
    },
    "cpu": {
        "model": Key(kind="string", required=True),
        "architecture": Key(kind="string", required=True, choices=("x86_64", "aarch64")),
        "cores": Key(kind="integer", required=True, low=1, high=4096),
        "frequency_hz": Key(kind="integer", required=True, low=10**8, high=10**10),
        "instruction_sets": Key(kind="strings", required=True, choices=tuple(INSTRUCTION_SETS)),
        "source": _SOURCE,
    },
    "memory": {"bytes": Key(kind="integer", required=True, low=2**20), "source": _SOURCE},
    "bandwidth": {"bytes_per_s": Key(kind="number", required=True, low=1e6, high=1e13), "source": _SOURCE},
    "prefill": {"ops_per_s": Key(kind="number", required=True, low=1e6, high=1e16), "source": _SOURCE},
    "power": {"max_w": Key(kind="number", required=True, low=0.1, high=10_000), "source": _SOURCE},
}
"""Tables of a profile; [cpu] and [memory] must be there, the others where somebody has measured."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of machine.  sources: where the values are from, for cpu, memory, bandwidth, prefill, power."""

    name: str
    description: str
    cpu_model: str
    architecture: str
    cores: int
    frequency_hz: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float | None
    """Weight bytes read in a second of decoding, all cores."""
    prefill_ops_per_s: float | None
    """Multiplications and additions in a second of prefill, all cores."""
    max_power_w: float | None
    sources: Mapping[str, str]


def load_device(name_or_path: str | Path) -> Device:
    """A profile by its name, or from a .toml file.  Raises RecipeError naming table, key and value."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = shipped_folder("devices") / f"{name_or_path}.toml"
        if str(name_or_path) not in list_devices():
            raise unknown_name(
                f"{str(name_or_path)!r} is no device profile", str(name_or_path), list_devices()
            )
    _, data = read_toml(path)
    for table, value in data.items():
        if isinstance(value, dict) and table not in PROFILE:
            raise unknown_name(f"{path.name}: [{table}] is not a known table", table, [*PROFILE][1:])
    values: dict[str, dict[str, Any]] = {}
    for table, keys in PROFILE.items():
        where = f"{path.name}: [{table}]" if table else f"{path.name}: the top level"
        part = data.get(table) if table else {key: data[key] for key in data if key not in PROFILE}
        if part is not None or table in ("cpu", "memory"):
            values[table] = read_table(part if isinstance(part, dict) else {}, keys, where)
    cpu = values["cpu"]
    return Device(
        **values[""],
        cpu_model=cpu["model"],
        **{key: cpu[key] for key in ("architecture", "cores", "frequency_hz", "instruction_sets")},
        memory_bytes=values["memory"]["bytes"],
        memory_bandwidth_bytes_per_s=values.get("bandwidth", {}).get("bytes_per_s"),
        prefill_ops_per_s=values.get("prefill", {}).get("ops_per_s"),
        max_power_w=values.get("power", {}).get("max_w"),
        sources={table: part["source"] for table, part in values.items() if table},
    )


def list_devices() -> list[str]:
    """The names of the profiles that edgeslm ships."""
    return sorted(path.stem for path in shipped_folder("devices").glob("*.toml"))


def describe_devices(name: str | None = None) -> dict[str, Any]:
    """Record edgeslm.devices/1: one profile, or all of them."""
    names = list_devices() if name is None else [name]
    return {"schema": "edgeslm.devices/1", "devices": [asdict(load_device(each)) for each in names]}


def memory_bandwidth(
    *,
    seconds: float = 0.3,
    threads: int | None = None,
    working_set_bytes: int | None = None,
    root: Path = Path("/"),
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes per second that `threads` threads read together: the best of the passes that fit in `seconds`.

    Each thread takes the maximum of its part of one buffer; numpy releases the GIL for that, and unlike a
    sum of floats it is fast enough to wait for memory.  threads None: the usable cores.
    working_set_bytes None: four times the last-level cache, between 64 and 512 MiB; with the bytes that a
    decode step of a model reads, the result is the ceiling of that model, caches included.  Never more
    than a quarter of the free memory.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    machine = probe(root)
    threads = threads or machine["usable_cores"] or 1
    if working_set_bytes is None:
        working_set_bytes = min(max(4 * (_last_level_cache_bytes(root) or 0), 64 * 2**20), 512 * 2**20)
    free = machine["memory_available_bytes"] or 2**30
    buffer = np.empty(max(threads * 4096, min(working_set_bytes, free // 4)), np.uint8)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.fill(1), parts))  # pages never written are all the same zero page
        end = clock() + seconds
        while best == float("inf") or clock() < end:
            start = clock()
            list(pool.map(np.max, parts))
            best = min(best, max(clock() - start, 1e-9))
    return buffer.nbytes / best


def _last_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Size of the biggest cache of the first core."""
    sizes = [_read(path) or "" for path in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if re.fullmatch(r"\d+K", size)), default=None)


def probe(
    root: Path = Path("/"),
    *,
    system: str | None = None,
    machine: str | None = None,
    sysctl: Sysctl | None = None,
) -> dict[str, Any]:
    """What this machine is and how it is right now; None where that can't be read.

    usable_cores: logical cores that this process may run on, by affinity and control group quota.
    emulated: whether the instructions are translated by software (qemu-user, Rosetta).
    """
    machine = (machine or platform.machine()).lower()
    architecture = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    facts = {"architecture": architecture, "python": platform.python_version()}
    if (system or platform.system()) == "Darwin":
        return facts | _probe_mac(sysctl or _run_sysctl)
    return facts | _probe_linux(root, architecture)


def _probe_linux(root: Path, architecture: str) -> dict[str, Any]:
    cpuinfo = _read(root / "proc/cpuinfo") or ""
    cpus = root / "sys/devices/system/cpu"
    listed = {int(cpu) for cpu in re.findall(r"^processor\s*: (\d+)", cpuinfo, re.M)}
    online = _cpu_list(_read(cpus / "online")) or listed
    affinity = _field(_read(root / "proc/self/status") or "", "Cpus_allowed_list")
    allowed = _cpu_list(affinity) & online or online
    quota = _cpu_quota(root)
    threads_of_a_core = {_read(cpus / f"cpu{cpu}/topology/thread_siblings_list") for cpu in online} - {None}
    governors = {_read(cpus / f"cpu{cpu}/cpufreq/scaling_governor") for cpu in online} - {None}
    total, available = _memory(root)
    load = _read(root / "proc/loadavg")
    return {
        "cpu_model": _cpu_model(root, cpuinfo),
        "physical_cores": len(threads_of_a_core) or None,
        "logical_cores": len(online) or None,
        "usable_cores": min(len(allowed), max(1, int(quota or len(allowed)))) or None,
        "instruction_sets": _instruction_sets(cpuinfo),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "os": (_field(_read(root / "etc/os-release") or "", "PRETTY_NAME") or "").strip('"') or None,
        "kernel": _read(root / "proc/sys/kernel/osrelease"),
        "governor": ", ".join(sorted(map(str, governors))) or None,
        "frequency_hz": _frequency_hz(cpus, online, cpuinfo),
        "temperature_c": _temperature_c(root / "sys/class"),
        "load_average_1m": float(load.split()[0]) if load else None,
        "emulated": _emulated(cpus, cpuinfo, architecture),
    }


def _probe_mac(sysctl: Sysctl) -> dict[str, Any]:
    def number(name: str) -> int | None:
        value = sysctl(name)
        return int(value) if value and value.isdigit() else None

    load = re.search(r"[\d.]+", sysctl("vm.loadavg") or "")
    release = sysctl("kern.osproductversion")
    free = [number(name) for name in ("vm.page_free_count", "hw.pagesize")]
    translated = number("sysctl.proc_translated")
    return {
        "cpu_model": sysctl("machdep.cpu.brand_string"),
        "physical_cores": number("hw.physicalcpu"),
        "logical_cores": number("hw.logicalcpu"),
        "usable_cores": number("hw.logicalcpu"),
        "instruction_sets": [name for name, key in MAC_INSTRUCTION_SETS.items() if number(key)],
        "memory_bytes": number("hw.memsize"),
        "memory_available_bytes": free[0] * free[1] if free[0] and free[1] else None,
        "os": f"macOS {release}" if release else None,
        "kernel": sysctl("kern.osrelease"),
        "governor": None,
        "frequency_hz": number("hw.cpufrequency"),
        "temperature_c": None,
        "load_average_1m": float(load.group()) if load else None,
        "emulated": None if translated is None else bool(translated),
    }


def _run_sysctl(name: str) -> str | None:
    """One value of macOS's sysctl, or None."""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _read(path: Path) -> str | None:
    """A small file's text without the blanks and NULs around it, or None."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip(" \t\n\0") or None
    except OSError:
        return None


def _field(text: str, name: str) -> str | None:
    """The first value of `name: value` or `name=value`."""
    match = re.search(rf"^{name}\s*[:=][ \t]*(.+)$", text, re.M)
    return match.group(1).strip() if match else None


def _cpu_list(text: str | None) -> set[int]:
    """The numbers of a list such as 0-2,5."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", text or "")
    return {cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1)}


def _instruction_sets(cpuinfo: str) -> list[str]:
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    return [name for name, names in INSTRUCTION_SETS.items() if flags & set(names)]


def _cpu_model(root: Path, cpuinfo: str) -> str | None:
    """x86: the model name.  Arm: the board as the device tree calls it, and its cores by part number."""
    if name := _field(cpuinfo, "model name"):
        return name
    makers = re.findall(r"^CPU implementer\s*: (\w+)", cpuinfo, re.M)
    parts = re.findall(r"^CPU part\s*: (\w+)", cpuinfo, re.M)
    names = [
        ARM_PARTS.get((int(maker, 16), int(part, 16)), f"part {part} by implementer {maker}")
        for maker, part in zip(makers, parts, strict=False)
    ]
    cores = " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    board = _read(root / "proc/device-tree/model")
    return f"{board} ({cores})" if board and cores else board or cores or None


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders that limit this process, from its own control group up to the root; versions 1 and 2."""
    groups = re.findall(r"^\d+:(.*?):/(.*)$", _read(root / "proc/self/cgroup") or "", re.M)
    found = []
    for controllers, group in groups:
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # a container may see its own group as the root: the path below is then missing, and only `top` counts
        folders = (top / group, *(top / group).parents)
        found += [folder for folder in folders if folder.is_relative_to(top) and folder.is_dir()]
    return found


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the control groups grant, or None without a limit."""
    quotas = []
    for group in _control_groups(root, "cpu"):
        old = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        match = re.fullmatch(r"(\d+) (\d+)", _read(group / "cpu.max") or old)  # neither "max" nor -1
        if match:
            quotas.append(int(match[1]) / int(match[2]))
    return min(quotas, default=None)


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Total and available bytes, both within the control groups' limits."""
    meminfo = _read(root / "proc/meminfo") or ""
    total, available = (
        int(value.split()[0]) * 1024 if (value := _field(meminfo, name)) else None
        for name in ("MemTotal", "MemAvailable")
    )
    for group in _control_groups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes") or ""
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes") or "0"
        if total and limit.isdigit() and int(limit) < total:
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(group / "memory.stat") or "", re.M)
            left = int(limit) - int(used) + (int(cached[1]) if cached else 0)  # file pages go when needed
            total, available = int(limit), min(left, available or left)
    return total, available


def _frequency_hz(cpus: Path, online: set[int], cpuinfo: str) -> int | None:
    """Mean of the cores' current clocks."""
    clocks = [_read(cpus / f"cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in online]
    hertz = [int(clock) * 1000 for clock in clocks if clock and clock.isdigit()]
    hertz = hertz or [int(float(mhz) * 1e6) for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)", cpuinfo, re.M)]
    return sum(hertz) // len(hertz) if hertz else None


def _temperature_c(classes: Path) -> float | None:
    """The hottest sensor of the processor: thermal zones, else hardware monitors."""
    zones = [(zone / "type", zone / "temp") for zone in classes.glob("thermal/thermal_zone*")]
    monitors = [(each.parent / "name", each) for each in classes.glob("hwmon/hwmon*/temp*_input")]
    for sensors in (zones, monitors):
        readings = [
            int(value) / 1000
            for kind, reading in sensors
            if re.search(r"cpu|pkg|soc|coretemp|k10temp|zenpower", _read(kind) or "")
            and re.fullmatch(r"-?\d+", value := _read(reading) or "")
        ]
        if readings:
            return max(readings)
    return None


def _emulated(cpus: Path, cpuinfo: str, architecture: str) -> bool | None:
    """qemu-user translates instructions and system calls but shows the host's /sys."""
    host = "x86" if "vendor_id" in cpuinfo else None
    if modalias := _read(cpus / "modalias"):
        host = "x86" if "type:x86" in modalias else "arm"
    return None if host is None else host != ("x86" if "86" in architecture else "arm")
