"""What this process may use of the host: cores and memory, within the limits of its container."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def usable_cores(root: Path = Path("/"), allowed: frozenset[int] | None = None) -> int:
    """Physical cores that this process may use: those of its CPU affinity, within the cgroup's quota.

    allowed: the logical CPUs to count; None: those of this process.
    """
    logical = _affinity() if allowed is None else allowed
    cores = _performance_cores() if logical is None else _physical(root, logical)
    quota = _cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process can have at most: the host's, or less in a container that limits it."""
    limits = [int(psutil.virtual_memory().total)]
    for folder in _cgroup_folders(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text is not None and text.isdigit():
                limits.append(int(text))
    return min(limits)


def _affinity() -> frozenset[int] | None:
    """Logical CPUs of this process; None where the system doesn't say (macOS)."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _physical(root: Path, logical: frozenset[int]) -> int:
    """Distinct cores behind `logical`; CPUs whose siblings can't be read count as cores."""
    folder = root / "sys/devices/system/cpu"
    return len({_read(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in logical})


def _performance_cores() -> int:
    """Cores where there is no affinity: the fast ones on Apple silicon, as ggml waits for the slowest."""
    import ctypes
    import ctypes.util

    library = ctypes.util.find_library("c")
    sysctl = getattr(ctypes.CDLL(library), "sysctlbyname", None) if library else None
    if sysctl is not None:
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        if sysctl(b"hw.perflevel0.physicalcpu", ctypes.byref(value), ctypes.byref(size), None, 0) == 0:
            return value.value
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control groups above this process grant; None: no limit."""
    quotas = []
    for folder in _cgroup_folders(root):
        parts = (_read(folder / "cpu.max") or "").split()
        if len(parts) != 2:
            parts = [_read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""]
        if all(part.isdigit() and int(part) > 0 for part in parts):
            quotas.append(int(parts[0]) / int(parts[1]))
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    """Folders with limits of this process: its own control groups (v2 and v1) and all above them."""
    base = root / "sys/fs/cgroup"
    folders = [base, base / "cpu", base / "memory"]
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        tops = [base] if not controllers else [base / name for name in controllers.split(",")]
        inner = Path(path.lstrip("/"))
        folders += [
            top / level for top in tops for level in (inner, *inner.parents) if ".." not in level.parts
        ]
    return folders


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
