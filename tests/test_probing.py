"""edgeslm.probing: what it prints loads as a profile, and its clocks are arguments."""

from __future__ import annotations

import itertools
import json
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from edgeslm import probing
from edgeslm.device import load_device
from edgeslm.device_commands import device
from edgeslm.errors import EngineError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

MACHINE: dict[str, Any] = {
    "architecture": "aarch64", "cpu_model": 'Board "X" (4 x Cortex-A76)', "logical_cores": 4, "usable_cores": 4,
    "instruction_sets": ["neon", "dotprod"], "memory_bytes": 2**33, "memory_available_bytes": 2**32,
    "os": "Debian", "frequency_hz": None, "emulated": False,
}  # fmt: skip
MEASURED = {"read_bytes_per_s": 1e10, "ops_per_s": 5.5e10, "storage_bytes_per_s": None}


def ticks(step: float = 1.0) -> Any:
    counter = itertools.count()
    return lambda: next(counter) * step


def test_text_loads_as_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(probing.profile_text("mine", MACHINE, MEASURED), encoding="utf-8")
    found = load_device(path)
    assert found.name == "mine"
    assert found.cpu_model == MACHINE["cpu_model"]
    assert found.frequency_hz is None
    assert found.instruction_sets == ("neon", "dotprod")
    assert found.memory_system_bytes == 2**33 - 2**32
    assert found.memory_bandwidth_bytes_per_s == pytest.approx(0.8e10)
    assert found.prefill_ops_per_s == 5.5e10
    assert found.storage_bytes_per_s is None, "not measured: left out"
    assert set(found.sources) == {"cpu", "memory", "bandwidth", "prefill"}
    assert all("measured by" in source for source in found.sources.values())


def test_an_emulated_machine_says_so() -> None:
    text = probing.profile_text("mine", MACHINE | {"emulated": True}, MEASURED)
    assert "its timings mean nothing" in tomllib.loads(text)["description"]


def test_matmul_counts_two_operations_for_each_product() -> None:
    rows, inner, columns = probing.MATRIX
    assert probing.matmul_ops_per_s(3.0, ticks()) == 2 * rows * inner * columns
    assert probing.matmul_ops_per_s(3.0, ticks(0.5)) == 4 * rows * inner * columns


def test_storage_is_the_first_reading_unless_the_cache_gave_it(tmp_path: Path) -> None:
    times = iter([0.0, 1.0, 1.0, 1.25])  # 4 MiB in a second, then in a quarter of it
    assert probing.storage_bytes_per_s(tmp_path, 2**22, clock=lambda: next(times)) == 2**22
    times = iter([0.0, 1.0, 1.0, 1.9])
    assert probing.storage_bytes_per_s(tmp_path, 2**22, clock=lambda: next(times)) is None
    assert list(tmp_path.iterdir()) == []
    assert probing.storage_bytes_per_s(tmp_path / "missing") is None


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "STORAGE_BYTES", 2**22)
    record = probing.measure_profile("here", tmp_path, seconds=0.02)
    assert record["schema"] == "edgeslm.device-probe/1"
    assert json.loads(json.dumps(record)) == record
    (tmp_path / "here.toml").write_text(record["profile"], encoding="utf-8")
    assert load_device(tmp_path / "here.toml").memory_bytes == record["machine"]["memory_bytes"]
    with pytest.raises(RecipeError, match="name"):
        probing.measure_profile("Not A Name", tmp_path, seconds=0.01)


def test_other_architectures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "probe", lambda _root: MACHINE | {"architecture": "riscv64"})
    with pytest.raises(EngineError, match="riscv64"):
        probing.measure_profile("mine")


def test_command_prints_toml_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        probing, "measure_profile", lambda name, _: {"profile": probing.profile_text(name, MACHINE, MEASURED)}
    )
    done = CliRunner().invoke(device, ["probe", "--name", "mine", "--directory", str(tmp_path)])
    assert done.exit_code == 0
    assert tomllib.loads(done.stdout)["name"] == "mine"
