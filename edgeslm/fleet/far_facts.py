"""Finds out what a device is, on the far side: this file's text is sent to a python3 there and run.

Only the standard library, of any Python from 3.8 on, 32-bit ones too.  Standard input: one line of JSON,
the request; standard output: one answer, a JSON object after MARK.  Nothing is judged here.
"""

from __future__ import annotations

import json
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "@edgeslm "
FILE_BYTES = 2**18

LOOK = """
import json, os, platform, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
def needs(name):
    try:
        with open(os.path.join(sys.prefix, "wheelhouse.json")) as file:
            return next(each["instruction_sets"] for each in json.load(file)["files"] if each["name"] == name)
    except (OSError, ValueError, LookupError, StopIteration):
        return []
runtime = %r
found = {"version": platform.python_version(), "executable": sys.executable,
         "edgeslm": find_spec("edgeslm") is not None, "edgeslm_version": of("edgeslm"),
         "runtime_version": of(runtime), "runtime_needs": needs(runtime)}
print("@edgeslm " + json.dumps(found))
"""


def run(command: list[str], timeout_s: float) -> tuple[int | None, str, str]:
    """(exit status, None when it took too long; standard output; last line of standard error)."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", cwd="/",
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, "", f"no answer within {timeout_s:g} s"
    except OSError as error:
        return 127, "", error.strerror or str(error)
    return done.returncode, done.stdout, (done.stderr.strip().splitlines() or [""])[-1]


def interpreter(candidates: list[str], distribution: str, wanted: bool) -> dict[str, Any] | None:
    """The first candidate that finds edgeslm, else the first that runs; `wanted`: no other will do."""
    first = None
    for candidate in candidates:
        path = str(Path(candidate).expanduser())
        _, out, _ = run([path, "-c", LOOK % distribution], 60)
        for line in out.splitlines():
            if line.startswith(MARK):
                found = dict(json.loads(line[len(MARK) :]), path=path)
                if found["edgeslm"] or wanted:
                    return found
                first = first or found
    return first


def text_of(path: str) -> str | None:
    try:
        with Path(path).open("rb") as file:
            return file.read(FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def sysctls(names: list[str]) -> dict[str, str]:
    values = {}
    for name in names:
        code, out, _ = run(["sysctl", "-n", name], 5)
        if code == 0:
            values[name] = out.strip()
    return values


def place(directory: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the release would go: room there, and bytes of it that seem to be there already."""
    root = Path.home() / Path(directory).expanduser()
    existing = root
    while not existing.exists():
        existing = existing.parent
    sizes = set()
    for each in root.glob("releases/*/**/*"):
        if each.is_file():
            sizes.add((each.name, each.stat().st_size))
    missing = 0
    for file in files:
        if (file["path"].rpartition("/")[2], file["bytes"]) not in sizes:
            part = root / ".parts" / file["sha256"]
            missing += file["bytes"] - (part.stat().st_size if part.is_file() else 0)
    status = os.statvfs(str(existing))
    return {
        "directory": str(root),
        "exists": str(existing),
        "writable": os.access(str(existing), os.W_OK | os.X_OK),
        "free_bytes": status.f_bavail * status.f_frsize,
        "missing_bytes": missing,
    }


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    system = platform.system()
    clock_s = time.time()
    found = interpreter(request["interpreters"], request["distribution"], request["wanted"])
    tried = None
    if found is not None and found["runtime_version"]:
        code, _, error = run([found["path"], "-c", request["trial"]], 180)
        tried = {"returncode": code, "error": error}
    facts = {
        "clock_s": clock_s,
        "system": system,
        "machine": platform.machine(),
        "pointer_bits": struct.calcsize("P") * 8,
        "python": found,
        "trial": tried,
        "place": place(request["directory"], request["files"]),
        "files": {name: text_of("/" + name) for name in request["read"]} if system == "Linux" else {},
        "sysctl": sysctls(request["sysctl"]) if system == "Darwin" else {},
    }
    sys.stdout.write(MARK + json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
