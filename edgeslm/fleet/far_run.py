"""Runs a command on the far side and ends it when the other side goes: sent to a python3 there and run.

Only the standard library, of any Python from 3.8 on.  Standard input: one line of JSON, {command}; then it
stays open as long as the result is wanted.  Standard output and error are the command's own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path


def end_with_input(child: subprocess.Popen[bytes]) -> None:
    """Kill the command and all that it started once standard input ends."""
    while os.read(0, 4096):
        pass
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    try:
        child = subprocess.Popen(
            request["command"], stdin=subprocess.DEVNULL, cwd=str(Path.home()), start_new_session=True
        )
    except OSError as error:
        sys.exit(f"error: {request['command'][0]}: {error.strerror}")
    threading.Thread(target=end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)  # the thread still waits for the end of its input


if __name__ == "__main__":
    main()
