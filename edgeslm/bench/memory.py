"""Memory of this process alone, in bytes: what is resident now, the peak, and how much of it is file-backed.

Weights that are mapped from their file are resident but can be dropped and read again: a device that is
short of memory runs slower, not out.  So the peak comes with its file-backed share.  What the system
does not tell is None.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TASK_VM_INFO = 22
"""Flavour of macOS's task_info; xnu, osfmk/mach/task_info.h: struct task_vm_info, packed to 4 bytes."""
_TASK_VM_INFO_LAYOUT = "=QiiQQQQQQQQ"
_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Bytes of one moment, and the peak up to then."""

    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    file_backed_bytes: int | None = None
    """Resident pages of mapped files: weights under mmap, libraries."""
    anonymous_bytes: int | None = None
    """All other resident pages: KV cache, compute buffers, heap, shared memory."""


def read_memory(
    root: Path = _ROOT, *, system: str = sys.platform, task_info: Callable[[], bytes] | None = None
) -> ProcessMemory:
    """Memory of this process.  task_info: gives macOS's task_vm_info as bytes, raising OSError if it can't."""
    if system == "darwin":
        return _mac_memory(task_info or _task_info)
    try:
        status = (root / "proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ProcessMemory()
    fields = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s*(\d+) kB$", status, re.M)}
    anonymous = fields.get("RssAnon")
    return ProcessMemory(
        rss_bytes=fields.get("VmRSS"),
        peak_rss_bytes=fields.get("VmHWM"),
        file_backed_bytes=fields.get("RssFile"),
        anonymous_bytes=None if anonymous is None else anonymous + fields.get("RssShmem", 0),
    )


def reset_peak(root: Path = _ROOT) -> bool:
    """Make the peak start again from what is resident now (Linux, proc(5): clear_refs); False if that can't be.

    Then the peak is that of the process's whole life: measure in a process that does nothing else.
    """
    try:
        (root / "proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class MemoryWatch:
    """The peak since it was made, and what the fullest of the sampled moments consisted of."""

    def __init__(
        self, read: Callable[[], ProcessMemory] = read_memory, reset: Callable[[], bool] = reset_peak
    ) -> None:
        reset()
        self._read = read
        self._fullest = ProcessMemory()
        self._peak: int | None = None

    def sample(self) -> None:
        now = self._read()
        self._peak = max(
            (peak for peak in (self._peak, now.peak_rss_bytes) if peak is not None), default=None
        )
        if (now.rss_bytes or 0) > (self._fullest.rss_bytes or 0):
            self._fullest = now

    def as_record(self) -> dict[str, int | None]:
        return {
            "peak_rss_bytes": self._peak,
            "file_backed_bytes": self._fullest.file_backed_bytes,
            "anonymous_bytes": self._fullest.anonymous_bytes,
        }


def _mac_memory(task_info: Callable[[], bytes]) -> ProcessMemory:
    """Fields of task_vm_info in their order: virtual size, regions, page size, resident size and its peak,
    device, its peak, internal (anonymous), its peak, external (file-backed), its peak."""
    with suppress(OSError, struct.error):
        fields = struct.unpack_from(_TASK_VM_INFO_LAYOUT, task_info())
        return ProcessMemory(
            rss_bytes=fields[3],
            peak_rss_bytes=fields[4],
            anonymous_bytes=fields[7],
            file_backed_bytes=fields[9],
        )
    return ProcessMemory()


def _task_info() -> bytes:
    """This task's task_vm_info from the Mach kernel."""
    library = ctypes.CDLL(None)
    words = ctypes.c_uint32(128)  # room in 32-bit words; the kernel gives the version that fits
    buffer = ctypes.create_string_buffer(4 * words.value)
    task = ctypes.c_uint32.in_dll(library, "mach_task_self_")
    code = library.task_info(task, TASK_VM_INFO, buffer, ctypes.byref(words))
    if code != 0:
        raise OSError(code, "task_info")
    return buffer.raw[: 4 * words.value]
