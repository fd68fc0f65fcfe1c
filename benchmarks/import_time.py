"""Seconds of CPU that importing the device half takes, each time in a fresh interpreter.

    python benchmarks/import_time.py [--runs 15]

The interpreter's own start is taken off, measured in the same run; the bytecode is there, as after an
installation.  The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "edgeslm",
    "edgeslm.runtime",
    "edgeslm.runtime.server",
    "edgeslm.runtime.serving",
    "edgeslm.runtime.llama",
)


def cpu_s(code: str) -> float:
    """Seconds of CPU, user and system, of an interpreter that runs `code`."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{code!r} failed")
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    found: dict[str, list[float]] = {name: [] for name in ("", *MODULES)}
    for number in range(runs + 1):
        for name, seconds in found.items():
            spent = cpu_s(f"import {name}" if name else "pass")
            if number:  # the first round writes bytecode
                seconds.append(spent)
    start = statistics.median(found[""])
    record = {}
    for name in MODULES:
        low, middle, high = statistics.quantiles(found[name], n=4)
        record[name] = {"import_cpu_s": middle - start, "quartiles_s": [low - start, high - start]}
        print(f"{name:28} {middle - start:.3f} s  [{low - start:.3f}, {high - start:.3f}]")
    print(json.dumps({"runs": runs, "interpreter_cpu_s": start, "modules": record}))


if __name__ == "__main__":
    main()
