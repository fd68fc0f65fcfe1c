"""llama-cpp-python cross-compiled for 64-bit Arm Linux, and what the result really needs.

PyPI has no wheel of it for Arm, and a Raspberry Pi compiles it for half an hour.  Debian's cross compiler makes
one here, outside of pip's cache (pip would take it for this machine's); what comes out is read, not trusted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.atomic import assembling
from edgeslm.errors import EdgeslmError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from edgeslm.progress import Progress

TRIPLET = "aarch64-linux-gnu"
TOOLS = (f"{TRIPLET}-gcc", f"{TRIPLET}-g++", f"{TRIPLET}-readelf", f"{TRIPLET}-objdump", "cmake")
NETWORK = "is the package index reachable from here? pip's own settings hold"
INSTALL = f"sudo apt install gcc-{TRIPLET} g++-{TRIPLET} cmake"

PLAIN = "armv8-a"
EXTENDED = "armv8.2-a"
"""The first edition of the architecture in which the extensions below exist."""
EXTENSIONS = ("fp16", "dotprod", "i8mm", "bf16", "sve", "sve2")
"""Instruction sets beyond the plain architecture; GCC's -march calls them the same."""

FLAGS = (
    "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_C_COMPILER={TRIPLET}-gcc",
    f"-DCMAKE_CXX_COMPILER={TRIPLET}-g++", "-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DLLAVA_BUILD=OFF",
)  # fmt: skip
"""For cmake.  Without OpenMP llama.cpp uses threads of its own, and needs no libgomp on the device."""
SHADOW = "set(LLAMA_BUILD_COMMON OFF)\n"
"""Run by cmake before llama-cpp-python's own file, which sets the cache's variable to ON: the library for
llama.cpp's examples, a third of the work, is not in the wheel."""
FOREIGN = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_TOOLCHAIN_FILE")
"""Variables of the environment that would bring this machine's flags into the build."""

SYSTEM_LIBRARIES = {
    "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1",
    "libstdc++.so.6", "libgcc_s.so.1",
}  # fmt: skip
"""What every Debian has, however small."""

GLIBC_OF_GLIBCXX = {19: 17, 22: 24, 24: 26, 28: 31, 29: 34, 30: 35, 33: 39}
"""N of GLIBCXX_3.4.N to M of glibc 2.M: the oldest distributions that have both; auditwheel's manylinux-policy.json."""

BUILD = "build.json"
"""Beside a compiled wheel: what it needs."""

MNEMONICS = {
    "dotprod": r"\t[su]dot\t",
    "i8mm": r"\t(?:(?:s|u|us)mmla|usdot|sudot)\t",
    "bf16": r"\tbf(?:dot|mmla|mlal[bt]|cvt\w*)\t",
    "fp16": r"\tf(?!cvt|mov)\w+\t[^\n]*\b(?:h\d+|v\d+\.[48]h)\b",
    "sve": r"\tptrue\t|\bz\d+\.[bhsd]\b",
}
"""Instruction set to a pattern of its instructions in objdump's text; Arm Architecture Reference Manual, C4.1."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What compiled files ask of a device.  glibc: minor version of 2.x.  instruction_sets: found in the code."""

    glibc: int
    libraries: tuple[str, ...]
    instruction_sets: tuple[str, ...]


def march(instruction_sets: Collection[str]) -> str:
    """GCC's -march for a processor with `instruction_sets`, named as in a device profile."""
    extra = [name for name in EXTENSIONS if name in instruction_sets]
    return "+".join([EXTENDED if extra else PLAIN, *extra])


def llama_wheel(version: str, instruction_sets: Collection[str], cache: Path, progress: Progress) -> Path:
    """llama-cpp-python `version` as a wheel for aarch64 Linux, from `cache` where it was made before.

    Raises EdgeslmError without the cross compiler, when the build fails, and when its result needs more of
    a device than these instruction sets and a plain Debian.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise EdgeslmError(f"the cross compiler is not complete: no {', '.join(missing)}", hint=INSTALL)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache, progress):
        sdist = _sdist(version, cache, progress)
        architecture = march(instruction_sets)
        recipe = [_sha256(sdist), *FLAGS, SHADOW, run([TOOLS[1], "--version"], "g++")]
        key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
        place = cache / f"{key}-{architecture}"
        if not place.is_dir():
            with tempfile.TemporaryDirectory(prefix="edgeslm-") as folder:
                made = _compile(sdist, architecture, Path(folder), cache / key, progress)
                needs = examine(made)
                _refuse_more_than(instruction_sets, needs)
                tagged = _tag(made, needs, Path(folder))
                with assembling(place) as beside:
                    shutil.copy(tagged, beside)
                    (beside / BUILD).write_text(json.dumps(asdict(needs), indent=2) + "\n", encoding="utf-8")
    (wheel,) = place.glob("*.whl")
    return wheel


def examine(wheel: Path) -> Needs:
    """What the compiled files in a wheel need.  Raises EngineError when one is not for 64-bit Arm."""
    libraries: set[str] = set()
    sets: set[str] = set()
    versions = [17]
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        own = {path.name for path in Path(folder).rglob("*.so*")}
        for path in _elf_files(Path(folder)):
            text = run([f"{TRIPLET}-readelf", "-W", "-h", "-d", "-V", str(path)], "readelf")
            if not re.search(r"Machine:\s+AArch64", text):
                raise EngineError(f"{wheel.name}: {path.name} is not compiled for aarch64", hint=INSTALL)
            libraries |= set(re.findall(r"\(NEEDED\)[^\[]*\[([^\]]+)\]", text))
            versions += glibc_versions(text)
            code = run([f"{TRIPLET}-objdump", "-d", "--no-show-raw-insn", str(path)], "objdump")
            sets |= {name for name, pattern in MNEMONICS.items() if re.search(pattern, code)}
    return Needs(
        glibc=max(versions), libraries=tuple(sorted(libraries - own)), instruction_sets=tuple(sorted(sets))
    )


def glibc_versions(symbols: str) -> Iterator[int]:
    """Minor versions of glibc 2.x that the symbol versions in readelf's text ask for."""
    yield from (int(minor) for minor in re.findall(r"Name: GLIBC_2\.(\d+)", symbols))
    for number in re.findall(r"Name: GLIBCXX_3\.4\.(\d+)", symbols):
        enough = [glibc for cxx, glibc in GLIBC_OF_GLIBCXX.items() if cxx >= int(number)]
        if not enough:
            raise EngineError(
                f"GLIBCXX_3.4.{number} is newer than any manylinux", hint="use an older compiler"
            )
        yield min(enough)


def run(
    command: Sequence[str],
    what: str,
    *,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[str], None] | None = None,
    log: Path | None = None,
    hint: str = "",
) -> str:
    """The output of a program, errors included; `watch` sees each line as it comes, `log` keeps them.

    Raises EdgeslmError with the program's own last word when it fails.  When this process is interrupted,
    the program and all that it started end too.
    """
    settings = [part for name in FOREIGN for part in ("-u", name)]
    settings += [f"{name}={value}" for name, value in (environment or {}).items()]
    lines: list[str] = []
    with ExitStack() as stack:
        file = stack.enter_context(log.open("w", encoding="utf-8")) if log else None
        process = stack.enter_context(
            subprocess.Popen(
                ["env", *settings, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )
        )  # fmt: skip
        try:
            for line in process.stdout or ():
                lines.append(line)
                if file:
                    file.write(line)
                if watch:
                    watch(line)
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code:
        raise EdgeslmError(f"{what} failed: {_last_word(lines)}", hint=f"{log} has it all" if log else hint)
    return "".join(lines)


def _end(process: subprocess.Popen[str]) -> None:
    """End a program and its group: pip tidies up on SIGINT, and ninja ends the compilers that it runs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def pip(*arguments: str) -> list[str]:
    """The command of this interpreter's pip."""
    return [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]


def wheel_tool(folder: Path) -> list[str]:
    """The command of PyPA's `wheel`, installed below `folder`."""
    tools = folder / "tools"
    if not tools.is_dir():
        run(
            pip("install", "--quiet", "--target", str(tools), "wheel>=0.40"), "installing wheel", hint=NETWORK
        )
    return ["env", f"PYTHONPATH={tools}", sys.executable, "-m", "wheel"]


def _last_word(lines: Sequence[str]) -> str:
    """The first error of a compiler, else the last line that tells of any error, else the last line."""
    told = [line.strip() for line in lines if line.strip()]
    first = [line for line in told if re.search(r":\d+: (?:fatal )?error: |^CMake Error", line)][:1]
    errors = [line for line in told if re.search(r"\berror\b", line, re.I)]
    return (first or errors or told or ["it said nothing"])[-1][:300]


def _sdist(version: str, cache: Path, progress: Progress) -> Path:
    """The source of that version; PyPI never changes a file, so it is downloaded once."""
    path = cache / f"llama_cpp_python-{version}.tar.gz"
    if not path.is_file():
        progress.note(f"downloading the source of llama-cpp-python {version}")
        with tempfile.TemporaryDirectory(prefix=".sdist-", dir=cache) as folder:
            name = "llama-cpp-python"
            command = pip(
                "download", "--no-deps", "--no-binary", name, "--dest", folder, f"{name}=={version}"
            )
            run(command, f"downloading {name} {version}", hint=NETWORK)
            (found,) = Path(folder).glob("*.tar.gz")
            found.replace(path)
    return path


def _compile(sdist: Path, architecture: str, folder: Path, workshop: Path, progress: Progress) -> Path:
    """The wheel as it comes out of the build, tagged as this machine's.

    workshop: where sources and objects stay, so that an interrupted build goes on and another processor's
    compiles only what differs.
    """
    source = workshop / "source"
    if not source.is_dir():
        with assembling(source) as beside:
            run(["tar", "-xzf", str(sdist), "-C", str(beside)], f"unpacking {sdist.name}")
    shadow = workshop / "shadow.cmake"
    shadow.write_text(SHADOW, encoding="utf-8")
    progress.note(f"compiling {sdist.name} for {architecture}: some minutes, once")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = (*FLAGS, f"-DGGML_CPU_ARM_ARCH={architecture}", f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={shadow}")
    environment = {
        "CMAKE_ARGS": shlex.join(flags), "CMAKE_BUILD_PARALLEL_LEVEL": str(cores), "TMPDIR": str(folder),
    }  # fmt: skip
    (root,) = source.iterdir()
    command = pip(
        "wheel", "-v", "--no-deps", "--no-cache-dir", f"--config-settings=build-dir={workshop / 'build'}",
        "--wheel-dir", str(folder / "made"), str(root),
    )  # fmt: skip
    log = workshop / f"{architecture}.log"
    with progress.task("compile", 100, "%") as advance:
        done = 0.0

        def watch(line: str) -> None:
            nonlocal done
            if found := re.match(r"\s*\[\s*(\d+)(?:/(\d+)|%)\] ", line):  # ninja's steps, make's per cent
                now = 100 * int(found[1]) / int(found[2] or 100)
                advance(now - done)
                done = now

        run(command, "compiling llama-cpp-python", environment=environment, watch=watch, log=log)
    (made,) = (folder / "made").glob("*.whl")
    return made


@contextmanager
def _locked(cache: Path, progress: Progress) -> Iterator[None]:
    """One build at a time; whoever waits finds what the first one made."""
    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"waiting for another build in {cache}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_more_than(instruction_sets: Collection[str], needs: Needs) -> None:
    """The flags were heeded: no instruction that the device lacks, no library that it may not have."""
    beyond = sorted(set(needs.instruction_sets) - set(instruction_sets))
    if beyond:
        raise EngineError(
            f"the build has instructions of {', '.join(beyond)}, which the device has not",
            hint="is a compiler wrapper adding flags?",
        )
    if libraries := sorted(set(needs.libraries) - SYSTEM_LIBRARIES):
        raise EngineError(f"the build needs {', '.join(libraries)}, which a small system lacks", hint=INSTALL)


def _tag(wheel: Path, needs: Needs, folder: Path) -> Path:
    """A copy that says of itself which systems it runs on."""
    platform = f"manylinux_2_{needs.glibc}_aarch64"
    told = run([*wheel_tool(folder), "tags", "--platform-tag", platform, str(wheel)], "wheel tags")
    return wheel.parent / told.split()[-1]


def _elf_files(folder: Path) -> list[Path]:
    """Compiled files, each once: a wheel holds no links, but copies under several names."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    found.setdefault(_sha256(path), path)
    return [*found.values()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(wheel: Path) -> dict[str, Any]:
    """What was read of a wheel that llama_wheel() made: glibc, libraries, instruction_sets."""
    told: dict[str, Any] = json.loads((wheel.parent / BUILD).read_text(encoding="utf-8"))
    return told
