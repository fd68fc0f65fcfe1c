"""64-bit Arm for real, without an Arm machine: wheels cross-compiled here, installed offline and run in a Debian root
whose instructions qemu translates, as a Cortex-A72 (no dotprod) and as a Cortex-A76.

As root on Debian:  apt install qemu-user-static debootstrap gcc-aarch64-linux-gnu g++-aarch64-linux-gnu cmake
EDGESLM_ARM64_ROOT: a root made before, which is copied; else debootstrap makes one, in eight minutes of CPU.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.cross_compile import TOOLS, examine
from tests.fleet.conftest import far  # noqa: F401
from tests.onnx_models import write_classifier
from tests.test_device import PI4_CORE, PI5_CORE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgeslm.bundle import Bundle
    from tests.fleet.conftest import Far

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

QEMU = "/usr/bin/qemu-aarch64-static"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ELF_OF_ARM = (
    r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
)
"""Magic and mask; qemu's scripts/qemu-binfmt-conf.sh."""

SUITE = "bookworm"
PACKAGES = "python3,python3-venv"

ENTER = """#!/bin/sh
# Into the root with this system's /proc, /sys and /dev, all of which end with the command, and the processor's own
# cpuinfo: this qemu shows the host's, with which ONNX Runtime's reader crashes.
if [ -z "$INSIDE" ]; then exec env INSIDE=1 unshare --mount -- "$0" "$@"; fi
cpu="${{QEMU_CPU:-cortex-a72}}"
for each in proc sys dev; do mount --rbind "/$each" "{root}/$each" || exit 125; done
mount --bind "{root}/../$cpu" "{root}/proc/cpuinfo" || exit 125
[ $# -gt 0 ] || set -- /bin/sh -c "${{SSH_ORIGINAL_COMMAND:-exit 125}}"
exec chroot "{root}" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 OMP_NUM_THREADS=1 \\
  QEMU_CPU="$cpu" "$@"
"""

CORES = {"cortex-a72": PI4_CORE, "cortex-a76": PI5_CORE}
"""qemu's name of a processor to what Linux says of each of its cores."""

PROMPT = "The capital of France is"
GENERATE = ["--temperature", "0", "-n", "6", "-t", "1", "-c", "64"]
TEXTS = ("win money now", "meeting at noon")
EDGESLM = "/root/edgeslm/venv/bin/edgeslm"


class Root:
    """A Debian for 64-bit Arm in a directory."""

    def __init__(self, path: Path, script: Path) -> None:
        self.path, self.script = path, script
        script.write_text(ENTER.format(root=path))
        script.chmod(0o755)
        for cpu, text in CORES.items():
            cores = [text.format(cpu=core) for core in range(os.cpu_count() or 1)]
            (path.parent / cpu).write_text("\n".join(cores) + "\n")

    def run(
        self, *command: str, cpu: str = "cortex-a72", network: bool = False
    ) -> subprocess.CompletedProcess[str]:
        isolated = [] if network else ["unshare", "--net", "--"]
        return subprocess.run(
            [*isolated, str(self.script), *command], capture_output=True, text=True, check=False, timeout=1500,
            env={**os.environ, "QEMU_CPU": cpu}, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def edgeslm(self, *arguments: str, cpu: str = "cortex-a72", program: str = EDGESLM) -> dict[str, Any]:
        """The record that a command prints."""
        done = self.run(program, *arguments, "--json", cpu=cpu)
        assert done.returncode == 0, done.stderr
        record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return record


def here(*arguments: str) -> dict[str, Any]:
    """The record of the same command on this machine."""
    command = [sys.executable, "-m", "edgeslm", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@contextmanager
def emulated() -> Iterator[None]:
    """Arm programs run here, by a registration that holds in other roots too (flags OCF) and is taken back."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], check=False)
    if (BINFMT / "qemu-aarch64").exists():
        yield
        return
    name = "edgeslm-aarch64"
    try:
        if not (BINFMT / name).exists():
            (BINFMT / "register").write_text(f":{name}:M::{ELF_OF_ARM}:{QEMU}:OCF")
    except OSError as error:
        pytest.skip(f"binfmt_misc can't be used here: {error}")
    try:
        yield
    finally:
        (BINFMT / name).write_text("-1")


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A root, and the program that is still making it while the wheels are compiled."""
    missing = [tool for tool in (*TOOLS, "debootstrap", "unshare", QEMU) if which(tool) is None]
    if platform.system() != "Linux" or os.getuid() != 0 or missing:
        pytest.skip(f"needs root on Linux, and {', '.join(missing) or 'all of its tools'}")
    if platform.machine() == "aarch64":
        pytest.skip("this is an Arm machine")
    with emulated(), tempfile.TemporaryDirectory(prefix="edgeslm-arm64-") as folder:
        root, made = Path(folder) / "root", os.environ.get("EDGESLM_ARM64_ROOT")
        root.mkdir()
        first = f"debootstrap --arch=arm64 --foreign --variant=minbase --include={PACKAGES} {SUITE} {root}"
        second = f"chroot {root} /debootstrap/debootstrap --second-stage"
        command = f"cp -a {made}/. {root}" if made else f"{first} && {second}"
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", command], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            yield root, process
        finally:
            process.kill()
            process.wait()


def wheelhouse(profile: str, out: Path, *arguments: str) -> Path:
    here("wheelhouse", "--for", profile, "--out", str(out), *arguments)
    return out


@pytest.fixture(scope="module")
def plain(growing: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every 64-bit Arm processor, with both engines."""
    return wheelhouse("rpi4-4gb", tmp_path_factory.mktemp("wheels") / "plain")


@pytest.fixture(scope="module")
def dotprod(growing: object, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a Cortex-A76, with the engine of one model."""
    return wheelhouse("rpi5-8gb", tmp_path_factory.mktemp("wheels") / "dotprod", str(smollm2_gguf))


@pytest.fixture(scope="module")
def root(growing: tuple[Path, subprocess.Popen[bytes]], plain: Path, smollm2_gguf: Path) -> Root:
    """The root when it is whole, with wheels and a model in it."""
    path, process = growing
    if process.wait() != 0:
        log = (path.parent / "log").read_text(errors="replace")
        pytest.skip(f"no root could be made: {log.splitlines()[-1] if log else 'no word'}")
    made = Root(path, path.parent / "enter")
    shutil.copytree(plain, path / "wheels" / "plain")
    shutil.copy(smollm2_gguf, path / "model.gguf")
    return made


@pytest.fixture(scope="module")
def installed(root: Root) -> Root:
    """With what install.sh installs, offline, as a Cortex-A72."""
    done = root.run("sh", "/wheels/plain/install.sh")
    assert done.returncode == 0, done.stderr
    assert f"{EDGESLM} doctor" in done.stdout
    return root


@pytest.fixture(scope="module")
def text_bundle(installed: Root, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny classifier, here and as /text in the root."""
    bundle = write_classifier(tmp_path_factory.mktemp("classifier") / "text")
    shutil.copytree(bundle.path, installed.path / "text")
    return bundle


def test_the_wheels_need_no_more_than_they_say(plain: Path, dotprod: Path) -> None:
    for house, expected in ((plain, set()), (dotprod, {"dotprod"})):
        record = json.loads((house / "wheelhouse.json").read_text())
        (compiled,) = (file for file in record["files"] if file["compiled_here"])
        needs = examine(house / compiled["path"])
        assert expected <= set(needs.instruction_sets) <= set(compiled["instruction_sets"])
        assert f"manylinux_2_{needs.glibc}_aarch64" in compiled["path"]
        assert int(record["glibc"].partition(".")[2]) <= 36, "Raspberry Pi OS 12"
        assert not any("torch" in file["name"] for file in record["files"])


def test_dotprod_is_refused_where_it_is_absent(root: Root, dotprod: Path) -> None:
    shutil.copytree(dotprod, root.path / "wheels" / "dotprod", dirs_exist_ok=True)
    done = root.run("sh", "/wheels/dotprod/install.sh", "/root/refused")
    assert done.returncode == 2
    assert "this processor lacks asimd" in done.stderr
    assert not (root.path / "root" / "refused").exists()


def test_doctor(installed: Root) -> None:
    record = installed.edgeslm("doctor")
    imports = {engine["name"]: engine["imports"] for engine in record["engines"]}
    assert imports["llama-cpp-python"]
    assert imports["onnxruntime"]
    assert record["machine"]["architecture"] == "aarch64"
    assert record["machine"]["instruction_sets"] == ["neon"]
    assert record["machine"]["emulated"] is True
    assert any("emulated" in line for line in record["advice"])


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_the_plain_build_says_what_x86_says(installed: Root, smollm2_gguf: Path, cpu: str) -> None:
    expected = here("generate", str(smollm2_gguf), PROMPT, *GENERATE)
    found = installed.edgeslm("generate", "/model.gguf", PROMPT, *GENERATE, cpu=cpu)
    assert found["text"] == expected["text"]
    assert "Paris" in found["text"]


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_a_classifier_decides_as_on_x86(installed: Root, text_bundle: Bundle, cpu: str) -> None:
    for text in TEXTS:
        there = installed.run(EDGESLM, "classify", "/text", text, cpu=cpu)
        assert there.returncode == 0, there.stderr
        command = [sys.executable, "-m", "edgeslm", "classify", str(text_bundle.path), text]
        near = subprocess.run(command, capture_output=True, text=True, check=True)
        one, other = json.loads(there.stdout), json.loads(near.stdout)
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_benchmark_is_marked_as_emulated(installed: Root, text_bundle: Bundle, tiny_gguf: Path) -> None:
    shutil.copy(tiny_gguf, installed.path / "tiny.gguf")
    arguments = ("bench", "/tiny.gguf", "-p", "8", "-n", "4", "-r", "1", "-t", "1")
    record = installed.edgeslm(*arguments)
    assert record["machine"]["emulated"] is True
    assert record["machine"]["architecture"] == "aarch64"
    for run in record["runs"]:
        assert run["valid"] is False
        assert any("translated by software" in reason for reason in run["reasons"])
    (installed.path / "bench.json").write_text(json.dumps(record))
    done = installed.run(EDGESLM, "report", "/bench.json", "--out", "/report")
    assert done.returncode == 0, done.stderr
    report = (installed.path / "report" / "report.md").read_text()
    assert "INVALID" in report
    assert "translated by software" in report


@pytest.fixture(scope="module")
def installed_dotprod(root: Root, dotprod: Path) -> Root:
    """With what needs a Cortex-A76 in /root/a76."""
    shutil.copytree(dotprod, root.path / "wheels" / "dotprod", dirs_exist_ok=True)
    done = root.run("sh", "/wheels/dotprod/install.sh", "/root/a76", cpu="cortex-a76")
    assert done.returncode == 0, done.stderr
    return root


def test_the_dotprod_build_where_it_belongs(installed_dotprod: Root, smollm2_gguf: Path) -> None:
    """As a Cortex-A76 it says what x86 says; started as a Cortex-A72 all the same, it dies."""
    root, program = installed_dotprod, "/root/a76/bin/edgeslm"
    expected = here("generate", str(smollm2_gguf), PROMPT, *GENERATE)
    found = root.edgeslm("generate", "/model.gguf", PROMPT, *GENERATE, cpu="cortex-a76", program=program)
    assert found["text"] == expected["text"]
    wrong = root.run(program, "generate", "/model.gguf", PROMPT, *GENERATE)
    assert wrong.returncode in (-4, 132), wrong.stderr


@pytest.fixture
def ssh(installed: Root, far: Far) -> list[str]:  # noqa: F811
    """Options for sshd on loopback, with a key whose sessions all begin in the root."""
    stranger = (far.folder / "stranger.pub").read_text()
    with (far.folder / "authorized").open("a") as keys:
        keys.write(f'command="{installed.script}" {stranger}')
    access = far.access(key="stranger")
    return [word for option in access.options for word in ("--ssh-option", option)] + ["--ssh-batch"]


def test_deploy_and_bench_over_ssh(ssh: list[str], text_bundle: Bundle, tmp_path: Path) -> None:
    target, out = "127.0.0.1:/root/edgeslm/text", tmp_path / "record.json"
    (host,) = here("deploy", str(text_bundle.path), target, *ssh)["hosts"]
    assert (host["status"], host["error"]) == ("deployed", None)
    assert host["sent_bytes"] > 0
    (again,) = here("deploy", str(text_bundle.path), target, *ssh)["hosts"]
    assert (again["status"], again["sent_bytes"]) == ("already there", 0)
    options = ("--on", target, "-t", "1", "-r", "1", *ssh, "--out", str(out))
    (measured,) = here("bench", str(text_bundle.path), *options)["hosts"]
    assert measured["machine"]["emulated"] is True
    assert json.loads(out.read_text())["valid"] is False


def test_wheels_of_another_board_are_no_runtime(
    installed_dotprod: Root, ssh: list[str], tiny_gguf: Path
) -> None:
    """They import, and are refused before anything is copied."""
    target = ["127.0.0.1:/root/edgeslm/tiny", "--python", "/root/a76/bin/python3"]
    command = [sys.executable, "-m", "edgeslm", "deploy", str(tiny_gguf), *target, *ssh]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "compiled for a processor with dotprod, fp16" in done.stderr
    assert not (installed_dotprod.path / "root" / "edgeslm" / "tiny").exists()
