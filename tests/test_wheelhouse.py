"""Wheelhouses: the command with a compiler and a pip that are fakes, and install.sh on devices of all kinds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgeslm import __version__
from edgeslm.cli import cli
from edgeslm.cross_compile import EXTENSIONS, MNEMONICS, TOOLS, TRIPLET, glibc_versions, march, run
from edgeslm.device import list_devices, load_device
from edgeslm.errors import EdgeslmError, EngineError
from edgeslm.linux_host import INSTRUCTION_SETS
from edgeslm.wheelhouse import SCRIPT, needed_glibc, platforms
from tests.onnx_models import write_classifier

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the cross compiler and install.sh are Linux's"
)

READELF = """
  Machine:                           {machine}
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
 0x0000000000000001 (NEEDED)             Shared library: [libggml.so.0]
 0x0000000000000001 (NEEDED)             Shared library: [{library}]
  0x0010:   Name: GLIBC_2.17  Flags: none  Version: 5
  0x0020:   Name: GLIBC_2.34  Flags: none  Version: 4
  0x0030:   Name: GLIBCXX_3.4.30  Flags: none  Version: 3
"""
OBJDUMP = "  {address}:\t{instruction}\n"

PIP = """
import json, os, re, sys, tarfile, zipfile
from pathlib import Path

arguments = sys.argv[1:]
call = {"pip": arguments, "cmake": os.environ.get("CMAKE_ARGS"), "cflags": os.environ.get("CFLAGS")}
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(call), file=calls)

def wheel(folder, name, members):
    Path(folder).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(Path(folder) / name, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)

def after(option):
    return arguments[arguments.index(option) + 1]

if "--target" in arguments:
    tool = Path(after("--target")) / "wheel"
    tool.mkdir(parents=True)
    (tool / "__main__.py").write_text(Path(__file__).with_name("wheel_tool.py").read_text())
elif arguments[0] == "wheel" and "-v" in arguments:
    print("  [1/2] Building C object one.c.o", flush=True)
    exec(os.environ.get("COMPILE", ""))
    print("  [2/2] Linking", flush=True)
    wheel(after("--wheel-dir"), "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl",
          {"llama_cpp/lib/libggml.so.0": b"\\x7fELF", "llama_cpp/llama.py": b""})
elif arguments[0] == "wheel":
    version = os.environ["OWN_VERSION"]
    pin = "Requires-Dist: click>=8\\nRequires-Dist: llama-cpp-python==0.3.36; extra == 'gguf'\\n"
    wheel(after("--wheel-dir"), f"edgeslm-{version}-py3-none-any.whl", {f"edgeslm-{version}.dist-info/METADATA": pin})
elif "--no-binary" in arguments:
    with tarfile.open(Path(after("--dest")) / "llama_cpp_python-0.3.36.tar.gz", "w:gz") as archive:
        archive.add(__file__, "llama_cpp_python-0.3.36/CMakeLists.txt")
else:
    exec(os.environ.get("DOWNLOAD", ""))
    for each in arguments:
        given = re.sub(r"^edgeslm\\[.*\\] @ file://", "", each)
        if given.endswith(".whl"):
            Path(after("--dest")).mkdir(exist_ok=True)
            (Path(after("--dest")) / Path(given).name).write_bytes(Path(given).read_bytes())
    wheel(after("--dest"), "numpy-2.4.6-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl", {})
    wheel(after("--dest"), "pip-26.3-py3-none-any.whl", {})
"""

WHEEL = """
import shutil, sys
tag, path = sys.argv[3], sys.argv[4]
name = path.replace("linux_x86_64", tag)
shutil.copy(path, name)
print(name.rpartition("/")[2])
"""


class Bench:
    """Fakes on the search paths, and what was asked of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.tools = folder / "tools"
        modules = folder / "modules" / "pip"
        for each in (self.tools, modules):
            each.mkdir(parents=True)
        (modules / "__init__.py").touch()
        (modules / "__main__.py").write_text(PIP)
        (modules / "wheel_tool.py").write_text(WHEEL)
        for tool in TOOLS:
            self.tool(tool, f"{tool} 12.2.0\n")
        self.compiles_to()
        monkeypatch.setenv("PATH", f"{self.tools}:/usr/bin:/bin")
        monkeypatch.setenv("PYTHONPATH", str(folder / "modules"))
        monkeypatch.setenv("CALLS", str(folder / "calls"))
        monkeypatch.setenv("OWN_VERSION", __version__)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setenv("CFLAGS", "-march=native")

    def tool(self, name: str, says: str) -> None:
        (self.folder / f"{name}.txt").write_text(says)
        (self.tools / name).write_text(f"#!/bin/sh\ncat {self.folder / name}.txt\n")
        (self.tools / name).chmod(0o755)

    def compiles_to(
        self, *instructions: str, machine: str = "AArch64", library: str = "libstdc++.so.6"
    ) -> None:
        code = [
            OBJDUMP.format(address=f"{4096 + 4 * i:x}", instruction=each)
            for i, each in enumerate(instructions)
        ]
        self.tool(f"{TRIPLET}-objdump", "".join(code) or "\n")
        self.tool(f"{TRIPLET}-readelf", READELF.format(machine=machine, library=library))

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def compiled(self) -> list[dict[str, Any]]:
        return [call for call in self.calls() if call["pip"][:2] == ["wheel", "-v"]]

    def make(
        self, *arguments: str, profile: str = "rpi4-4gb", out: str = "house", fails: bool = False
    ) -> Any:
        """The record, or the error."""
        command = ["wheelhouse", "--for", profile, "--out", str(self.folder / out), "--json", *arguments]
        done = CliRunner().invoke(cli, command)
        if fails:
            assert isinstance(done.exception, EdgeslmError), done.output
            return done.exception
        assert done.exception is None, done.exception
        return json.loads(done.stdout)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def is_wheelhouse(folder: Path) -> bool:
    """Every hash that it gives is true, and nothing else is there."""
    sums = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    names = {name for _, name in sums} | {"SHA256SUMS", SCRIPT}
    return names == {path.name for path in folder.iterdir()} and all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256 for sha256, name in sums
    )


def test_a_wheelhouse_whole(bench: Bench) -> None:
    record = bench.make()
    house = bench.folder / "house"
    assert is_wheelhouse(house)
    assert record == json.loads((house / "wheelhouse.json").read_text()) | {"path": str(house)}
    assert (record["profile"], record["python"], record["glibc"]) == ("rpi4-4gb", "3.11", "2.35")
    assert (record["instruction_sets"], record["extras"]) == (["neon"], ["gguf", "onnx"])
    needs = {file["name"]: file["instruction_sets"] for file in record["files"]}
    assert needs == {"edgeslm": [], "pip": [], "numpy": ["neon"], "llama-cpp-python": ["neon"]}
    (llama,) = (file for file in record["files"] if file["compiled_here"])
    assert llama["path"] == "llama_cpp_python-0.3.36-py3-none-manylinux_2_35_aarch64.whl"
    (compiled,) = bench.compiled()
    assert "-DGGML_CPU_ARM_ARCH=armv8-a" in compiled["cmake"].split()
    assert "-DGGML_OPENMP=OFF" in compiled["cmake"].split()
    assert compiled["cflags"] is None, "this machine's flags are not the device's"
    assert "--no-cache-dir" in compiled["pip"]
    (shadow,) = re.findall(r"-DCMAKE_PROJECT_llama_cpp_INCLUDE=(\S+)", compiled["cmake"])
    assert "LLAMA_BUILD_COMMON OFF" in Path(shadow).read_text()
    (asked,) = (
        call["pip"] for call in bench.calls() if call["pip"][0] == "download" and "--platform" in call["pip"]
    )
    assert asked[asked.index("--python-version") + 1] == "3.11"
    assert "--only-binary=:all:" in asked
    assert not any("torch" in each or "workstation" in each for each in asked if not each.startswith("/"))


def test_a_second_call_compiles_nothing(bench: Bench) -> None:
    bench.make()
    bench.make(out="other")
    bench.make()
    assert len(bench.compiled()) == 1
    assert sum("--no-binary" in call["pip"] for call in bench.calls()) == 1
    bench.tool(f"{TRIPLET}-g++", "another compiler\n")
    bench.make()
    bench.make(profile="rpi5-8gb", out="pi5")
    assert len(bench.compiled()) == 3, "another compiler, another processor"
    folders = [each for call in bench.compiled() for each in call["pip"] if "build-dir=" in each]
    assert folders[0] != folders[1] == folders[2], "one compiler's objects serve all processors"


def test_a_processor_with_more(bench: Bench) -> None:
    bench.compiles_to("sdot\tv0.4s, v1.16b, v2.16b", "fmla\tv0.8h, v1.8h, v2.8h")
    record = bench.make(profile="rpi5-8gb")
    assert "-DGGML_CPU_ARM_ARCH=armv8.2-a+fp16+dotprod" in bench.compiled()[0]["cmake"]
    assert record["instruction_sets"] == ["neon", "fp16", "dotprod"]
    assert "wanted_features='asimd asimdhp asimddp'" in (bench.folder / "house" / SCRIPT).read_text()


def test_only_what_a_bundle_needs(bench: Bench, tiny_gguf: Path) -> None:
    assert bench.make(str(tiny_gguf), "--serve")["extras"] == ["gguf", "serve"]
    bundle = write_classifier(bench.folder / "text")
    record = bench.make(str(bundle.path), out="onnx")
    assert record["extras"] == ["onnx"]
    assert len(bench.compiled()) == 1, "ONNX Runtime has wheels"
    assert record["glibc"] == "2.27"


def test_another_python(bench: Bench) -> None:
    assert bench.make("--python", "3.12")["python"] == "3.12"
    assert bench.calls()[-1]["pip"][bench.calls()[-1]["pip"].index("--python-version") + 1] == "3.12"


@pytest.mark.parametrize(
    ("profile", "said"),
    [("m1-8gb", "is a Mac"), ("x86-64-laptop", "is x86_64"), ("rpi6", "no device profile")],
)
def test_profiles_without_wheelhouse(bench: Bench, profile: str, said: str) -> None:
    error = bench.make(profile=profile, fails=True)
    assert said in error.message
    assert error.hint
    assert not bench.calls()


def test_no_compiler(bench: Bench) -> None:
    (bench.tools / f"{TRIPLET}-g++").unlink()
    bench.monkeypatch.setenv("PATH", f"{bench.tools}:{bench.folder}")
    (bench.folder / "env").symlink_to("/usr/bin/env")
    error = bench.make(fails=True)
    assert f"{TRIPLET}-g++" in error.message
    assert error.hint == "sudo apt install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu cmake"
    assert not (bench.folder / "house").exists()


def test_something_else_is_not_replaced(bench: Bench) -> None:
    (bench.folder / "house").mkdir()
    bench.make()
    (bench.folder / "mine").mkdir()
    (bench.folder / "mine" / "thesis.tex").touch()
    assert "no wheelhouse" in bench.make(out="mine", fails=True).message
    assert [path.name for path in (bench.folder / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("variable", "code", "said"),
    [
        (
            "COMPILE",
            "print('a.c:7: error: no such thing'); sys.exit('ERROR: x')",
            "a.c:7: error: no such thing",
        ),
        ("DOWNLOAD", "sys.exit('ERROR: No matching distribution found for x')", "No matching distribution"),
    ],
)
def test_a_failure_leaves_the_old_one(bench: Bench, variable: str, code: str, said: str) -> None:
    bench.make(profile="rpi5-8gb")
    before = sorted(bench.folder.iterdir())
    bench.monkeypatch.setenv(variable, code)
    error = bench.make(fails=True)
    assert said in error.message
    assert error.hint
    assert sorted(bench.folder.iterdir()) == before
    assert is_wheelhouse(bench.folder / "house")
    if variable == "COMPILE":
        log = next(word for word in error.hint.split() if word.endswith(".log"))
        assert said in Path(log).read_text()
    bench.monkeypatch.delenv(variable)
    assert bench.make()["profile"] == "rpi4-4gb"


@pytest.mark.parametrize(
    ("compiled", "said"),
    [
        ({"instructions": ["udot\tv0.4s, v1.16b, v2.16b"]}, "instructions of dotprod"),
        ({"machine": "Advanced Micro Devices X86-64"}, "not compiled for aarch64"),
        ({"library": "libgomp.so.1"}, "needs libgomp.so.1"),
    ],
)
def test_a_build_that_asks_for_more_is_refused(bench: Bench, compiled: dict[str, Any], said: str) -> None:
    bench.compiles_to(*compiled.pop("instructions", ()), **compiled)
    assert said in bench.make(fails=True).message
    assert not (bench.folder / "house").exists()
    bench.compiles_to()
    bench.make()
    assert len(bench.compiled()) == 2, "the wrong wheel was not kept"


def test_an_interrupted_compilation_ends(bench: Bench) -> None:
    """Ctrl-C: the compiler's processes end too, exit code 130, and nothing is left behind."""
    marker = bench.folder / "compiler"
    bench.monkeypatch.setenv(
        "COMPILE",
        f"import subprocess, time; child = subprocess.Popen(['sleep', '300']); "
        f"Path({str(marker)!r}).write_text(str(child.pid)); time.sleep(300)",
    )
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from edgeslm.cli import main; main()"
    command = ["wheelhouse", "--for", "rpi4-4gb", "--out", str(bench.folder / "house")]
    process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        if marker.exists() and marker.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in said
    assert not alive(int(marker.read_text()))
    assert not (bench.folder / "house").exists()
    assert not list(bench.folder.glob(".house*"))


def alive(process: int) -> bool:
    """Whether it runs; one that waits for its parent to look does not."""
    for _ in range(50):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True


def test_a_program_that_fails_has_the_last_word() -> None:
    with pytest.raises(EdgeslmError, match=r"^looking failed: ERROR: not there") as caught:
        run(["sh", "-c", "echo ERROR: not there; echo; echo bye; exit 3"], "looking", hint="look again")
    assert caught.value.hint == "look again"
    assert run(["sh", "-c", "echo $CFLAGS$MINE"], "", environment={"MINE": "5"}) == "5\n"


@pytest.mark.parametrize(
    "name", [name for name in list_devices() if load_device(name).architecture == "aarch64"]
)
def test_flags_come_from_the_profile(name: str) -> None:
    sets = load_device(name).instruction_sets
    flags = march(sets).split("+")
    assert flags[0] == ("armv8.2-a" if len(flags) > 1 else "armv8-a")
    assert set(flags[1:]) == set(sets) - {"neon"}


def test_flags_of_the_boards() -> None:
    assert march(load_device("rpi-zero2w").instruction_sets) == "armv8-a"
    assert march(load_device("rpi4-4gb").instruction_sets) == "armv8-a"
    assert march(load_device("rpi5-8gb").instruction_sets) == "armv8.2-a+fp16+dotprod"
    assert set(EXTENSIONS) <= set(INSTRUCTION_SETS)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("sdot\tv0.4s, v1.16b, v2.4b[0]", "dotprod"),
        ("smmla\tv0.4s, v1.16b, v2.16b", "i8mm"),
        ("usdot\tv0.4s, v1.16b, v2.16b", "i8mm"),
        ("bfdot\tv0.4s, v1.8h, v2.8h", "bf16"),
        ("fadd\th0, h1, h2", "fp16"),
        ("fmla\tv0.8h, v1.8h, v2.h[1]", "fp16"),
        ("ld1b\t{z0.b}, p0/z, [x0]", "sve"),
        ("fcvt\ts0, h1", None),
        ("fcvtl\tv0.4s, v1.4h", None),
        ("fcvtn2\tv0.8h, v1.4s", None),
        ("fmla\tv0.4s, v1.4s, v2.4s", None),
        ("smlal\tv0.4s, v1.4h, v2.4h", None),
        ("ldr\th0, [x0]", None),
        ("fmov\td0, x1", None),
        ("bl\t1040 <sdot_of_mine>", None),
    ],
)
def test_instructions_are_told_apart(instruction: str, expected: str | None) -> None:
    text = OBJDUMP.format(address="1040", instruction=instruction)
    assert [name for name, pattern in MNEMONICS.items() if re.search(pattern, text)] == (
        [expected] if expected else []
    )


def test_glibc_of_symbols() -> None:
    assert max(glibc_versions("Name: GLIBC_2.17 \n Name: GLIBC_2.34 ")) == 34
    assert max(glibc_versions("Name: GLIBC_2.17 \n Name: GLIBCXX_3.4.30 \n Name: CXXABI_1.3.13 ")) == 35
    assert max(glibc_versions("Name: GLIBCXX_3.4 \n Name: GLIBCXX_3.4.11 ")) == 17
    with pytest.raises(EngineError, match=r"GLIBCXX_3\.4\.99"):
        list(glibc_versions("Name: GLIBCXX_3.4.99 "))


def test_tags() -> None:
    assert platforms(18) == ["manylinux_2_18_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    names = ["a-1-py3-none-any.whl", "b-1-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl"]
    assert needed_glibc(names) == 27
    assert needed_glibc(names[:1]) == 17


class Board:
    """A device on which install.sh runs: uname and python3 are fakes that tell what it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "board"
        self.folder.mkdir()

    def installs(
        self,
        house: Path,
        *features: str,
        machine: str = "aarch64",
        system: str = "Linux",
        facts: str = "3.11 64 2.36",
    ) -> subprocess.CompletedProcess[str]:
        uname = f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {machine}\n'
        python = (
            f'#!/bin/sh\n[ "$1" = -c ] && {{ echo {facts} {" ".join(features)}; exit; }}\n'
            f'echo "$@" >> {self.folder}/calls\n'
            f'[ "$2" = venv ] && mkdir -p "$4/bin" && cp "$0" "$4/bin/python3" || :\n'
        )
        for name, text in (("uname", uname), ("python3", python)):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        return subprocess.run(
            ["sh", str(house / SCRIPT), str(self.folder / "venv")], capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": f"{self.folder}:/usr/bin:/bin"},
        )  # fmt: skip

    def calls(self) -> str:
        path = self.folder / "calls"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def house(bench: Bench) -> Path:
    """Of a Raspberry Pi 5."""
    bench.make(profile="rpi5-8gb")
    return bench.folder / "house"


PI5 = ("asimd", "asimdhp", "asimddp")


def test_installs_where_it_fits(house: Path, tmp_path: Path) -> None:
    board = Board(tmp_path)
    done = board.installs(house, *PI5)
    assert done.returncode == 0, done.stderr
    assert "edgeslm doctor" in done.stdout
    make, install = board.calls().splitlines()
    assert make == f"-m venv --without-pip {board.folder / 'venv'}"
    assert install.startswith(f"{house}/pip-26.3-py3-none-any.whl/pip install --no-index")
    assert f"--no-index --find-links {house}" in install
    assert install.endswith(f"pip edgeslm[gguf,onnx]=={__version__}")
    assert (board.folder / "venv" / "wheelhouse.json").is_file()


@pytest.mark.parametrize(
    ("features", "facts", "said"),
    [
        (("asimd",), {}, "lacks asimdhp (it has: asimd)"),
        (("asimd", "asimdhp"), {}, "lacks asimddp"),
        (PI5, {"machine": "x86_64"}, "for aarch64, and this is x86_64"),
        (PI5, {"machine": "armv7l"}, "for aarch64, and this is armv7l"),
        (PI5, {"system": "Darwin"}, "for Linux, and this is Darwin"),
        (PI5, {"facts": "3.13 64 2.41"}, "for Python 3.11, and python3 is 3.13"),
        (PI5, {"facts": "3.11 32 2.36"}, "32-bit"),
        (PI5, {"facts": "3.11 64 2.31"}, "need glibc 2.35, and here is 2.31"),
        (PI5, {"facts": "3.11 64 0.0"}, "need glibc 2.35"),
    ],
)
def test_a_mismatch_is_refused_before_anything_is_installed(
    house: Path, tmp_path: Path, features: tuple[str, ...], facts: dict[str, str], said: str
) -> None:
    board = Board(tmp_path)
    done = board.installs(house, *features, **facts)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not board.calls()


def test_a_damaged_wheel_is_refused(house: Path, tmp_path: Path) -> None:
    (wheel,) = house.glob("numpy*.whl")
    wheel.write_bytes(b"half")
    board = Board(tmp_path)
    done = board.installs(house, *PI5)
    assert done.returncode == 2
    assert wheel.name in done.stderr
    wheel.unlink()
    assert board.installs(house, *PI5).returncode == 2
    assert not board.calls()


def test_facts_are_read_from_this_machine(house: Path) -> None:
    """The one Python program in install.sh, on whatever runs this test."""
    (program,) = re.findall(r"-c '\n(.*?)\n'\)", (house / SCRIPT).read_text(), re.S)
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    version, bits, glibc, *_ = done.stdout.split()
    assert version == "{}.{}".format(*sys.version_info)
    assert bits == "64"
    assert re.fullmatch(r"[02]\.\d+", glibc)


def test_an_installation_is_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip unpacked is found again, without what only that installation had."""
    from edgeslm.wheelhouse import pack_installed

    info = tmp_path / "site" / f"edgeslm-{__version__}.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "edgeslm").mkdir()
    (tmp_path / "site" / "edgeslm" / "cli.py").write_text("x = 1\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: edgeslm\nVersion: {__version__}\n")
    (info / "INSTALLER").write_text("pip\n")
    rows = ["edgeslm/cli.py,,", f"{info.name}/METADATA,,", f"{info.name}/INSTALLER,,", f"{info.name}/RECORD,,",
            "edgeslm/__pycache__/cli.cpython-311.pyc,,", "../../bin/edgeslm,,"]  # fmt: skip
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    pack_installed(tmp_path / "out")
    found = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == {"edgeslm/cli.py", f"{info.name}/METADATA"}


def test_the_script_is_shell(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "edgeslm" / SCRIPT
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    assert not re.search(r"\[\[|\blocal\b|<<<|\bfunction\b", script.read_text())
