"""Cores and memory from fake /proc and /sys trees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from edgeslm.runtime.host import memory_bytes, usable_cores

if TYPE_CHECKING:
    from pathlib import Path


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def siblings(*groups: str) -> dict[str, str]:
    """('0,2', '1,3'): CPUs 0 and 2 share a core, 1 and 3 another."""
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": group
        for group in groups
        for cpu in group.split(",")
    }


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    root = tree(tmp_path, siblings("0,2", "1,3"))
    assert usable_cores(root, frozenset({0, 1, 2, 3})) == 2


def test_affinity_limits(tmp_path: Path) -> None:
    root = tree(tmp_path, siblings("0,2", "1,3"))
    assert usable_cores(root, frozenset({0, 2})) == 1
    assert usable_cores(root, frozenset({0, 3})) == 2


def test_unreadable_topology_counts_every_cpu(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, frozenset(range(6))) == 6


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 4), ("150000 100000", 1), ("200000 100000", 2), ("5000 100000", 1), ("x", 4)],
)
def test_cgroup_2_quota(tmp_path: Path, quota: str, expected: int) -> None:
    root = tree(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    assert usable_cores(root, frozenset(range(4))) == expected


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app.scope",
            "sys/fs/cgroup/user.slice/cpu.max": "200000 100000",
            "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000",
            "sys/fs/cgroup/user.slice/app.scope/memory.max": "1000000",
            "sys/fs/cgroup/user.slice/memory.max": "max",
        },
    )
    assert usable_cores(root, frozenset(range(8))) == 2
    assert memory_bytes(root) == 1_000_000


def test_cgroup_1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "2000000",
        },
    )
    assert usable_cores(root, frozenset(range(8))) == 3
    assert memory_bytes(root) == 2_000_000


def test_no_limit_is_the_whole_machine(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path) == psutil.virtual_memory().total
    root = tree(tmp_path, {"sys/fs/cgroup/memory.max": "9223372036854771712"})
    assert memory_bytes(root) == psutil.virtual_memory().total


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= (psutil.cpu_count() or 1)
    assert 0 < memory_bytes() <= psutil.virtual_memory().total
