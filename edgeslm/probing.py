"""A device profile of this machine, measured: `edgeslm device probe`.

Seconds of work, no model and no engine: what memory gives, what a matrix product reaches, how fast a file
is read that is not cached.  What can't be measured is left out of the profile.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.device import memory_bandwidth, probe, read_device
from edgeslm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Clock = Callable[[], float]

DECODE_SHARE = 0.8
"""Of the bandwidth that plain reading reaches, what decoding does: 3.65 of 4.84 GB/s on a Pi 4 (STREAM
triad), 58 of 68 on an M1 and 101 of 120 on an M4 (the memory's own limit)."""
SPREAD = 0.4
"""Of predictions from such a profile: no published run stands behind it."""
STORAGE_BYTES = 2**26
CACHED_SHARE = 0.6
"""A first reading that is at least so fast as the second came out of the cache."""
MATRIX = (256, 1024, 1024)


def measure_profile(
    name: str,
    directory: Path | None = None,
    *,
    root: Path = Path("/"),
    seconds: float = 0.5,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Record edgeslm.device-probe/1: this machine, and `profile`, the text of a TOML file for devices/.

    name: of the profile, lower case letters, digits and dashes.  directory: where models would lie and
    storage is measured.  Raises EngineError on a machine that profiles have no words for.
    """
    machine = probe(root)
    if machine["architecture"] not in ("x86_64", "aarch64") or not machine["memory_bytes"]:
        raise EngineError(
            f"profiles are of x86_64 and aarch64; this machine is {machine['architecture']}",
            hint="write one by hand from a file of devices/",
        )
    measured = {
        "read_bytes_per_s": memory_bandwidth(seconds=seconds, root=root, clock=clock),
        "ops_per_s": matmul_ops_per_s(seconds, clock),
        "storage_bytes_per_s": storage_bytes_per_s(directory or Path(), clock=clock),
    }
    text = profile_text(name, machine, measured)
    read_device(tomllib.loads(text), f"{name}.toml")  # what is printed here loads there
    return {
        "schema": "edgeslm.device-probe/1",
        "machine": machine,
        "measured": measured,
        "profile": text,
    }


def matmul_ops_per_s(seconds: float, clock: Clock = time.perf_counter) -> float:
    """Multiplications and additions in a second of float32 matrix products, the best of those that fit."""
    import numpy as np

    rows, inner, columns = MATRIX
    left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    out = np.empty((rows, columns), np.float32)
    np.matmul(left, right, out=out)  # starts the threads
    best, end = float("inf"), clock() + seconds
    while best == float("inf") or clock() < end:
        start = clock()
        np.matmul(left, right, out=out)
        best = min(best, max(clock() - start, 1e-9))
    return 2 * rows * inner * columns / best


def storage_bytes_per_s(
    directory: Path, nbytes: int = STORAGE_BYTES, *, clock: Clock = time.perf_counter
) -> float | None:
    """Bytes per second of the first reading of a new file; None where it can't be told from the cache's.

    The file is written, flushed to the device and dropped from the cache; it is deleted at the end.
    """
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".edgeslm-probe-") as file:
            _past_cache(file.fileno())
            for _ in range(max(1, nbytes >> 20)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            first, second = (_read_through(Path(file.name), clock, past_cache=past) for past in (True, False))
    except OSError:
        return None
    return None if first >= CACHED_SHARE * second else first


def profile_text(name: str, machine: Mapping[str, Any], measured: Mapping[str, float | None]) -> str:
    """The TOML of a profile, each value with the source "measured"."""
    here = f"measured by edgeslm device probe on {machine['cpu_model'] or 'this machine'}"
    cores, free = machine["usable_cores"] or 1, machine["memory_available_bytes"]
    read, ops, storage = (measured[key] for key in ("read_bytes_per_s", "ops_per_s", "storage_bytes_per_s"))
    emulated = "; emulated: its timings mean nothing" if machine["emulated"] else ""
    tables: dict[str, dict[str, Any]] = {
        "": {"name": name, "description": f"{machine['cpu_model'] or 'A machine'}, {machine['os']}{emulated}"},
        "cpu": {
            "model": machine["cpu_model"] or "unknown",
            "architecture": machine["architecture"],
            "cores": machine["logical_cores"] or cores,
            "frequency_hz": machine["frequency_hz"],
            "instruction_sets": machine["instruction_sets"] or None,
            "source": f"{here}: what the system says of its processor",
        },
        "memory": {
            "bytes": machine["memory_bytes"],
            "system_bytes": None if free is None else max(0, machine["memory_bytes"] - free),
            "source": f"{here}: total memory, and what of it was not available at that moment",
        },
        "bandwidth": {
            "bytes_per_s": None if read is None else round(DECODE_SHARE * read),
            "spread": SPREAD,
            "source": f"{here}: {cores} threads read {(read or 0) / 1e9:.3g} GB/s; decoding reaches "
            f"{DECODE_SHARE:.0%} of such a figure on the machines of devices/",
        },
        "prefill": {
            "ops_per_s": None if ops is None else round(ops),
            "spread": SPREAD,
            "source": f"{here}: float32 matrix products of numpy, which plain quantized types come near",
        },
        "storage": {
            "bytes_per_s": None if storage is None else round(storage),
            "source": f"{here}: one sequential reading of a file that was not cached",
        },
    }  # fmt: skip
    needed = {"bandwidth": "bytes_per_s", "prefill": "ops_per_s", "storage": "bytes_per_s"}
    parts = []
    for table, values in tables.items():
        if table not in needed or values[needed[table]] is not None:
            lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
            parts.append("\n".join([f"[{table}]"] * bool(table) + lines))
    return "\n\n".join(parts)


def _toml(value: Any) -> str:
    """A value as TOML writes it; what JSON escapes in a string TOML's basic strings escape the same way."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return (
        json.dumps(value)
        if isinstance(value, str)
        else f"{value:_}"
        if isinstance(value, int)
        else str(value)
    )


def _past_cache(descriptor: int) -> None:
    """What was written through this file leaves the cache (Linux), or reading and writing go past it (macOS)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)


def _read_through(path: Path, clock: Clock, *, past_cache: bool) -> float:
    """Bytes per second of one reading from the first byte to the last."""
    total, buffer = 0, bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        if past_cache:
            _past_cache(file.fileno())
        start = clock()
        while count := file.readinto(buffer):
            total += count
        return total / max(clock() - start, 1e-9)
