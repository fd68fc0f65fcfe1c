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

from edgeslm.linux_host import INSTRUCTION_SETS, last_level_cache_bytes, probe_linux
from edgeslm.schema import Key, read_table, read_toml, shipped_folder, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Sysctl = Callable[[str], str | None]

MAC_INSTRUCTION_SETS = {
    "avx": "hw.optional.avx1_0", "avx2": "hw.optional.avx2_0", "f16c": "hw.optional.f16c",
    "fma": "hw.optional.fma", "avx512f": "hw.optional.avx512f",
    "neon": "hw.optional.AdvSIMD", "fp16": "hw.optional.arm.FEAT_FP16",
    "dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
}  # fmt: skip

_SOURCE = Key(kind="string", required=True)
_OPS = Key(kind="number", low=1e6, high=1e16)
_SPREAD = Key(kind="number", low=0.0, high=0.9)

PROFILE = {
    "": {
        "name": Key(kind="string", required=True, pattern=r"[a-z0-9][a-z0-9-]*"),
        "description": Key(kind="string", required=True),
        "accelerator": Key(kind="string", choices=("metal",)),
    },
    "cpu": {
        "model": Key(kind="string", required=True),
        "architecture": Key(kind="string", required=True, choices=("x86_64", "aarch64")),
        "cores": Key(kind="integer", required=True, low=1, high=4096),
        "frequency_hz": Key(kind="integer", low=10**8, high=10**10),
        "instruction_sets": Key(kind="strings", choices=tuple(INSTRUCTION_SETS)),
        "source": _SOURCE,
    },
    "memory": {
        "bytes": Key(kind="integer", required=True, low=2**20),
        "system_bytes": Key(kind="integer", low=0),
        "source": _SOURCE,
    },
    "bandwidth": {
        "bytes_per_s": Key(kind="number", required=True, low=1e6, high=1e13),
        "layer_s": Key(kind="number", low=0.0, high=1.0),
        "spread": _SPREAD,
        "source": _SOURCE,
    },
    "prefill": {
        "ops_per_s": Key(kind="number", required=True, low=1e6, high=1e16),
        "repacked_ops_per_s": _OPS,
        "repacked_k_ops_per_s": _OPS,
        "codebook_ops_per_s": _OPS,
        "eight_bit_ops_per_s": _OPS,
        "spread": _SPREAD,
        "source": _SOURCE,
    },
    "storage": {"bytes_per_s": Key(kind="number", required=True, low=1e5, high=1e12), "source": _SOURCE},
    "power": {"max_w": Key(kind="number", required=True, low=0.1, high=10_000), "source": _SOURCE},
}
"""Tables of a profile; [cpu] and [memory] must be there, the others where somebody has measured."""


FAMILIES = ("repacked", "repacked_k", "codebook", "eight_bit")
"""Families of storage types that multiply at a rate of their own; all others are plain."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of machine.  sources: where the values are from, by table of the profile."""

    name: str
    description: str
    accelerator: str | None
    """What llama.cpp computes on instead of the processor: "metal"."""
    cpu_model: str
    architecture: str
    cores: int
    frequency_hz: int | None
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    memory_system_bytes: int | None
    """What firmware, system and its services keep; the rest is free for a model."""
    memory_bandwidth_bytes_per_s: float | None
    """Weight bytes read in a second of decoding, all cores."""
    layer_overhead_s: float
    """Time that a decode step spends on each layer besides reading it."""
    decode_spread: float | None
    """How far published decode rates lie from what these values predict, as a share: nine runs in ten."""
    prefill_ops_per_s: float | None
    """Multiplications and additions in a second of prefill, all cores, with types of no family in FAMILIES."""
    prefill_family_ops_per_s: Mapping[str, float]
    """The same of the families that somebody has measured."""
    prefill_spread: float | None
    storage_bytes_per_s: float | None
    """Read in one sequential pass from where a model would lie."""
    max_power_w: float | None
    sources: Mapping[str, str]
    onnxruntime: str | None = None
    """Version of ONNX Runtime that the device's software is pinned to; None: a recent one."""


def load_device(name_or_path: str | Path) -> Device:
    """A profile by its name, or from a .toml file.  Raises RecipeError naming table, key and value."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = shipped_folder("devices") / f"{name_or_path}.toml"
        if str(name_or_path) not in list_devices():
            raise unknown_name(
                f"{str(name_or_path)!r} is no device profile", str(name_or_path), list_devices()
            )
    return read_device(read_toml(path)[1], path.name)


def read_device(data: Mapping[str, Any], name: str) -> Device:
    """A profile out of what its TOML holds; name: of the file, for messages.  Raises RecipeError."""
    for table, value in data.items():
        if isinstance(value, dict) and table not in PROFILE:
            raise unknown_name(f"{name}: [{table}] is not a known table", table, [*PROFILE][1:])
    values: dict[str, dict[str, Any]] = {}
    for table, keys in PROFILE.items():
        where = f"{name}: [{table}]" if table else f"{name}: the top level"
        part = data.get(table) if table else {key: data[key] for key in data if key not in PROFILE}
        if part is not None or table in ("cpu", "memory"):
            values[table] = read_table(part if isinstance(part, dict) else {}, keys, where)
    cpu, memory = values["cpu"], values["memory"]
    bandwidth, prefill = values.get("bandwidth", {}), values.get("prefill", {})
    return Device(
        **{"accelerator": None, **values[""]},
        cpu_model=cpu["model"],
        architecture=cpu["architecture"],
        cores=cpu["cores"],
        frequency_hz=cpu.get("frequency_hz"),
        instruction_sets=cpu.get("instruction_sets", ()),
        memory_bytes=memory["bytes"],
        memory_system_bytes=memory.get("system_bytes"),
        memory_bandwidth_bytes_per_s=bandwidth.get("bytes_per_s"),
        layer_overhead_s=bandwidth.get("layer_s", 0.0),
        decode_spread=bandwidth.get("spread"),
        prefill_ops_per_s=prefill.get("ops_per_s"),
        prefill_family_ops_per_s={
            family: prefill[f"{family}_ops_per_s"] for family in FAMILIES if f"{family}_ops_per_s" in prefill
        },
        prefill_spread=prefill.get("spread"),
        storage_bytes_per_s=values.get("storage", {}).get("bytes_per_s"),
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
        working_set_bytes = min(max(4 * (last_level_cache_bytes(root) or 0), 64 * 2**20), 512 * 2**20)
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
    return facts | probe_linux(root, architecture)


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
