"""Commands of edgeslm on devices: the artifact is deployed first, then run where it lies.

The far side's `edgeslm bench --json` measures; its record comes back, is checked as any file would be, and
is put beside those of the other devices.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.bench.report import report_document, write_report
from edgeslm.errors import DataError, EdgeslmError, EngineError
from edgeslm.fleet import far_run
from edgeslm.fleet.deploy import on_devices, prepare, raise_for_failures
from edgeslm.fleet.ssh import Access
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeslm.fleet.deploy import Host
    from edgeslm.fleet.ssh import Connection, Target
    from edgeslm.progress import Progress

SCHEMA = "edgeslm.fleet-bench/1"
MODULE = ("-P", "-m", "edgeslm")


def bench_on(
    artifact: Path | str,
    targets: Sequence[Target],
    arguments: Sequence[str] = (),
    *,
    access: Access | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record edgeslm.fleet-bench/1: {hosts, records, report}.

    hosts: as deploy() tells of them, and "bench": that device's record of edgeslm.bench, or None.
    records: those records, whose artifact is called NAME on HOST.  report: all of them side by side, as
    `edgeslm report` reads it.  arguments: of `edgeslm bench`, as words.
    """
    progress = progress or Quiet()
    release = prepare(artifact, progress)

    def work(connection: Connection, host: Host) -> None:
        command = _command(host, "bench", release.artifact_at(host["path"]), ["--json", *arguments])
        host["bench"] = _measured(connection, command)

    hosts = on_devices(release, targets, access or Access(), progress=progress, work=work)
    for host in hosts:
        host.setdefault("bench", None)
    records = [_named(host) for host in hosts if host["bench"] is not None]
    return {"schema": SCHEMA, "hosts": hosts, "records": records, "report": report_document(records)}


def write_comparison(records: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """The records side by side, written as `edgeslm report` would: a directory, or .html, .md or .json."""
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as folder:
        paths = [Path(folder) / f"{number}.json" for number in range(len(records))]
        for path, record in zip(paths, records, strict=True):
            path.write_text(json.dumps(record), encoding="utf-8")
        return write_report(paths, out)


def run_on(
    artifact: Path | str,
    target: Target,
    name: str,
    arguments: Sequence[str] = (),
    *,
    access: Access | None = None,
    progress: Progress | None = None,
) -> int:
    """Run the command `name` (chat, generate, ...) there on this terminal; its exit status."""
    progress = progress or Quiet()
    release = prepare(artifact, progress)
    status = 0

    def work(connection: Connection, host: Host) -> None:
        nonlocal status
        words = _command(host, name, release.artifact_at(host["path"]), arguments)
        status = subprocess.call(connection.command(words, terminal=sys.stdin.isatty()))

    raise_for_failures(on_devices(release, [target], access or Access(), progress=progress, work=work))
    return status


def _command(host: Host, name: str, artifact: str, arguments: Sequence[str]) -> list[str]:
    if host["python"] is None:
        check = next(check for check in host["checks"] if check["check"] == "edgeslm")
        raise EngineError(f"{host['host']}: {check['detail']}", hint=check["hint"])
    return [host["python"], *MODULE, name, artifact, *arguments]


def _measured(connection: Connection, command: Sequence[str]) -> dict[str, Any]:
    """The record that the far side prints as its last line."""
    with connection.talk(far_run, {"command": list(command)}) as talk:
        last = b""
        for line in talk.lines():
            last = line if line.startswith(b"{") else last
        code, said = talk.finish()
    if code == 255:
        raise talk.broken()
    if code != 0:
        raise _refusal(connection.host, code, said)
    try:
        record: dict[str, Any] = json.loads(last)
        report_document([record])
    except (ValueError, RecursionError, DataError) as error:
        raise EdgeslmError(
            f"{connection.host}: its edgeslm bench gave no record: {error}",
            hint="install the same edgeslm there",
        ) from None
    return record


def _refusal(host: str, code: int, said: str) -> EdgeslmError:
    """The error that the far edgeslm told, with its way out."""
    lines = [line.strip() for line in said.strip().splitlines()]
    message = next((line for line in reversed(lines) if line.lower().startswith("error: ")), "")
    hint = next((line for line in reversed(lines) if line.startswith("try: ")), "")
    if not message:
        message = f"error: it ended with {code}: {lines[-1] if lines else 'it said nothing'}"
    return EdgeslmError(f"{host}: {message[7:]}", hint=hint[5:])


def _named(host: Host) -> dict[str, Any]:
    """A device's record under the artifact's name and its own, which tells the entries of a report apart."""
    record: dict[str, Any] = host["bench"]
    artifact = record.get("artifact") or {}
    named = {
        "name": f"{artifact.get('name')} on {host['host']}",
        "path": f"{host['host']}:{artifact.get('path')}",
    }
    return {**record, "host": host["host"], "artifact": {**artifact, **named}}
