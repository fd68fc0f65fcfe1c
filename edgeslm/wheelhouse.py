"""A directory of wheels from which a device without a network installs edgeslm and its engines.

The engine that PyPI has no wheel of is cross-compiled for the device's processor (cross_compile.py), pip gathers the
rest, and install.sh refuses on the device what does not fit it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm import __version__
from edgeslm.atomic import assembling, way_out
from edgeslm.bundle import file_sha256, open_bundle
from edgeslm.cross_compile import EXTENSIONS, NETWORK, llama_wheel, pip, record_of, run, wheel_tool
from edgeslm.device import list_devices, load_device
from edgeslm.errors import EdgeslmError
from edgeslm.linux_host import INSTRUCTION_SETS
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgeslm.device import Device
    from edgeslm.progress import Progress

OLDEST_GLIBC, GLIBC = 17, 36
"""Minor versions of glibc 2.x: the first with 64-bit Arm, and that of Raspberry Pi OS and Debian 12."""
RECORD = "wheelhouse.json"
SUMS = "SHA256SUMS"
SCRIPT = "install.sh"
BASELINE = ("neon",)
"""What wheels of PyPI for aarch64 may use without asking the processor first."""


def make_wheelhouse(
    profile: str,
    out: Path,
    bundle: Path | None = None,
    *,
    python: str = "3.11",
    serve: bool = False,
    cache: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record edgeslm.wheelhouse/1 of the directory `out`, made whole or not at all.

    bundle: only the engine that this one needs; None: both.  cache: where compiled wheels are kept.
    Raises EdgeslmError: a profile that is no Linux on aarch64, no cross compiler, a failed download or build.
    """
    progress = progress or Quiet()
    device = _target(profile)
    engines = ("gguf", "onnx") if bundle is None else (open_bundle(bundle).format,)
    extras = (*engines, *(("serve",) if serve else ()))
    _check_replaceable(out)
    if find_spec("pip") is None:
        raise EdgeslmError("this Python has no pip", hint=f"{sys.executable} -m ensurepip")
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as name:
        folder = Path(name)
        own = own_wheel(folder, progress)
        compiled: dict[str, dict[str, Any]] = {}
        wheels = [own]
        if "gguf" in engines:
            made = llama_wheel(pinned(own, "llama-cpp-python"), device.instruction_sets, cache, progress)
            compiled[made.name] = record_of(made)
            wheels.append(made)
        gathered = _gather(
            wheels, extras, device=device, python=python, compiled=compiled, folder=folder, progress=progress
        )
        try:
            with assembling(out) as beside:
                _check_replaceable(out)
                for path in gathered:
                    shutil.copy(path, beside)
                record = _record(beside, extras, device=device, python=python, compiled=compiled)
                _write(beside, record)
        except OSError as error:
            raise EdgeslmError(
                f"can't write {out}: {error.strerror or error}", hint=way_out(error)
            ) from error
    return record | {"path": str(out)}


def own_wheel(folder: Path, progress: Progress) -> Path:
    """edgeslm itself: built where this runs from its source tree, else packed again as it is installed."""
    package = Path(__file__).resolve().parent
    source, out = package.parent, folder / "own"
    if not (package / "devices").is_dir():  # which only a wheel has there
        progress.note(f"building edgeslm {__version__} from {source}")
        isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
        run(pip("wheel", "--no-deps", *isolation, "--wheel-dir", str(out), str(source)), "building edgeslm")
    else:
        progress.note(f"packing edgeslm {__version__} as it is installed")
        pack_installed(folder / "unpacked")
        out.mkdir()
        run([*wheel_tool(folder), "pack", str(folder / "unpacked"), "--dest", str(out)], "packing edgeslm")
    (wheel,) = out.glob("*.whl")
    return wheel


def pack_installed(out: Path) -> None:
    """Copy what pip installed of edgeslm, as it lay in its wheel.  Raises EdgeslmError when pip did not."""
    try:
        installed = distribution("edgeslm")
    except PackageNotFoundError:
        raise EdgeslmError("edgeslm is not installed with pip", hint="pip install edgeslm") from None
    of_the_installation = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    for path in installed.files or ():
        if path.parts[0].startswith("edgeslm") and "__pycache__" not in path.parts:
            if path.name in of_the_installation and path.parts[0].endswith(".dist-info"):
                continue
            copy = out / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(installed.locate_file(path)), copy)


def pinned(wheel: Path, name: str) -> str:
    """The version that a wheel's metadata pins a requirement to.  Raises EdgeslmError where it pins none."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        found = re.search(rf"^Requires-Dist: {name}==([^\s;]+)", archive.read(member).decode(), re.M)
    if found is None:
        raise EdgeslmError(f"{wheel.name} pins no version of {name}", hint="install edgeslm again with pip")
    return found[1]


def platforms(newest_glibc: int) -> list[str]:
    """Platform tags of wheels that run with glibc 2.`newest_glibc`, best first (PEP 600)."""
    return [f"manylinux_2_{minor}_aarch64" for minor in range(newest_glibc, OLDEST_GLIBC - 1, -1)] + [
        "manylinux2014_aarch64"
    ]


def needed_glibc(names: Iterable[str]) -> int:
    """Minor version of glibc 2.x that all of these wheels run with, by their tags."""
    tags = [re.findall(r"manylinux_2_(\d+)_aarch64", name) for name in names]
    return max([OLDEST_GLIBC, *(min(map(int, minors)) for minors in tags if minors)])


def _target(profile: str) -> Device:
    device = load_device(profile)
    suited = [each for each in list_devices() if _is_arm_linux(load_device(each))]
    if device.accelerator == "metal":
        raise EdgeslmError(
            f"{device.name} is a Mac, for which nothing is cross-compiled",
            hint="there: pip install 'edgeslm[gguf,onnx]', which compiles for its own processor",
        )
    if not _is_arm_linux(device):
        raise EdgeslmError(
            f"{device.name} is {device.architecture}; wheelhouses are made for aarch64",
            hint=f"there: pip install 'edgeslm[gguf,onnx]'; or one of {', '.join(suited)}",
        )
    return device


def _is_arm_linux(device: Device) -> bool:
    return device.architecture == "aarch64" and device.accelerator != "metal"


def _check_replaceable(out: Path) -> None:
    """`out` is free, an empty directory or an older wheelhouse."""
    if out.is_dir() and (not any(out.iterdir()) or (out / RECORD).is_file()):
        return
    if out.exists():
        raise EdgeslmError(f"{out} is there and is no wheelhouse", hint="name a directory to create")


def _gather(
    wheels: Sequence[Path],
    extras: Sequence[str],
    *,
    device: Device,
    python: str,
    compiled: Mapping[str, Mapping[str, Any]],
    folder: Path,
    progress: Progress,
) -> list[Path]:
    """All wheels that these need on that device, they themselves and pip included."""
    progress.note(f"downloading wheels for Python {python} on aarch64")
    newest = max([GLIBC, *(int(record["glibc"]) for record in compiled.values())])
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    own, *others = wheels
    command = pip(
        "download", "--dest", str(folder / "wheels"), "--only-binary=:all:", "--implementation", "cp",
        "--python-version", python, *(part for tag in platforms(newest) for part in ("--platform", tag)),
        *(("-c", str(constraints)) if constraints.is_file() else ()),
        f"edgeslm[{','.join(extras)}] @ {own.as_uri()}", *map(str, others), "pip",
    )  # fmt: skip
    if device.onnxruntime and "onnx" in extras:
        command.append(f"onnxruntime=={device.onnxruntime}")
    run(command, "downloading wheels", hint=NETWORK)
    return sorted((folder / "wheels").glob("*.whl"))


def _record(
    folder: Path,
    extras: Sequence[str],
    *,
    device: Device,
    python: str,
    compiled: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        tag = path.stem.rpartition("-")[2]
        sets: Sequence[str] = () if tag == "any" else BASELINE
        if path.name in compiled:
            sets = [*BASELINE, *(each for each in EXTENSIONS if each in device.instruction_sets)]
        files.append({
            "path": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path),
            "name": name.replace("_", "-"), "version": version, "compiled_here": path.name in compiled,
            "instruction_sets": list(sets),
        })  # fmt: skip
    needed = {each for file in files for each in file["instruction_sets"]}
    return {
        "schema": "edgeslm.wheelhouse/1",
        "profile": device.name,
        "architecture": device.architecture,
        "python": python,
        "glibc": f"2.{needed_glibc(file['path'] for file in files)}",
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in needed],
        "extras": list(extras),
        "files": files,
    }


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    """The record, the hashes and the script that reads both."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")
    entries = {file["path"]: file["sha256"] for file in record["files"]}
    entries[RECORD] = hashlib.sha256(text.encode()).hexdigest()
    (folder / SUMS).write_text("".join(f"{sha256}  {name}\n" for name, sha256 in entries.items()))
    script = folder / SCRIPT
    script.write_text(_script(record), encoding="utf-8")
    script.chmod(0o755)


def _script(record: Mapping[str, Any]) -> str:
    """install.sh for these wheels: what they need, then what is the same for all."""
    features = [INSTRUCTION_SETS[name][0] for name in record["instruction_sets"]]
    values = {
        "profile": record["profile"],
        "wanted_python": record["python"],
        "wanted_glibc": record["glibc"].partition(".")[2],
        "wanted_features": " ".join(features),
        "requirement": f"edgeslm[{','.join(record['extras'])}]=={__version__}",
    }
    head = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    return "#!/bin/sh\n" + head + Path(__file__).with_name(SCRIPT).read_text(encoding="utf-8")
