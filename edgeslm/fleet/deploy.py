"""A bundle onto devices: examined first, copied where a file is missing, verified there, switched in one step.

Every file goes by its sha256, so nothing that is there is sent, and a call that lost its connection is gone
on with by the next one.  `current` points to the old release until the new one is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from edgeslm.bundle import MANIFEST_NAME, file_sha256, open_bundle
from edgeslm.errors import EdgeslmError
from edgeslm.fleet import far_receive
from edgeslm.fleet.preflight import examine, faults
from edgeslm.fleet.ssh import Access, Connection
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from edgeslm.bundle import Bundle
    from edgeslm.fleet.ssh import Target
    from edgeslm.progress import Progress

    Host = dict[str, Any]
    Work = Callable[[Connection, Host], None]

SCHEMA = "edgeslm.deploy/1"
CHUNK_BYTES = 2**17
MOST_AT_ONCE = 16
"""Devices that are worked on at the same time."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a release."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """A bundle or a bare file as it is copied.  id: digest of all that is copied, the manifest included."""

    bundle: Bundle
    id: str
    files: tuple[File, ...]

    def source(self, file: File) -> Path:
        return self.bundle.weights if self.bundle.manifest is None else self.bundle.path / file.path

    def artifact_at(self, path: str) -> str:
        """What a command there is given when the release is at `path`."""
        return f"{path}/{self.files[0].path}" if self.bundle.manifest is None else path


def deploy(
    artifact: Path | str,
    targets: Sequence[Target],
    *,
    access: Access | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record edgeslm.deploy/1: the artifact, and for each target what was found, sent and switched there.

    force: copy although a check of preflight.examine() stops it.  A target that fails has the status
    "failed" and its error; the others go on.  Raises BundleError for a damaged artifact.
    """
    release = prepare(artifact, progress or Quiet())
    hosts = on_devices(release, targets, access or Access(), force=force, progress=progress or Quiet())
    bundle = release.bundle
    about = {
        "name": bundle.name,
        "path": str(bundle.path),
        "digest": bundle.digest,
        "bytes": sum(file.bytes for file in release.files),
        "files": len(release.files),
    }
    return {"schema": SCHEMA, "artifact": about, "release": release.id, "hosts": hosts}


def prepare(artifact: Path | str, progress: Progress) -> Release:
    """The release of an artifact, its files held against the manifest's hashes.  Raises BundleError."""
    bundle = open_bundle(artifact, verify=True, progress=progress)
    if bundle.manifest is None:
        size = bundle.weights.stat().st_size
        files = [File(path=bundle.weights.name, bytes=size, sha256=bundle.digest)]
    else:
        manifest = bundle.path / MANIFEST_NAME
        listed = [*bundle.manifest["files"], *bundle.manifest.get("reports", [])]
        files = [File(**{key: entry[key] for key in ("path", "bytes", "sha256")}) for entry in listed]
        files.append(File(path=MANIFEST_NAME, bytes=manifest.stat().st_size, sha256=file_sha256(manifest)))
    whole = json.dumps([asdict(file) for file in sorted(files, key=lambda file: file.path)])
    return Release(bundle=bundle, id=hashlib.sha256(whole.encode()).hexdigest()[:32], files=tuple(files))


def raise_for_failures(hosts: Sequence[Host]) -> None:
    """One error for the devices that failed."""
    failed = [host for host in hosts if host["status"] == "failed"]
    if len(failed) == 1 == len(hosts):
        raise EdgeslmError(failed[0]["error"], hint=failed[0]["hint"])
    if failed:
        names = ", ".join(host["host"] for host in failed)
        raise EdgeslmError(f"{len(failed)} of {len(hosts)} devices failed: {names}", hint=failed[0]["hint"])


def on_devices(
    release: Release,
    targets: Sequence[Target],
    access: Access,
    *,
    force: bool = False,
    progress: Progress,
    work: Work | None = None,
) -> list[Host]:
    """Deploy to every target, then do `work` there; one record each, in their order, failures included.

    Connections are opened one after another where ssh may ask for a password, everything else runs at once.
    """
    asking: AbstractContextManager[Any] = nullcontext() if access.batch else Lock()
    alone = len(targets) == 1

    def one(target: Target) -> Host:
        host = blank(target)
        start = time.perf_counter()
        try:
            connection = Connection(target.host, access)
            with asking:
                connection.open()
            with connection:
                _examine(connection, release, host, access, force=force)
                copy(connection, release, host, progress if alone else Quiet())
                if work is not None:
                    work(connection, host)
        except EdgeslmError as error:
            host |= {"status": "failed", "error": error.message, "hint": error.hint}
        host["duration_s"] = time.perf_counter() - start
        if not alone:
            progress.note(host["error"] or f"{target.host}: {host['status']}")
        return host

    with ThreadPoolExecutor(min(len(targets), MOST_AT_ONCE)) as pool:
        return list(pool.map(one, targets))


def blank(target: Target) -> Host:
    """The record of a device of which nothing is known yet."""
    unknown = ("machine", "python", "path", "before", "previous", "duration_s", "error")
    return {
        "host": target.host,
        "directory": target.directory,
        "status": "failed",
        "sent_bytes": 0,
        "resumed_bytes": 0,
        "present_bytes": 0,
        "checks": [],
        "hint": "",
        **dict.fromkeys(unknown),
    }


def _examine(connection: Connection, release: Release, host: Host, access: Access, *, force: bool) -> None:
    """Put what preflight finds into `host`; raise for what stops a deployment."""
    directory = host["directory"] or f"edgeslm/{re.sub(r'[^A-Za-z0-9._-]+', '-', release.bundle.name)}"
    files = [asdict(file) for file in release.files]
    host |= examine(connection, release.bundle, directory, files=files, python=access.python)
    stop = faults(host["checks"])
    if stop is not None and not force:
        raise EdgeslmError(f"{connection.host}: {stop.message}", hint=stop.hint)


def copy(connection: Connection, release: Release, host: Host, progress: Progress) -> None:
    """Send what host["directory"] lacks and switch to it."""
    files = {file.sha256: file for file in release.files}
    request = {
        "directory": host["directory"],
        "release": release.id,
        "files": [asdict(file) for file in release.files],
    }
    with connection.talk(far_receive, request) as talk:
        answers = talk.answers()
        for answer in answers:
            if "waiting" in answer:
                progress.note(f"{connection.host}: {answer['waiting']}")
            if "need" in answer:
                need = [(files[each["sha256"]], int(each["offset"])) for each in answer["need"]]
                host["resumed_bytes"] = sum(offset for _, offset in need)
                host["present_bytes"] = sum(file.bytes for file in release.files) - answer["total_bytes"]
                total = sum(file.bytes - offset for file, offset in need)
                with progress.task(f"copy to {connection.host}", total, "bytes") as advance:
                    for data in _chunks(release, need):
                        if not talk.send(data):
                            break
                        host["sent_bytes"] += len(data)
                        advance(len(data))
            if done := answer.get("done"):
                host |= {key: done[key] for key in ("directory", "path", "before", "previous")}
                host["status"] = "already there" if done["before"] == release.id else "deployed"
                return
        raise talk.broken()


def _chunks(release: Release, need: Sequence[tuple[File, int]]) -> Iterator[bytes]:
    """The bytes of each file from its offset on."""
    for listed, offset in need:
        source = release.source(listed)
        with source.open("rb") as file:
            file.seek(offset)
            left = listed.bytes - offset
            while left:
                data = file.read(min(left, CHUNK_BYTES))
                if not data:
                    raise EdgeslmError(f"{source} has become shorter", hint="run the same command again")
                left -= len(data)
                yield data
