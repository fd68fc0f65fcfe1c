"""edgeslm.bundle: what is written is whole or not there, and what has changed is named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from edgeslm import atomic
from edgeslm import bundle as module
from edgeslm.bundle import (
    Bundle,
    add_reports,
    atomic_write,
    file_sha256,
    open_bundle,
    write_bundle,
)
from edgeslm.errors import BundleError, EdgeslmError
from edgeslm.progress import Quiet

MANIFEST = {
    "name": "tiny",
    "task": "causal-lm",
    "format": "gguf",
    "weights": "model.gguf",
    "model": {"parameters": 7},
}
WEIGHTS = b"GGUF" + bytes(range(256)) * 8
FILES: dict[str, Any] = {"model.gguf": WEIGHTS, "LICENSE": "Apache-2.0\n", "extra/card.md": "# Größe\n"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(out: Path, **changes: Any) -> Bundle:
    return write_bundle(out, files={**FILES, **changes}, manifest=MANIFEST)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


# ------------------------------------------------------------------------------------- write and open


def test_what_is_written_is_opened(tmp_path: Path) -> None:
    written = make(tmp_path / "new" / "tiny")
    opened = open_bundle(tmp_path / "new" / "tiny", verify=True)
    assert opened == written
    assert (opened.name, opened.format, opened.weights) == ("tiny", "gguf", opened.path / "model.gguf")
    assert opened.size_bytes == sum(
        len(data.encode() if isinstance(data, str) else data) for data in FILES.values()
    )
    assert contents(opened.path)["extra/card.md"] == "# Größe\n".encode()
    assert names(tmp_path / "new") == ["tiny"]


def test_manifest_bytes(tmp_path: Path) -> None:
    """The whole file, written out: sorted keys, indent 2, closing newline, hashes by hashlib."""
    write_bundle(tmp_path / "b", files={"model.gguf": b"GGUF"}, manifest={**MANIFEST, "name": "größe"})
    expected = """{
  "files": [
    {
      "bytes": 4,
      "path": "model.gguf",
      "sha256": "%s"
    }
  ],
  "format": "gguf",
  "model": {
    "parameters": 7
  },
  "name": "größe",
  "reports": [],
  "schema_version": 1,
  "task": "causal-lm",
  "weights": "model.gguf"
}
"""
    assert (tmp_path / "b" / "manifest.json").read_text() == expected % hashlib.sha256(b"GGUF").hexdigest()


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    assert contents(one.path) == contents(other.path)
    assert one.digest == other.digest
    assert make(tmp_path / "third", LICENSE="MIT\n").digest != one.digest


def test_digest_is_that_of_the_deployed_files(tmp_path: Path) -> None:
    made = make(tmp_path / "one")
    lines = [
        {"bytes": len(data), "path": name, "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted((n, d.encode() if isinstance(d, str) else d) for n, d in FILES.items())
    ]
    canonical = json.dumps(lines, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert made.digest == hashlib.sha256(canonical).hexdigest()


def test_bare_file(tmp_path: Path) -> None:
    path = tmp_path / "model.q4.gguf"
    path.write_bytes(WEIGHTS)
    bare = open_bundle(path, verify=True)
    assert (bare.manifest, bare.name, bare.weights, bare.size_bytes) == (None, "model.q4", path, len(WEIGHTS))
    assert bare.digest == hashlib.sha256(WEIGHTS).hexdigest() == file_sha256(path)
    with pytest.raises(BundleError, match="only a bundle directory holds reports"):
        add_reports(bare, {"report.md": "x"})


def test_big_files_are_linked_and_small_ones_copied(tmp_path: Path) -> None:
    big, small, link = tmp_path / "big", tmp_path / "small", tmp_path / "link"
    big.write_bytes(b"GGUF" + bytes(module.LINK_BYTES))
    small.write_bytes(b"small")
    link.symlink_to(big)
    made = write_bundle(tmp_path / "b", files={"model.gguf": link, "small": small}, manifest=MANIFEST)
    assert made.weights.stat().st_ino == big.stat().st_ino
    assert not made.weights.is_symlink()
    assert (made.path / "small").stat().st_ino != small.stat().st_ino
    assert big.exists()


def test_big_files_are_copied_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"GGUF" + bytes(module.LINK_BYTES))

    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    made = write_bundle(tmp_path / "b", files={"model.gguf": big}, manifest=MANIFEST)
    made.verify(Quiet())
    assert made.weights.stat().st_ino != big.stat().st_ino


# -------------------------------------------------------------------------------------- replacing


@pytest.mark.parametrize("swapped", [True, False])
def test_an_old_bundle_is_replaced(tmp_path: Path, swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swapped:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    make(tmp_path / "b", old="goes away")
    new = make(tmp_path / "b", LICENSE="MIT\n")
    assert contents(new.path).keys() == {"manifest.json", "model.gguf", "LICENSE", "extra/card.md"}
    assert contents(new.path)["LICENSE"] == b"MIT\n"
    assert names(tmp_path) == ["b"]


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert make(tmp_path / "b").name == "tiny"
    assert names(tmp_path) == ["b"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text(
        '{"manifest_version": 3, "name": "a browser extension"}'
    )
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    make(tmp_path / "bundle")
    (tmp_path / "bundle" / "bench.json").write_text("mine")
    before = contents(tmp_path)
    for name, expected in {
        "file": "is not a directory",
        "folder": r"has no manifest\.json",
        "extension": "schema_version None",
        "link": "is not a directory",
        "bundle": r"holds bench\.json, which is not part of the bundle",
    }.items():
        with pytest.raises(BundleError, match=expected):
            make(tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../x", "", ".", "a//b", "manifest.json", "a\\b", "a\0b", "c:x"]
)
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="can't be the name of a file"):
        make(tmp_path / "b", **{name: "x"})
    assert names(tmp_path) == []


def test_a_bundle_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for name in (".", "..", "a/..", ""):
        with pytest.raises(BundleError, match="is no name for a new directory"):
            make(Path(name))
    assert names(tmp_path) == ["inside"]


def test_a_manifest_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the weights 'model\.gguf' are not among the files"):
        write_bundle(tmp_path / "b", files={"LICENSE": "x"}, manifest=MANIFEST)
    assert names(tmp_path) == []


# --------------------------------------------------------------------------- changed and missing files


def test_every_flipped_byte_is_named(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    for name in FILES:
        path = made.path / name
        good = path.read_bytes()
        for at in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            opened = open_bundle(made.path)
            with pytest.raises(BundleError, match=f"{name}: sha256 differs from the manifest") as caught:
                opened.verify(Quiet())
            assert caught.value.message.count("sha256") == 1
            with pytest.raises(BundleError, match=name):
                open_bundle(made.path, verify=True)
        path.write_bytes(good)
    open_bundle(made.path, verify=True)


def test_missing_and_resized_files_are_named_on_opening(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    with (made.path / "model.gguf").open("ab") as file:
        file.write(b"x")
    (made.path / "LICENSE").unlink()
    (made.path / "extra" / "card.md").unlink()
    (made.path / "extra" / "card.md").mkdir()
    with pytest.raises(BundleError) as caught:
        open_bundle(made.path)
    for part in (
        "LICENSE is missing",
        "extra/card.md is not a file",
        "model.gguf has 2053 bytes; the manifest says 2052",
    ):
        assert part in caught.value.message
    assert "copy the bundle again" in caught.value.hint


def test_links_must_stay_inside(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    (tmp_path / "outside").write_bytes(b"Apache-2.0\n")
    (made.path / "LICENSE").unlink()
    (made.path / "LICENSE").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="LICENSE leads out of the bundle"):
        open_bundle(made.path)
    (made.path / "LICENSE").unlink()
    (made.path / "LICENSE").symlink_to("loop")
    (made.path / "loop").symlink_to("LICENSE")
    with pytest.raises(BundleError, match="LICENSE"):
        open_bundle(made.path)


def test_a_bundle_behind_a_link_is_opened(tmp_path: Path) -> None:
    make(tmp_path / "b")
    (tmp_path / "link").symlink_to("b")
    assert open_bundle(tmp_path / "link", verify=True).name == "tiny"


HASH = "0" * 64
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "newer schema": ({"schema_version": 2}, "schema_version 2; this edgeslm reads 1"),
    "schema as text": ({"schema_version": "1"}, "schema_version '1'"),
    "schema as true": ({"schema_version": True}, "schema_version True"),
    "no schema": ({"schema_version": None}, "schema_version None"),
    "format": ({"format": "coreml"}, "the format 'coreml' is none of gguf, onnx"),
    "decision": ({"decision": [0.5]}, "decision of the manifest is not an object"),
    "format a list": ({"format": []}, "the format"),
    "name": ({"name": 7}, "no name"),
    "no files": ({"files": None}, "no files"),
    "files": ({"files": {}}, "no files"),
    "entry": ({"files": [1]}, "files of the manifest is not a list of"),
    "bytes": ({"files": [{"path": "model.gguf", "bytes": True, "sha256": HASH}]}, "files of the manifest"),
    "negative": ({"files": [{"path": "model.gguf", "bytes": -1, "sha256": HASH}]}, "files of the manifest"),
    "hash": ({"files": [{"path": "model.gguf", "bytes": 1, "sha256": "x"}]}, "files of the manifest"),
    "reports": ({"reports": [{"path": "x"}]}, "reports of the manifest"),
    "model": ({"model": []}, "model of the manifest is not an object"),
    "weights": ({"weights": "LICENSE2"}, "the weights 'LICENSE2' are not among"),
    "weights a list": ({"weights": []}, "are not among"),
    "twice": ({"reports": [{"path": "model.gguf", "bytes": 1, "sha256": HASH}]}, "lists 'model.gguf'"),
    "parent": ({"reports": [{"path": "../x", "bytes": 1, "sha256": HASH}]}, "lists '../x'"),
    "absolute": ({"reports": [{"path": "/etc/passwd", "bytes": 1, "sha256": HASH}]}, "lists '/etc/passwd'"),
    "long": ({"reports": [{"path": "x" * 300, "bytes": 1, "sha256": HASH}]}, "File name too long"),
    "surrogate": (
        {"reports": [{"path": "\ud800", "bytes": 1, "sha256": HASH}]},
        "can't be a file of a bundle",
    ),
    "zero": ({"reports": [{"path": "a\0", "bytes": 1, "sha256": HASH}]}, "can't be a file of a bundle"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_manifest(name: str, tmp_path: Path) -> None:
    changes, expected = BAD[name]
    make(tmp_path / "b")
    rewrite_manifest(tmp_path / "b", **changes)
    with pytest.raises(BundleError, match=expected) as caught:
        open_bundle(tmp_path / "b")
    assert str(tmp_path / "b") in caught.value.message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 10**6, b'{"a":' * 10**5])
def test_manifest_that_is_no_json(text: bytes, tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    (made.path / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json (can't be read|does not hold)"):
        open_bundle(made.path)
    with (made.path / "manifest.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BundleError, match="larger than 16777216 bytes"):
        open_bundle(made.path)


def test_manifest_with_many_names_is_judged_fast(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    many = [{"path": f"r{index}", "bytes": 1, "sha256": HASH} for index in range(50_000)]
    rewrite_manifest(made.path, reports=many)
    with pytest.raises(BundleError, match="and 49997 more"):
        open_bundle(made.path)


def test_what_can_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="gone: No such file"):
        open_bundle(tmp_path / "gone")
    with pytest.raises(BundleError, match=r"has no manifest\.json") as caught:
        open_bundle(tmp_path)
    assert "edgeslm quantize" in caught.value.hint
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(BundleError, match="begins with b'no w'"):
        open_bundle(tmp_path / "text.gguf")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="neither a directory nor a file"):
        open_bundle(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------- reports


def test_reports_leave_the_digest(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    (tmp_path / "r.html").write_text("<html>")
    first = add_reports(made, {"report.html": tmp_path / "r.html", "report.md": "# one"})
    second = add_reports(first, {"report.md": "# two", "report.json": b"{}"})
    assert made.digest == first.digest == second.digest
    assert made.size_bytes == second.size_bytes
    assert second.manifest is not None
    assert [entry["path"] for entry in second.manifest["reports"]] == [
        "report.html",
        "report.json",
        "report.md",
    ]
    open_bundle(made.path, verify=True)
    (made.path / "report.md").write_text("# six")
    with pytest.raises(BundleError, match=r"report\.md: sha256 differs"):
        open_bundle(made.path, verify=True)


@pytest.mark.parametrize("name", ["model.gguf", "manifest.json", "../x", "a/b", ""])
def test_a_report_takes_no_other_file_s_place(name: str, tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    before = contents(tmp_path)
    with pytest.raises(BundleError, match="can't be the name of a report"):
        add_reports(made, {name: "x"})
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------- kills and full disks

WRITER = """
import os, signal, sys
from pathlib import Path
from edgeslm import atomic, bundle
steps = {step}
def count(frame, event, argument):
    '''Dies at the step-th call into the operating system of a write.'''
    global steps
    name = getattr(argument, "__name__", "")
    if event == "c_call" and name in ("open", "write", "fsync", "rename", "replace", "mkdir", "link", "rmdir", "unlink",
                                      "_FuncPtr", "CDLL", "scandir", "lstat"):
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
out = Path({out!r})
if {reports}:
    old = bundle.open_bundle(out)
    sys.setprofile(count)
    bundle.add_reports(old, {{"report.md": "# new", "report.json": "[]"}})
else:
    if {fallback}:
        atomic._exchange = lambda *_: False
    sys.setprofile(count)
    bundle.write_bundle(out, files={{"model.gguf": Path({weights!r}), "LICENSE": "new"}}, manifest={manifest!r})
sys.setprofile(None)
"""


def killed_at(step: int, folder: Path, *, reports: bool = False, fallback: bool = False) -> bool:
    """Whether a writing process that dies at its step-th system call did die (False: it had finished)."""
    weights = folder / "weights"
    if not weights.exists():
        weights.write_bytes(b"GGUF" + bytes(module.LINK_BYTES))
    code = WRITER.format(step=step, out=str(folder / "b"), weights=str(weights),
                         manifest=MANIFEST, reports=reports, fallback=fallback)  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def steps_until_done(folder: Path, **kind: bool) -> list[int]:
    out = folder / "b"
    step = 0
    died = []
    while killed_at(step, folder, **kind):
        died.append(step)
        step += 1
        if kind.get("fallback") and not out.exists():
            with pytest.raises(BundleError, match="rename it back"):
                open_bundle(out)
        else:
            opened = open_bundle(out, verify=True)
            assert opened.name == "tiny"
    return died


@pytest.mark.parametrize("fallback", [False, True])
def test_killed_at_any_step_the_old_or_the_new_bundle_is_there(tmp_path: Path, fallback: bool) -> None:
    make(tmp_path / "b")
    died = steps_until_done(tmp_path, fallback=fallback)
    assert len(died) > 10
    assert (tmp_path / "b" / "LICENSE").read_text() == "new"
    assert names(tmp_path) == ["b", "weights"], "the last write removes what killed ones left"


def test_killed_while_reports_are_added_the_bundle_is_whole(tmp_path: Path) -> None:
    made = add_reports(make(tmp_path / "b"), {"report.md": "# old"})
    died = steps_until_done(tmp_path, reports=True)
    assert len(died) > 5
    assert open_bundle(tmp_path / "b", verify=True).digest == made.digest
    assert (tmp_path / "b" / "report.md").read_text() == "# new"


def test_left_over_of_a_living_process_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / ".b.tmp-1").mkdir()
    (tmp_path / ".b.tmp-1" / "model.gguf").write_text("being written")
    (tmp_path / ".bb.tmp-999999999").mkdir()
    make(tmp_path / "b")
    assert names(tmp_path) == [".b.tmp-1", ".bb.tmp-999999999", "b"]


def test_interrupted_by_the_keyboard_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_put_in_place", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b")
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of one mebibyte; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path) -> None:
    make(small_disk / "b")
    before = contents(small_disk)
    with pytest.raises(BundleError, match=r"can't write .*: No space left on device") as caught:
        make(small_disk / "b", more=bytes(2**20))
    assert caught.value.hint == "free some space, or choose another disk"
    with pytest.raises(EdgeslmError, match=r"can't write .*big: No space left on device"):
        atomic_write(small_disk / "big", bytes(2**21))
    with pytest.raises(EdgeslmError, match="No space left"):
        add_reports(open_bundle(small_disk / "b"), {"report.md": bytes(2**20)})
    assert contents(small_disk) == before


def test_full_disk_where_none_can_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is where many file systems first report it."""
    make(tmp_path / "b")
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left on device"):
        make(tmp_path / "b", LICENSE="new")
    with pytest.raises(EdgeslmError, match="No space left on device"):
        atomic_write(tmp_path / "x", "data")
    assert contents(tmp_path) == before


@pytest.fixture
def closed_directory() -> Any:
    """A directory that this process may not write to; root gives its rights away for the test."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "closed").mkdir(mode=0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield folder / "closed"
    if was_root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_no_permission(closed_directory: Path) -> None:
    way_out = "choose a place that you may write to"
    with pytest.raises(BundleError, match=r"can't write .*closed/b: Permission denied") as caught:
        make(closed_directory / "b")
    assert caught.value.hint == way_out
    with pytest.raises(EdgeslmError, match=r"can't write .*closed/a: Permission denied") as again:
        atomic_write(closed_directory / "a", "x")
    assert again.value.hint == way_out
    assert names(closed_directory) == []


def test_no_permission_for_an_old_bundle(closed_directory: Path) -> None:
    """Not even a report gets in, and the bundle stays what it was."""
    root = os.geteuid() != os.getuid()
    if root:
        os.seteuid(0)
    closed_directory.chmod(0o755)
    made = make(closed_directory / "b")
    before = contents(closed_directory)
    for folder in (made.path, closed_directory):
        folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    with pytest.raises(EdgeslmError, match="Permission denied"):
        add_reports(open_bundle(made.path, verify=True), {"report.md": "x"})
    with pytest.raises(BundleError, match="Permission denied"):
        make(made.path, LICENSE="new")
    assert contents(closed_directory) == before


def test_verify_tells_its_progress(tmp_path: Path) -> None:
    from contextlib import contextmanager

    made = make(tmp_path / "b")
    done: list[float] = []

    class Counting(Quiet):
        @contextmanager
        def task(self, name: str, total: float, unit: str = "") -> Any:
            yield done.append
            assert sum(done) == total

    made.verify(Counting())
    assert sum(done) == made.size_bytes
