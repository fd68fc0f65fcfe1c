"""Device profiles, and the probe held against fakes of /proc and /sys and of macOS's sysctl."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm import device as module
from edgeslm.device import (
    describe_devices,
    list_devices,
    load_device,
    memory_bandwidth,
    probe,
)
from edgeslm.errors import RecipeError
from edgeslm.linux_host import last_level_cache_bytes

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {
    "cpu_model", "architecture", "physical_cores", "logical_cores", "usable_cores", "instruction_sets",
    "memory_bytes", "memory_available_bytes", "os", "kernel", "python", "governor", "frequency_hz",
    "temperature_c", "load_average_1m", "emulated",
}  # fmt: skip

X86_CORE = """processor\t: {cpu}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Gold 6430
cpu MHz\t\t: 2100.000
flags\t\t: fpu sse2 avx f16c avx2 fma avx512f avx512_vnni avx_vnni amx_int8
"""

PI4_CORE = """processor\t: {cpu}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""

PI5_CORE = """processor\t: {cpu}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""

MAC = {
    "machdep.cpu.brand_string": "Apple M4", "hw.physicalcpu": "10", "hw.logicalcpu": "10",
    "hw.memsize": "17179869184", "vm.page_free_count": "1000", "hw.pagesize": "16384",
    "kern.osproductversion": "15.1", "kern.osrelease": "24.1.0", "vm.loadavg": "{ 1.52 1.40 1.33 }",
    "sysctl.proc_translated": "0", "hw.optional.AdvSIMD": "1", "hw.optional.arm.FEAT_DotProd": "1",
    "hw.optional.arm.FEAT_I8MM": "1", "hw.optional.arm.FEAT_FP16": "1", "hw.optional.arm.FEAT_BF16": "0",
}  # fmt: skip


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cores(text: str, count: int, siblings: dict[int, str] | None = None) -> dict[str, str]:
    """cpuinfo and topology of `count` logical cores."""
    files = {
        "proc/cpuinfo": "\n".join(text.format(cpu=cpu) for cpu in range(count)),
        "sys/devices/system/cpu/online": f"0-{count - 1}\n",
    }
    for cpu in range(count):
        siblings_of = siblings[cpu] if siblings else str(cpu)
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings_of + "\n"
    return files


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Four cores with two threads each, in a container of version 2: 3 cores of quota, 2 GiB of memory."""
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    files = cores(X86_CORE, 8, siblings) | {
        "proc/self/status": "Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,6\n",
        "proc/self/cgroup": "0::/system.slice/job\n",
        "proc/meminfo": "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   60000000 kB\n",
        "proc/loadavg": "1.25 0.80 0.50 2/345 6789\n",
        "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
        "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "sys/devices/system/cpu/modalias": "cpu:type:x86,ven0000fam0006mod008F:feature:,0000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/system.slice/cpu.max": "600000 100000\n",
        "sys/fs/cgroup/system.slice/job/cpu.max": "350000 100000\n",
        "sys/fs/cgroup/system.slice/job/memory.max": "2147483648\n",
        "sys/fs/cgroup/system.slice/job/memory.current": "1610612736\n",
        "sys/fs/cgroup/system.slice/job/memory.stat": "anon 536870912\ninactive_file 1073741824\n",
        "sys/class/hwmon/hwmon0/name": "nvme\n",
        "sys/class/hwmon/hwmon0/temp1_input": "71000\n",
        "sys/class/hwmon/hwmon1/name": "coretemp\n",
        "sys/class/hwmon/hwmon1/temp1_input": "48000\n",
        "sys/class/hwmon/hwmon1/temp2_input": "51000\n",
    }
    for cpu in range(8):
        files[f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq"] = f"{2_000_000 + 100_000 * cpu}\n"
        files[f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"] = "powersave\n"
    return tree(tmp_path, files)


def pi(root: Path, text: str, model: str) -> Path:
    files = cores(text, 4) | {
        "proc/self/status": "Cpus_allowed_list:\t0-3\n",
        "proc/self/cgroup": "0::/user.slice\n",
        "proc/meminfo": "MemTotal:        3884360 kB\nMemAvailable:    3400000 kB\n",
        "proc/device-tree/model": model + "\0",
        "proc/loadavg": "0.00 0.01 0.05 1/150 900\n",
        "proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-v8\n",
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
        "sys/devices/system/cpu/modalias": "cpu:type:aarch64:feature:,0000,0001\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "52582\n",
        "sys/class/thermal/thermal_zone1/type": "rp1-adc\n",
        "sys/class/thermal/thermal_zone1/temp": "90000\n",
    }
    for cpu in range(4):
        files[f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq"] = "1800000\n"
        files[f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"] = "ondemand\n"
    return tree(root, files)


def look(root: Path, machine: str, system: str = "Linux") -> dict[str, Any]:
    return probe(root, system=system, machine=machine)


def test_server(server: Path) -> None:
    found = look(server, "x86_64")
    assert set(found) == KEYS
    assert found["cpu_model"] == "Intel(R) Xeon(R) Gold 6430"
    assert (found["physical_cores"], found["logical_cores"]) == (4, 8)
    assert found["usable_cores"] == 3, "five allowed, three and a half granted"
    assert found["instruction_sets"] == [
        "avx", "avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"
    ]  # fmt: skip
    assert found["memory_bytes"] == 2 * 2**30
    assert found["memory_available_bytes"] == 1536 * 2**20, "pages of files can be given back"
    assert (found["os"], found["kernel"]) == ("Debian GNU/Linux 12 (bookworm)", "6.1.0-18-amd64")
    assert found["governor"] == "powersave"
    assert found["frequency_hz"] == 2_350_000_000
    assert found["temperature_c"] == 51.0, "the processor's, not the disk's"
    assert found["load_average_1m"] == 1.25
    assert found["emulated"] is False


def test_control_groups_version_1(server: Path) -> None:
    (server / "proc/self/cgroup").write_text("9:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/\n")
    for level in ("docker/a", "docker", ""):
        folder = server / "sys/fs/cgroup/cpu" / level
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text("200000\n" if level == "docker" else "-1\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    memory = server / "sys/fs/cgroup/memory"
    memory.mkdir()
    (memory / "memory.limit_in_bytes").write_text("1073741824\n")
    (memory / "memory.usage_in_bytes").write_text("268435456\n")
    found = look(server, "x86_64")
    assert found["usable_cores"] == 2
    assert found["memory_bytes"] == 2**30, "the container sees its own group as the root"
    assert found["memory_available_bytes"] == 768 * 2**20


def test_unlimited_groups_leave_the_machine_as_it_is(server: Path) -> None:
    (server / "proc/self/cgroup").write_text("9:memory:/\n4:cpu,cpuacct:/\n")
    tree(
        server,
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    found = look(server, "x86_64")
    assert found["usable_cores"] == 5
    assert found["memory_bytes"] == 65_536_000 * 1024


def test_less_than_one_core_is_one(server: Path) -> None:
    (server / "sys/fs/cgroup/system.slice/job/cpu.max").write_text("50000 100000\n")
    assert look(server, "x86_64")["usable_cores"] == 1


def test_virtual_machine_without_cpufreq(server: Path) -> None:
    for path in server.glob("sys/devices/system/cpu/cpu*/cpufreq/*"):
        path.unlink()
    found = look(server, "x86_64")
    assert found["governor"] is None
    assert found["frequency_hz"] == 2_100_000_000, "from cpuinfo"


def test_mixed_governors_are_all_named(server: Path) -> None:
    (server / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").write_text("performance\n")
    assert look(server, "x86_64")["governor"] == "performance, powersave"


def test_raspberry_pi_4(tmp_path: Path) -> None:
    found = look(pi(tmp_path, PI4_CORE, "Raspberry Pi 4 Model B Rev 1.4"), "aarch64")
    assert set(found) == KEYS
    assert found["cpu_model"] == "Raspberry Pi 4 Model B Rev 1.4 (4 x Cortex-A72)"
    assert found["instruction_sets"] == ["neon"]
    assert (found["physical_cores"], found["usable_cores"]) == (4, 4)
    assert (found["governor"], found["frequency_hz"]) == ("ondemand", 1_800_000_000)
    assert found["temperature_c"] == pytest.approx(52.582)
    assert found["emulated"] is False


def test_raspberry_pi_5(tmp_path: Path) -> None:
    found = look(pi(tmp_path, PI5_CORE, "Raspberry Pi 5 Model B Rev 1.0"), "aarch64")
    assert found["cpu_model"] == "Raspberry Pi 5 Model B Rev 1.0 (4 x Cortex-A76)"
    assert found["instruction_sets"] == ["neon", "fp16", "dotprod"]


def test_big_and_little_cores_and_an_unknown_part(tmp_path: Path) -> None:
    text = PI5_CORE.format(cpu=0) + "\n" + PI5_CORE.format(cpu=1).replace("0xd0b", "0xd05")
    root = tree(tmp_path, {"proc/cpuinfo": text + "\n" + PI5_CORE.format(cpu=2).replace("0xd0b", "0xfff")})
    found = look(root, "aarch64")
    assert found["cpu_model"] == "1 x Cortex-A76 + 1 x Cortex-A55 + 1 x part 0xfff by implementer 0x41"
    assert found["logical_cores"] == 3


def test_emulation_is_seen(tmp_path: Path) -> None:
    """qemu-user shows the host's /sys; old versions show its cpuinfo, new ones a made-up one."""
    host = tree(tmp_path / "a", cores(X86_CORE, 2) | {"sys/devices/system/cpu/modalias": "cpu:type:x86,ven"})
    assert look(host, "aarch64")["emulated"] is True
    faked = tree(tmp_path / "b", cores(PI4_CORE, 2) | {"sys/devices/system/cpu/modalias": "cpu:type:x86,ven"})
    assert look(faked, "aarch64")["emulated"] is True
    arm = tree(tmp_path / "c", cores(PI4_CORE, 2) | {"sys/devices/system/cpu/modalias": "cpu:type:aarch64:"})
    assert look(arm, "armv7l")["emulated"] is False, "a 32-bit system on a 64-bit processor runs natively"
    assert look(tree(tmp_path / "d", cores(X86_CORE, 2)), "aarch64")["emulated"] is True
    assert look(tree(tmp_path / "e", cores(PI4_CORE, 2)), "aarch64")["emulated"] is None


def test_nothing_to_read_is_null(tmp_path: Path) -> None:
    found = look(tmp_path, "riscv64")
    assert set(found) == KEYS
    assert found.pop("architecture") == "riscv64"
    assert found.pop("python")
    assert found.pop("instruction_sets") == []
    assert set(found.values()) == {None}


def test_damaged_files_are_null_too(tmp_path: Path) -> None:
    root = pi(tmp_path, PI4_CORE, "Pi")
    (root / "sys/class/thermal/thermal_zone0/temp").write_text("hot\n")
    (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").write_bytes(b"\xff\xfe")
    (root / "proc/self/cgroup").write_text("nonsense\n")
    found = look(root, "aarch64")
    assert found["temperature_c"] is None
    assert found["frequency_hz"] == 1_800_000_000


def test_macos(tmp_path: Path) -> None:
    found = probe(tmp_path, system="Darwin", machine="arm64", sysctl=MAC.get)
    assert set(found) == KEYS
    assert (found["cpu_model"], found["architecture"]) == ("Apple M4", "aarch64")
    assert (found["physical_cores"], found["usable_cores"]) == (10, 10)
    assert found["instruction_sets"] == ["neon", "fp16", "dotprod", "i8mm"]
    assert (found["memory_bytes"], found["memory_available_bytes"]) == (16 * 2**30, 16_384_000)
    assert (found["os"], found["kernel"]) == ("macOS 15.1", "24.1.0")
    assert found["load_average_1m"] == 1.52
    assert found["emulated"] is False
    rosetta = MAC | {"sysctl.proc_translated": "1"}
    assert probe(tmp_path, system="Darwin", machine="x86_64", sysctl=rosetta.get)["emulated"] is True


def test_macos_without_sysctl(tmp_path: Path) -> None:
    found = probe(tmp_path, system="Darwin", machine="arm64", sysctl=lambda _name: None)
    assert set(found) == KEYS
    assert found["memory_bytes"] is None


def test_this_machine() -> None:
    """Whatever it is, the probe answers and agrees with itself."""
    found = probe()
    assert set(found) == KEYS
    assert found["logical_cores"] >= found["usable_cores"] >= 1
    assert found["memory_bytes"] >= found["memory_available_bytes"] > 0


def test_memory_bandwidth_is_bytes_over_the_best_pass(server: Path) -> None:
    """The clock gives passes of 4, 1 and 2 s: the best one counts, and it read the whole working set."""
    ticks = itertools.accumulate([0, 0, 4, 0, 0, 1, 0, 0, 2, 100, 100, 100])
    found = memory_bandwidth(
        seconds=6.5, threads=2, working_set_bytes=2**20, root=server, clock=lambda: float(next(ticks))
    )
    assert found == 2**20


def test_memory_bandwidth_stays_within_a_quarter_of_the_free_memory(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server / "proc/meminfo").write_text("MemTotal: 8192 kB\nMemAvailable: 4096 kB\n")
    ticks = itertools.count()
    found = memory_bandwidth(seconds=0.5, threads=3, root=server, clock=lambda: float(next(ticks)))
    assert found == 2**20


def test_memory_bandwidth_of_this_machine() -> None:
    found = memory_bandwidth(seconds=0.05, threads=1, working_set_bytes=16 * 2**20)
    assert 1e8 < found < 1e13


def test_default_working_set_is_beyond_the_cache(server: Path) -> None:
    assert last_level_cache_bytes(server) is None
    for index, size in enumerate(("32K", "2048K", "491520K")):
        tree(server, {f"sys/devices/system/cpu/cpu0/cache/index{index}/size": size + "\n"})
    assert last_level_cache_bytes(server) == 480 * 2**20


def test_profiles_load_and_cite_every_table() -> None:
    names = list_devices()
    boards = {"rpi-zero2w", "rpi4-4gb", "rpi4-8gb", "rpi5-4gb", "rpi5-8gb", "rpi5-16gb"}
    macs = {"m1-8gb", "m2-8gb", "m3-8gb", "m4-16gb"}
    assert boards | macs | {"x86-64-laptop", "linux-x86-64", "linux-aarch64"} == set(names)
    for name in names:
        found = load_device(name)
        assert found.name == name
        assert {"cpu", "memory", "bandwidth"} <= set(found.sources)
        values = {
            "bandwidth": found.memory_bandwidth_bytes_per_s,
            "prefill": found.prefill_ops_per_s,
            "storage": found.storage_bytes_per_s,
            "power": found.max_power_w,
        }
        assert found.memory_system_bytes is not None
        assert 0 < found.memory_system_bytes < found.memory_bytes
        assert set(found.prefill_family_ops_per_s) <= set(module.FAMILIES)
        assert (found.accelerator == "metal") == (name in macs)
        for table, value in values.items():
            assert (value is not None) == (table in found.sources), "a value without a source"
        assert all(len(source) > 20 for source in found.sources.values())
        assert "neon" in found.instruction_sets or found.architecture == "x86_64"


@pytest.mark.parametrize(
    ("name", "tokens_per_s", "weight_bytes"),
    [
        # Published decode rates: bandwidth over weight bytes must come within a third of each.
        ("rpi4-4gb", 8.42, 0.60e9 * 4.5 / 8 + 0.05e9),  # qwen3-0.6b Q4_0, llama-bench b7095
        ("rpi4-4gb", 4.61, 1.24e9 * 4.9 / 8),  # llama3.2-1b Q4_0
        ("rpi5-8gb", 11.2, 0.81e9),  # llama3.2-1b Q4_K_M
        ("rpi5-8gb", 4.88, 2.02e9),  # llama3.2-3b Q4_K_M
        ("m1-8gb", 14.15, 3.56 * 2**30),  # llama-7b Q4_0
        ("m4-16gb", 20.87, 4.58 * 2**30),  # llama3.1-8b Q4_K_M
        ("x86-64-laptop", 6.86, 4.58 * 2**30),  # llama3.1-8b Q4_K_M
    ],
)
def test_bandwidth_predicts_published_decode_rates(
    name: str, tokens_per_s: float, weight_bytes: float
) -> None:
    bandwidth = load_device(name).memory_bandwidth_bytes_per_s
    assert bandwidth is not None
    assert bandwidth / weight_bytes == pytest.approx(tokens_per_s, rel=1 / 3)


def test_describe_devices() -> None:
    record = describe_devices()
    assert record["schema"] == "edgeslm.devices/1"
    assert [one["name"] for one in record["devices"]] == list_devices()
    (one,) = describe_devices("rpi5-8gb")["devices"]
    assert set(one) == {field.name for field in dataclasses.fields(module.Device)}
    assert one["memory_bytes"] == 8 * 2**30


GOOD = """
name = "board"
description = "A board"
[cpu]
model = "M"
architecture = "aarch64"
cores = 4
frequency_hz = 1_000_000_000
instruction_sets = ["neon"]
source = "s"
[memory]
bytes = 1_073_741_824
source = "s"
"""


def test_own_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    found = load_device(path)
    assert found.memory_bandwidth_bytes_per_s is None
    assert found.sources == {"cpu": "s", "memory": "s"}


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[memory]", "[memroy]", ["[memroy]", "did you mean 'memory'?"]),
        ("cores = 4", "coers = 4", ["[cpu]", "'coers'", "did you mean 'cores'?"]),
        ("cores = 4", "cores = 0", ["[cpu] cores = 0", "from 1 to 4096"]),
        ('["neon"]', '["noen"]', ["'noen'", "did you mean 'neon'?"]),
        ("bytes = 1_073_741_824\n", "", ["[memory]", "'bytes' is missing"]),
        ('source = "s"\n[memory]', "[memory]", ["[cpu]", "'source' is missing"]),
        ('name = "board"', 'name = "board"\ncolour = "green"', ["top level", "'colour'"]),
        ("[memory]", "[bandwidth]\nbytes_per_s = 0\nsource = 's'\n[memory]", ["[bandwidth] bytes_per_s = 0"]),
        ('description = "A board"', 'description = "A board"\nmemory = 3', ["not valid TOML"]),
    ],
)
def test_profile_errors(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    path = tmp_path / "board.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_device(path)
    for part in [*parts, "board.toml"]:
        assert part in str(caught.value)


def test_table_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text("cpu = 3\n" + GOOD.split("[cpu]", maxsplit=1)[0])
    with pytest.raises(RecipeError, match=r"\[cpu\]"):
        load_device(path)


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rpi5-8gb'"):
        load_device("rpi5")
    with pytest.raises(RecipeError, match="no such file"):
        load_device("missing/board.toml")
    with pytest.raises(RecipeError, match="no device profile"):
        describe_devices("../devices/rpi5-8gb")
