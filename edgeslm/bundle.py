"""A bundle: the directory that goes to the device, its manifest, and how it is written and checked."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.atomic import (
    assembling,
    atomic_write,
    flush,
    flush_directory,
    left_over,
    way_out,
    write_flushed,
)
from edgeslm.errors import BundleError
from edgeslm.onnx_file import data_file
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeslm.progress import Progress

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
FORMATS = ("gguf", "onnx")
MAX_MANIFEST_BYTES = 2**24
LINK_BYTES = 2**20
"""Files from this size on are hard-linked into a bundle where they can be."""
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle directory, or a bare weights file (manifest None)."""

    path: Path
    weights: Path
    format: str
    manifest: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return self.path.stem if self.manifest is None else str(self.manifest["name"])

    @property
    def is_classifier(self) -> bool:
        """Whether it sorts texts or sensor readings into classes, rather than continue a text."""
        return self.manifest is not None and self.manifest.get("task", "causal-lm") != "causal-lm"

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights, the file that an ONNX graph keeps its data in included."""
        if self.manifest is None:
            return self.weights.stat().st_size
        names = {self.weights.name, data_file(self.weights).name}
        return sum(int(entry["bytes"]) for entry in self.manifest["files"] if entry["path"] in names)

    @cached_property
    def digest(self) -> str:
        """sha256 of what is deployed: of the manifest's list of files, or of the bare file itself."""
        if self.manifest is None:
            return file_sha256(self.weights)
        files = json.dumps(self.manifest["files"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(files.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of the deployed files, without reports."""
        if self.manifest is None:
            return self.weights.stat().st_size
        return sum(int(entry["bytes"]) for entry in self.manifest["files"])

    def verify(self, progress: Progress) -> None:
        """Hash every file; BundleError names the missing and changed ones.  A bare file has no hashes."""
        if self.manifest is None:
            return
        entries = _entries(self.manifest)
        faults = []
        with progress.task("verify", sum(entry["bytes"] for entry in entries), "bytes") as advance:
            for entry in entries:
                fault = _size_fault(self.path, entry)
                if fault is None and file_sha256(self.path / entry["path"], advance) != entry["sha256"]:
                    fault = f"{entry['path']}: sha256 differs from the manifest"
                if fault is not None:
                    faults.append(fault)
        if faults:
            raise _damaged(self.path, faults)


def open_bundle(path: Path | str, *, verify: bool = False, progress: Progress | None = None) -> Bundle:
    """A bundle directory or a bare .gguf file; sizes are always checked, hashes when `verify` asks for it."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode):
            return _open_bare(path, mode)
        manifest = _read_manifest(path)
        faults = [fault for entry in _entries(manifest) if (fault := _size_fault(path, entry))]
    except OSError as error:
        raise BundleError(
            f"{error.filename or path}: {error.strerror or error}", hint=left_over(path)
        ) from error
    if faults:
        raise _damaged(path, faults)
    bundle = Bundle(
        path=path, weights=path / manifest["weights"], format=manifest["format"], manifest=manifest
    )
    if verify:
        bundle.verify(progress or Quiet())
    return bundle


def write_bundle(
    out: Path | str, *, files: Mapping[str, Path | bytes | str], manifest: Mapping[str, Any]
) -> Bundle:
    """Assemble `files` (name inside: source path or content) beside `out` and put them there in one step.

    manifest: everything but schema_version and files, which are filled in here.  A bundle at `out`
    is replaced; anything else there, and files that the old bundle doesn't list, raise BundleError.
    """
    out = Path(out)
    if out.name in ("", ".."):
        raise BundleError(f"{out} is no name for a new directory", hint="name the directory to create")
    try:
        with assembling(out) as beside:
            check_replaceable(out)
            entries = [_place(beside, name, source) for name, source in sorted(files.items())]
            full = {"reports": [], **manifest, "schema_version": SCHEMA_VERSION, "files": entries}
            _check_manifest(full, out)
            write_flushed(beside / MANIFEST_NAME, _to_json(full))
    except OSError as error:
        raise BundleError(f"can't write {out}: {error.strerror or error}", hint=way_out(error)) from error
    return open_bundle(out)


def add_reports(bundle: Bundle, files: Mapping[str, Path | bytes | str]) -> Bundle:
    """Add or replace reports; the digest stays.  If killed, the bundle is whole and lists fewer reports."""
    if bundle.manifest is None:
        raise BundleError(f"{bundle.path} is a bare file; only a bundle directory holds reports")
    taken = {MANIFEST_NAME, *(entry["path"] for entry in bundle.manifest["files"])}
    kept = [entry for entry in bundle.manifest["reports"] if entry["path"] not in files]
    try:
        if len(kept) < len(bundle.manifest["reports"]):
            _write_manifest(bundle.path, {**bundle.manifest, "reports": kept})
        added = []
        for name, source in sorted(files.items()):
            if not _is_inside(name) or "/" in name or name in taken:
                raise BundleError(f"{name!r} can't be the name of a report of {bundle.path}")
            data = source.read_bytes() if isinstance(source, Path) else source
            atomic_write(bundle.path / name, data)
            added.append(_entry(bundle.path, name))
        reports = sorted([*kept, *added], key=lambda entry: str(entry["path"]))
        _write_manifest(bundle.path, {**bundle.manifest, "reports": reports})
    except OSError as error:
        raise BundleError(
            f"can't write reports into {bundle.path}: {error.strerror or error}", hint=way_out(error)
        ) from error
    return open_bundle(bundle.path)


def file_sha256(path: Path | str, advance: Callable[[float], None] | None = None) -> str:
    """Hex digest of a file's content; `advance` is told the bytes done."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    atomic_write(path / MANIFEST_NAME, _to_json(manifest))


def _open_bare(path: Path, mode: int) -> Bundle:
    if not stat.S_ISREG(mode):
        raise BundleError(f"{path} is neither a directory nor a file")
    if path.suffix == ".onnx":
        raise BundleError(
            f"{path} is a bare ONNX file: its labels, tokenizer and preprocessing are in the bundle's manifest",
            hint=f"give the bundle directory{f', {path.resolve().parent}' if _is_bundle(path) else ''}",
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise BundleError(
            f"{path} is neither a bundle directory nor a GGUF file: it begins with {magic!r}",
            hint="make one with: edgeslm quantize MODEL --out FILE.gguf",
        )
    return Bundle(path=path, weights=path, format="gguf", manifest=None)


def _is_bundle(path: Path) -> bool:
    """Whether a file lies in a bundle."""
    return (path.resolve().parent / MANIFEST_NAME).is_file()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST_NAME}",
            hint="make one with: edgeslm quantize MODEL --out DIR, or edgeslm build RECIPE --out DIR",
        )
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} can't be read: {error}", hint="copy the bundle again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{file} does not hold a JSON object")
    _check_manifest(manifest, path)
    return manifest


def _check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """What opening relies on; the rest of the manifest is for people and reports."""
    version = manifest.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: the manifest has schema_version {version!r}; this edgeslm reads {SCHEMA_VERSION}",
            hint="use the edgeslm that made it, or build the bundle again",
        )
    if manifest.get("format") not in FORMATS:
        raise BundleError(f"{path}: the format {manifest.get('format')!r} is none of {', '.join(FORMATS)}")
    if not isinstance(manifest.get("name"), str) or not isinstance(manifest.get("files"), list):
        raise BundleError(f"{path}: the manifest has no name or no files")
    for key in ("model", "quantization", "versions", "recipe", "quality", "decision"):
        if not isinstance(manifest.get(key), dict | None):
            raise BundleError(f"{path}: {key} of the manifest is not an object")
    for key in ("files", "reports"):
        entries = manifest.get(key, [])
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise BundleError(f"{path}: {key} of the manifest is not a list of path, bytes and sha256")
    seen = {MANIFEST_NAME}
    for entry in _entries(manifest):
        name = entry["path"]
        if name in seen or not _is_inside(name):
            raise BundleError(f"{path}: the manifest lists {name!r}, which can't be a file of a bundle")
        seen.add(name)
    weights = manifest.get("weights")
    if not any(entry["path"] == weights for entry in manifest["files"]):
        raise BundleError(f"{path}: the weights {weights!r} are not among the files of the manifest")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
    )


def _is_inside(name: str) -> bool:
    """A relative path of ordinary parts, the same on every system."""
    return all(
        part.strip(". ") and not re.search(r'[\x00-\x1f\x7f\ud800-\udfff\\:*?"<>|]', part)
        for part in name.split("/")
    )


def _entries(manifest: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [*manifest.get("files", []), *manifest.get("reports", [])]


def _size_fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    file = path / entry["path"]
    try:
        status = file.stat()
        if not file.resolve().is_relative_to(path.resolve()):
            return f"{entry['path']} leads out of the bundle"
    except FileNotFoundError:
        return f"{entry['path']} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{entry['path']} is not a file"
    if status.st_size != entry["bytes"]:
        return f"{entry['path']} has {status.st_size} bytes; the manifest says {entry['bytes']}"
    return None


def _damaged(path: Path, faults: Sequence[str]) -> BundleError:
    more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
    return BundleError(
        f"{path}: {'; '.join(faults[:3])}{more}", hint="copy the bundle again, or build it again"
    )


def _place(beside: Path, name: str, source: Path | bytes | str) -> dict[str, Any]:
    """Bring one file into the new directory, flushed, and describe it."""
    if not _is_inside(name) or name == MANIFEST_NAME:
        raise BundleError(f"{name!r} can't be the name of a file of a bundle")
    target = beside / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        _link_or_copy(source.resolve(), target)
        flush(target)
    else:
        write_flushed(target, source)
    flush_directory(target.parent)
    return _entry(beside, name)


def _entry(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    return {"path": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size >= LINK_BYTES:
        # Another file system, or one without links: the copy below serves.
        with suppress(OSError):
            target.hardlink_to(source)
            return
    shutil.copyfile(source, target)


def check_replaceable(out: Path) -> None:
    """Only an empty directory or a bundle with nothing foreign in it may be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise BundleError(f"{out} is not a directory", hint="choose another name for the bundle")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if not present:
        return
    listed = {MANIFEST_NAME, *(entry["path"] for entry in _entries(_read_manifest(out)))}
    if foreign := sorted(present - listed):
        raise BundleError(
            f"{out} holds {foreign[0]}, which is not part of the bundle there",
            hint="move it away, or choose another name for the bundle",
        )
