"""What Linux says of the machine that this runs on, read below a root that is an argument.

/proc and /sys only.  What can't be read is None: never 0, never a guess.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

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


def probe_linux(root: Path, architecture: str) -> dict[str, Any]:
    """The facts of edgeslm.device.probe that are Linux's own."""
    cpuinfo = read_small(root / "proc/cpuinfo") or ""
    cpus = root / "sys/devices/system/cpu"
    listed = {int(cpu) for cpu in re.findall(r"^processor\s*: (\d+)", cpuinfo, re.M)}
    online = _cpu_list(read_small(cpus / "online")) or listed
    affinity = _field(read_small(root / "proc/self/status") or "", "Cpus_allowed_list")
    allowed = _cpu_list(affinity) & online or online
    quota = _cpu_quota(root)
    threads_of_a_core = {read_small(cpus / f"cpu{cpu}/topology/thread_siblings_list") for cpu in online} - {
        None
    }
    governors = {read_small(cpus / f"cpu{cpu}/cpufreq/scaling_governor") for cpu in online} - {None}
    total, available = _memory(root)
    load = read_small(root / "proc/loadavg")
    return {
        "cpu_model": _cpu_model(root, cpuinfo),
        "physical_cores": len(threads_of_a_core) or None,
        "logical_cores": len(online) or None,
        "usable_cores": min(len(allowed), max(1, int(quota or len(allowed)))) or None,
        "instruction_sets": _instruction_sets(cpuinfo),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "os": (_field(read_small(root / "etc/os-release") or "", "PRETTY_NAME") or "").strip('"') or None,
        "kernel": read_small(root / "proc/sys/kernel/osrelease"),
        "governor": ", ".join(sorted(map(str, governors))) or None,
        "frequency_hz": _frequency_hz(cpus, online, cpuinfo),
        "temperature_c": _temperature_c(root / "sys/class"),
        "load_average_1m": float(load.split()[0]) if load else None,
        "emulated": _emulated(cpus, cpuinfo, architecture),
    }


def last_level_cache_bytes(root: Path) -> int | None:
    """Size of the biggest cache of the first core."""
    sizes = [read_small(path) or "" for path in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if re.fullmatch(r"\d+K", size)), default=None)


def read_small(path: Path) -> str | None:
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
    board = read_small(root / "proc/device-tree/model")
    return f"{board} ({cores})" if board and cores else board or cores or None


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders that limit this process, from its own control group up to the root; versions 1 and 2."""
    groups = re.findall(r"^\d+:(.*?):/(.*)$", read_small(root / "proc/self/cgroup") or "", re.M)
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
        old = f"{read_small(group / 'cpu.cfs_quota_us')} {read_small(group / 'cpu.cfs_period_us')}"
        match = re.fullmatch(r"(\d+) (\d+)", read_small(group / "cpu.max") or old)  # neither "max" nor -1
        if match:
            quotas.append(int(match[1]) / int(match[2]))
    return min(quotas, default=None)


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Total and available bytes, both within the control groups' limits."""
    meminfo = read_small(root / "proc/meminfo") or ""
    total, available = (
        int(value.split()[0]) * 1024 if (value := _field(meminfo, name)) else None
        for name in ("MemTotal", "MemAvailable")
    )
    for group in _control_groups(root, "memory"):
        limit = read_small(group / "memory.max") or read_small(group / "memory.limit_in_bytes") or ""
        used = read_small(group / "memory.current") or read_small(group / "memory.usage_in_bytes") or "0"
        if total and limit.isdigit() and int(limit) < total:
            cached = re.search(
                r"^(?:total_)?inactive_file (\d+)", read_small(group / "memory.stat") or "", re.M
            )
            left = int(limit) - int(used) + (int(cached[1]) if cached else 0)  # file pages go when needed
            total, available = int(limit), min(left, available or left)
    return total, available


def _frequency_hz(cpus: Path, online: set[int], cpuinfo: str) -> int | None:
    """Mean of the cores' current clocks."""
    clocks = [read_small(cpus / f"cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in online]
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
            if re.search(r"cpu|pkg|soc|coretemp|k10temp|zenpower", read_small(kind) or "")
            and re.fullmatch(r"-?\d+", value := read_small(reading) or "")
        ]
        if readings:
            return max(readings)
    return None


def _emulated(cpus: Path, cpuinfo: str, architecture: str) -> bool | None:
    """qemu-user translates instructions and system calls but shows the host's /sys."""
    host = "x86" if "vendor_id" in cpuinfo else None
    if modalias := read_small(cpus / "modalias"):
        host = "x86" if "type:x86" in modalias else "arm"
    return None if host is None else host != ("x86" if "86" in architecture else "arm")
