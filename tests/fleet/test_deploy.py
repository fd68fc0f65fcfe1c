"""edgeslm.fleet.deploy against a real sshd: cut at any point, the old version works and the next call completes."""

from __future__ import annotations

import os
import random
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from edgeslm.bundle import open_bundle
from edgeslm.errors import BundleError, EdgeslmError
from edgeslm.fleet.deploy import deploy, prepare, raise_for_failures
from edgeslm.fleet.ssh import Target
from edgeslm.progress import Quiet
from tests.fleet.conftest import Far, interpreter, make_bundle, resetting_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IN_FLIGHT_BYTES = 5 * 2**20
"""What pipes, ssh's window and TCP may hold when a connection is cut."""
BIG = 24 * 2**20


class Cut(Quiet):
    """Progress that does something once so many bytes are on their way."""

    def __init__(self, at_bytes: int, act: Callable[[], None]) -> None:
        self.left, self.act = at_bytes, act

    @contextmanager
    def task(self, name: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
        def advance(amount: float) -> None:
            if not name.startswith("copy"):
                return
            before, self.left = self.left, self.left - int(amount)
            if before > 0 >= self.left:
                self.act()

        yield advance


def the(record: dict[str, Any]) -> dict[str, Any]:
    """The one device of a record."""
    host: dict[str, Any] = record["hosts"][0]
    return host


def test_first_again_and_changed(far: Far, tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "old")
    target = far.target(tmp_path / "far")
    first = the(deploy(old.path, [target], access=far.access()))
    whole = sum(path.stat().st_size for path in old.path.rglob("*") if path.is_file())
    assert (first["status"], first["sent_bytes"], first["error"]) == ("deployed", whole, None)
    assert open_bundle(tmp_path / "far/current", verify=True).digest == old.digest
    again = the(deploy(old.path, [target], access=far.access()))
    assert (again["status"], again["sent_bytes"], again["present_bytes"]) == ("already there", 0, whole)

    new = make_bundle(tmp_path / "new", card="another card\n")
    changed = the(deploy(new.path, [target], access=far.access()))
    assert changed["sent_bytes"] < 2000, "the weights are there"
    assert changed["before"] == first["path"].rpartition("/")[2]
    assert open_bundle(tmp_path / "far/current", verify=True).digest == new.digest
    assert open_bundle(tmp_path / "far/previous", verify=True).digest == old.digest


def test_a_bare_file(far: Far, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    host = the(deploy(tmp_path / "tiny.gguf", [far.target(tmp_path / "far")], access=far.access()))
    assert host["status"] == "deployed"
    assert (tmp_path / "far/current/tiny.gguf").read_bytes() == b"GGUF" + bytes(100)
    assert prepare(tmp_path / "tiny.gguf", Quiet()).artifact_at("/x") == "/x/tiny.gguf"


def kill_clients(word: str) -> None:
    """kill -9 of the ssh processes that this one started: the master (-M) or what goes through it."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            if line and line[0] == "ssh" and ("-M" in line) == (word == "master"):
                os.kill(child.pid, signal.SIGKILL)


def kill_sessions(far: Far) -> None:
    for child in psutil.Process(far.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith("sshd"):
                child.kill()


@pytest.mark.parametrize("seed", range(10))
def test_cut_at_a_random_point(far: Far, tmp_path: Path, seed: int) -> None:
    """Twice, by one of four means; then the old version is whole, and the third call completes."""
    choose = random.Random(seed)
    old, new = make_bundle(tmp_path / "old"), make_bundle(tmp_path / "new", seed=1, size=BIG)
    target = far.target(tmp_path / "far")
    assert the(deploy(old.path, [target], access=far.access()))["status"] == "deployed"
    sent = kept = 0
    with resetting_proxy(far.port) as (port, reset):
        for number in range(2):
            means = (
                lambda: kill_clients("master"),
                lambda: kill_clients("one"),
                lambda: kill_sessions(far),
                reset,
            )
            cut = Cut(choose.randrange(1, max(2, (BIG - sent) // 2)), means[(seed + number) % 4])
            host = the(deploy(new.path, [target], access=far.access(port=port), progress=cut))
            assert host["status"] == "failed"
            assert "goes on" in host["hint"] or "lost" in host["error"], host
            assert open_bundle(tmp_path / "far/current", verify=True).digest == old.digest
            assert host["resumed_bytes"] >= kept
            parts = list((tmp_path / "far/.parts").iterdir()) if (tmp_path / "far/.parts").exists() else []
            kept = sum(part.stat().st_size for part in parts)
            sent += host["sent_bytes"]
        host = the(deploy(new.path, [target], access=far.access(port=port)))
    assert (host["status"], host["error"]) == ("deployed", None)
    assert host["resumed_bytes"] >= kept
    assert open_bundle(tmp_path / "far/current", verify=True).digest == new.digest
    whole = sum(path.stat().st_size for path in new.path.rglob("*") if path.is_file())
    assert host["resumed_bytes"] + host["sent_bytes"] + host["present_bytes"] == whole
    assert sent + host["sent_bytes"] <= whole + 2 * IN_FLIGHT_BYTES


@pytest.mark.slow
def test_a_link_that_falls_silent(far: Far, tmp_path: Path) -> None:
    """The device never learns that its peer is gone; it gives up by itself and the next call takes over."""
    bundle, target = make_bundle(tmp_path / "b", size=BIG), far.target(tmp_path / "far")
    with resetting_proxy(far.port, propagate=False) as (port, _):
        cut = Cut(BIG // 2, lambda: kill_clients("master"))
        host = the(deploy(bundle.path, [target], access=far.access(port=port), progress=cut))
        assert host["status"] == "failed"
        host = the(deploy(bundle.path, [target], access=far.access()))
    assert (host["status"], host["error"]) == ("deployed", None)
    assert host["resumed_bytes"] > 0


def test_a_disk_that_is_full(far: Far, tmp_path: Path) -> None:
    """A limit of 4 MiB on the size of a file stands for it: writes begin to fail in the middle."""
    old, new = make_bundle(tmp_path / "old"), make_bundle(tmp_path / "new", seed=1, size=BIG)
    target = far.target(tmp_path / "far")
    deploy(old.path, [target], access=far.access())
    limited = tmp_path / "python3"
    limited.write_text('#!/bin/bash\nulimit -f 4096\nexec python3 "$@"\n')
    limited.chmod(0o755)
    host = the(deploy(new.path, [target], access=far.access(python=str(limited))))
    assert "File too large" in host["error"]
    assert "goes on where it stopped" in host["hint"]
    assert open_bundle(tmp_path / "far/current", verify=True).digest == old.digest
    host = the(deploy(new.path, [target], access=far.access()))
    assert (host["status"], host["resumed_bytes"]) == ("deployed", 4096 * 1024)


def test_several_devices_and_one_that_is_off(far: Far, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    targets = [far.target(tmp_path / "one"), Target(host="127.0.0.2"), far.target(tmp_path / "two")]
    record = deploy(bundle.path, targets, access=far.access())
    assert [host["status"] for host in record["hosts"]] == ["deployed", "failed", "deployed"]
    for name in ("one", "two"):
        assert open_bundle(tmp_path / name / "current", verify=True).digest == bundle.digest
    with pytest.raises(EdgeslmError, match=r"1 of 3 devices failed: 127\.0\.0\.2"):
        raise_for_failures(record["hosts"])


def test_a_device_that_can_not_run_it_keeps_the_old(far: Far, tmp_path: Path) -> None:
    """A dying runtime stops the copy before it begins; --force copies all the same."""
    pytest.importorskip("llama_cpp")
    (tmp_path / "llama_cpp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    python = interpreter(tmp_path / "python3", tmp_path, Path(__file__).resolve().parents[2])
    bundle, target = make_bundle(tmp_path / "b"), far.target(tmp_path / "far")
    host = the(deploy(bundle.path, [target], access=far.access(python=python)))
    assert (host["status"], host["sent_bytes"]) == ("failed", 0)
    assert "illegal instruction" in host["error"]
    assert not (tmp_path / "far").exists()
    host = the(deploy(bundle.path, [target], access=far.access(python=python), force=True))
    assert host["status"] == "deployed"


def test_a_damaged_bundle_is_not_sent(far: Far, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    weights = bytearray(bundle.weights.read_bytes())
    weights[100] ^= 1
    bundle.weights.write_bytes(weights)
    with pytest.raises(BundleError, match="sha256 differs"):
        deploy(bundle.path, [far.target(tmp_path / "far")], access=far.access())
    assert not (tmp_path / "far").exists()


def test_a_release_is_named_after_all_of_its_files(tmp_path: Path) -> None:
    """Other reports under the same weights are another release; the same files are the same one."""
    from edgeslm.bundle import add_reports

    one, same = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "same")
    assert prepare(one.path, Quiet()).id == prepare(same.path, Quiet()).id
    add_reports(one, {"report.md": "# fast\n"})
    release = prepare(one.path, Quiet())
    assert release.id != prepare(same.path, Quiet()).id
    assert release.bundle.digest == same.digest
    assert {file.path for file in release.files} == {
        "manifest.json",
        "model.gguf",
        "extra/card.md",
        "report.md",
    }
