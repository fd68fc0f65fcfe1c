"""Memory of this process: against psutil, against what the test itself allocates and maps, and fake systems."""

from __future__ import annotations

import mmap
import struct
import sys
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from edgeslm.bench.memory import MemoryWatch, ProcessMemory, read_memory, reset_peak

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STATUS = """Name:\tpython
VmPeak:\t  900000 kB
VmHWM:\t  300000 kB
VmRSS:\t  200000 kB
RssAnon:\t   50000 kB
RssFile:\t  140000 kB
RssShmem:\t   10000 kB
Threads:\t7
"""


def fake_proc(root: Path, status: str) -> Path:
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "status").write_text(status)
    return root


def test_reads_the_kernels_status_in_bytes(tmp_path: Path) -> None:
    assert read_memory(fake_proc(tmp_path, STATUS), system="linux") == ProcessMemory(
        rss_bytes=200_000 * 1024,
        peak_rss_bytes=300_000 * 1024,
        file_backed_bytes=140_000 * 1024,
        anonymous_bytes=60_000 * 1024,
    )


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_memory(tmp_path / "nowhere", system="linux") == ProcessMemory()
    old = fake_proc(tmp_path, "VmHWM:\t 300 kB\nVmRSS:\t 200 kB\n")  # before Linux 4.5
    assert read_memory(old, system="linux") == ProcessMemory(rss_bytes=204_800, peak_rss_bytes=307_200)


def test_reads_macos_task_info_by_the_kernels_layout() -> None:
    # virtual_size, region_count, page_size, then 64-bit: resident_size, its peak, device, its peak,
    # internal, its peak, external, its peak, reusable ...
    told = struct.pack("<QiiQQQQQQQQQ", 9, 8, 16384, 1000, 2000, 3, 4, 600, 700, 300, 350, 5)
    assert read_memory(system="darwin", task_info=lambda: told) == ProcessMemory(
        rss_bytes=1000, peak_rss_bytes=2000, anonymous_bytes=600, file_backed_bytes=300
    )


def test_macos_without_an_answer_is_none() -> None:
    def refuse() -> bytes:
        raise OSError(5, "task_info")

    assert read_memory(system="darwin", task_info=refuse) == ProcessMemory()
    assert read_memory(system="darwin", task_info=lambda: b"short") == ProcessMemory()


def test_resetting_writes_five_where_permitted(tmp_path: Path) -> None:
    fake_proc(tmp_path, STATUS)
    assert reset_peak(tmp_path)
    assert (tmp_path / "proc/self/clear_refs").read_text() == "5"
    assert not reset_peak(tmp_path / "nowhere")


@linux
def test_agrees_with_psutil_on_this_process() -> None:
    now, theirs = read_memory(), psutil.Process().memory_info()
    assert now.rss_bytes == pytest.approx(theirs.rss, abs=4 * MIB)
    assert now.file_backed_bytes is not None
    assert now.anonymous_bytes is not None
    assert now.file_backed_bytes + now.anonymous_bytes == pytest.approx(theirs.rss, abs=4 * MIB)


@linux
def test_the_peak_is_of_what_came_after_the_watch_was_made() -> None:
    before = np.ones(200 * MIB, np.uint8)
    del before
    watch = MemoryWatch()
    held = np.ones(64 * MIB, np.uint8)
    watch.sample()
    del held
    watch.sample()
    record = watch.as_record()
    rss = read_memory().rss_bytes
    assert rss is not None
    if reset_peak():
        assert record["peak_rss_bytes"] == pytest.approx(rss + 64 * MIB, abs=16 * MIB)
    assert record["anonymous_bytes"] is not None
    assert record["anonymous_bytes"] > 64 * MIB  # of the first sample, the fuller one


@linux
def test_mapped_weights_count_as_file_backed(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(48 * MIB))
    before = read_memory()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # touches every page
        after = read_memory()
    assert before.file_backed_bytes is not None
    assert after.file_backed_bytes is not None
    assert before.anonymous_bytes is not None
    assert after.anonymous_bytes is not None
    assert after.file_backed_bytes - before.file_backed_bytes == pytest.approx(48 * MIB, abs=4 * MIB)
    assert after.anonymous_bytes - before.anonymous_bytes < 8 * MIB


def test_a_watch_keeps_the_highest_peak_and_the_fullest_moment() -> None:
    moments = iter([
        ProcessMemory(rss_bytes=10, peak_rss_bytes=12, file_backed_bytes=4, anonymous_bytes=6),
        ProcessMemory(rss_bytes=30, peak_rss_bytes=33, file_backed_bytes=20, anonymous_bytes=10),
        ProcessMemory(rss_bytes=20, peak_rss_bytes=33, file_backed_bytes=11, anonymous_bytes=9),
    ])  # fmt: skip
    watch = MemoryWatch(read=lambda: next(moments), reset=lambda: True)
    for _ in range(3):
        watch.sample()
    assert watch.as_record() == {"peak_rss_bytes": 33, "file_backed_bytes": 20, "anonymous_bytes": 10}


def test_a_watch_that_can_read_nothing_says_none() -> None:
    watch = MemoryWatch(read=ProcessMemory, reset=lambda: False)
    watch.sample()
    assert watch.as_record() == {"peak_rss_bytes": None, "file_backed_bytes": None, "anonymous_bytes": None}
