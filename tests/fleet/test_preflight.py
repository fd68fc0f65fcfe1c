"""edgeslm.fleet.preflight: what devices report, judged; and what a real one reports."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeslm import __version__
from edgeslm.bundle import Bundle, write_bundle
from edgeslm.fleet import far_facts
from edgeslm.fleet.preflight import READ, RUNTIMES, SYSCTLS, examine, faults, interpreters, judge, signal_name
from edgeslm.fleet.ssh import Connection
from tests.fleet.conftest import Far, interpreter, make_bundle
from tests.onnx_models import text_model, write_classifier

PI4_CPUINFO = "\n".join(
    f"processor\t: {cpu}\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n"
    for cpu in range(4)
)
PI4_FILES = {
    "proc/cpuinfo": PI4_CPUINFO,
    "proc/meminfo": "MemTotal: 3885396 kB\nMemAvailable: 3400000 kB\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
}


def report(**changes: Any) -> dict[str, Any]:
    """What a Raspberry Pi 4 with everything installed says."""
    return {
        "clock_s": 1000.0,
        "system": "Linux",
        "machine": "aarch64",
        "pointer_bits": 64,
        "python": {
            "version": "3.11.2", "executable": "/usr/bin/python3", "path": "/home/pi/venv/bin/python3",
            "edgeslm": True, "edgeslm_version": __version__, "runtime_version": "0.3.36",
        },
        "trial": {"returncode": 0, "error": ""},
        "place": {
            "directory": "/home/pi/edgeslm/tiny", "exists": "/home/pi", "writable": True, "free_bytes": 2**33,
            "missing_bytes": 2**20,
        },
        "files": PI4_FILES,
        "sysctl": {},
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def found(bundle: Bundle, facts: dict[str, Any], *, now: float = 1000.0) -> dict[str, dict[str, str]]:
    """Checks that are not ok, by name."""
    checks = judge(facts, bundle, started_s=now - 0.5, ended_s=now + 0.5)["checks"]
    return {check["check"]: check for check in checks if check["result"] != "ok"}


def test_a_good_device(bundle: Bundle) -> None:
    record = judge(report(), bundle, started_s=999.5, ended_s=1000.5)
    assert {check["result"] for check in record["checks"]} == {"ok"}
    assert record["python"] == "/home/pi/venv/bin/python3"
    assert record["machine"]["cpu_model"] == "Raspberry Pi 4 Model B Rev 1.4 (4 x Cortex-A72)"
    assert record["machine"]["instruction_sets"] == ["neon"]
    assert record["machine"]["memory_bytes"] == 3885396 * 1024
    assert record["machine"]["python"] == "3.11.2"
    assert faults(record["checks"]) is None


@pytest.mark.parametrize(
    ("changes", "check", "result", "words"),
    [
        ({"pointer_bits": 32}, "architecture", "fault", "32-bit program on aarch64"),
        ({"machine": "riscv64"}, "architecture", "fault", "riscv64"),
        ({"python": None, "trial": None}, "python", "fault", "no Python"),
        ({"trial": None}, "runtime", "warning", "not installed"),
        ({"trial": {"returncode": -4, "error": ""}}, "runtime", "fault", "illegal instruction.*Cortex-A72.*has: neon"),
        ({"trial": {"returncode": 132, "error": ""}}, "runtime", "fault", "illegal instruction"),
        ({"trial": {"returncode": -11, "error": ""}}, "runtime", "fault", "killed by SIGSEGV"),
        ({"trial": {"returncode": None, "error": "no answer within 180 s"}}, "runtime", "fault", "no answer"),
        ({"trial": {"returncode": 1, "error": "OSError: libgomp.so.1"}}, "runtime", "fault", "needs libgomp"),
        ({"trial": {"returncode": 1, "error": "ImportError: odd"}}, "runtime", "fault", "not import: ImportError"),
        ({"clock_s": 400.0}, "clock", "warning", "10 min 00 s behind"),
        ({"clock_s": 2000.0}, "clock", "warning", "ahead of this one"),
    ],
)  # fmt: skip
def test_what_stops_and_what_warns(
    bundle: Bundle, changes: dict[str, Any], check: str, result: str, words: str
) -> None:
    import re

    one = found(bundle, report(**changes))[check]
    assert one["result"] == result
    assert re.search(words, one["detail"])
    assert one["hint"]


@pytest.mark.parametrize(
    ("needs", "lacking"), [(["neon"], None), (["neon", "dotprod", "fp16"], "with dotprod, fp16"), ([], None)]
)
def test_wheels_of_another_board_are_refused(bundle: Bundle, needs: list[str], lacking: str | None) -> None:
    """They import, and die of an illegal instruction when they compute."""
    facts = report()
    facts["python"] |= {"runtime_needs": needs}
    checks = found(bundle, facts)
    assert ("runtime" in checks) == bool(lacking)
    if lacking:
        assert checks["runtime"]["result"] == "fault"
        assert lacking in checks["runtime"]["detail"]
        assert "edgeslm wheelhouse" in checks["runtime"]["hint"]


def test_what_wheels_need_is_read_where_they_were_installed(tmp_path: Path) -> None:
    files = [
        {"name": "numpy", "instruction_sets": ["neon"]},
        {"name": "x", "instruction_sets": ["neon", "sve"]},
    ]
    (tmp_path / "wheelhouse.json").write_text(json.dumps({"files": files}))
    (tmp_path / "empty").mkdir()
    for prefix, expected in ((tmp_path, ["neon", "sve"]), (tmp_path / "empty", [])):
        program = f"import sys; sys.prefix = {str(prefix)!r}\n" + far_facts.LOOK % "x"
        told = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(told.removeprefix(far_facts.MARK))["runtime_needs"] == expected


def test_python_is_too_old(bundle: Bundle) -> None:
    facts = report()
    facts["python"] |= {"version": "3.9.2"}
    assert "needs 3.11" in found(bundle, facts)["python"]["detail"]


def test_no_edgeslm_there(bundle: Bundle) -> None:
    facts = report()
    facts["python"] |= {"edgeslm": False}
    record = judge(facts, bundle, started_s=999, ended_s=1001)
    assert record["python"] is None
    assert faults(record["checks"]) is None, "a bundle may be there before its runtime"


def test_another_edgeslm_there(bundle: Bundle) -> None:
    facts = report()
    facts["python"] |= {"edgeslm_version": "0.0.1"}
    assert "0.0.1 there" in found(bundle, facts)["edgeslm"]["detail"]


def test_too_little_memory(bundle: Bundle) -> None:
    total = PI4_FILES | {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 900 kB\n"}
    free = PI4_FILES | {"proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 900 kB\n"}
    assert found(bundle, report(files=total))["memory"]["result"] == "fault"
    assert found(bundle, report(files=free))["memory"]["result"] == "warning"


def test_disk(bundle: Bundle) -> None:
    full = report()["place"] | {"free_bytes": 2**20}
    assert "to come" in found(bundle, report(place=full))["disk"]["detail"]
    closed = report()["place"] | {"writable": False}
    assert found(bundle, report(place=closed))["disk"]["result"] == "fault"


def test_emulation_is_said(bundle: Bundle) -> None:
    files = PI4_FILES | {"sys/devices/system/cpu/modalias": "cpu:type:x86,ven0000fam0006mod004F"}
    assert "speed means nothing" in found(bundle, report(files=files))["architecture"]["detail"]


def test_codebook_types_without_dotprod(tmp_path: Path) -> None:
    manifest = {
        "name": "tiny", "task": "causal-lm", "format": "gguf", "weights": "model.gguf",
        "quantization": {"types": {"IQ4_NL": {}, "Q8_0": {}}},
    }  # fmt: skip
    bundle = write_bundle(tmp_path / "b", files={"model.gguf": b"GGUF"}, manifest=manifest)
    assert found(bundle, report())["instruction sets"]["detail"].startswith("IQ4_NL run")
    with_dotprod = PI4_FILES | {"proc/cpuinfo": PI4_CPUINFO.replace("asimd", "asimd asimddp")}
    assert "instruction sets" not in found(bundle, report(files=with_dotprod))


def test_operators_that_the_engine_there_does_not_know(tmp_path: Path) -> None:
    bundle = write_classifier(tmp_path / "b", "text", data=text_model())
    facts = report()
    facts["python"] |= {"runtime_version": "1.30.0"}
    assert "runtime" not in found(bundle, facts)
    facts["python"] |= {"runtime_version": "1.2.0"}
    assert found(bundle, facts)["runtime"]["result"] == "fault"
    assert "1.2.0 is older than" in found(bundle, facts)["runtime"]["detail"]


def test_an_apple(bundle: Bundle) -> None:
    sysctl = {
        "machdep.cpu.brand_string": "Apple M2", "hw.memsize": str(2**33), "hw.logicalcpu": "8",
        "hw.optional.AdvSIMD": "1", "vm.page_free_count": "200000", "hw.pagesize": "16384",
    }  # fmt: skip
    facts = report(system="Darwin", machine="arm64", files={}, sysctl=sysctl)
    machine = judge(facts, bundle, started_s=999, ended_s=1001)["machine"]
    assert (machine["architecture"], machine["cpu_model"]) == ("aarch64", "Apple M2")


def test_files_that_were_not_asked_for_are_not_written(bundle: Bundle, tmp_path: Path) -> None:
    """A device may answer anything."""
    facts = report(files=PI4_FILES | {"../../../../" + str(tmp_path / "x"): "y", "proc/loadavg": None})
    judge(facts, bundle, started_s=999, ended_s=1001)
    assert not list(tmp_path.iterdir())


def test_interpreters_begin_with_the_bundle_s_own() -> None:
    assert interpreters("/srv/chat")[0] == "/srv/chat/venv/bin/python3"
    assert interpreters("edgeslm/chat")[0] == "~/edgeslm/chat/venv/bin/python3"
    assert interpreters("x")[-1] == "python3"


@pytest.mark.parametrize(
    ("code", "name"), [(0, None), (1, None), (-4, "SIGILL"), (132, "SIGILL"), (-9, "SIGKILL"), (200, None)]
)
def test_signals(code: int, name: str | None) -> None:
    assert signal_name(code) == name


def test_the_program_reports_without_judging(tmp_path: Path) -> None:
    """As any Python runs it: no interpreter found, a directory three levels above the existing one."""
    request = {
        "interpreters": [str(tmp_path / "none")], "wanted": True, "distribution": "x", "trial": "", "read": READ,
        "sysctl": SYSCTLS, "directory": str(tmp_path / "a/b/c"),
        "files": [{"path": "model.gguf", "bytes": 10, "sha256": "0" * 64}],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", str(far_facts.__file__)], input=json.dumps(request) + "\n", text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    facts = json.loads(done.stdout.removeprefix(far_facts.MARK))
    assert facts["python"] is None
    assert facts["place"]["exists"] == str(tmp_path)
    assert facts["place"]["missing_bytes"] == 10
    assert facts["machine"] == platform.machine()


@pytest.mark.parametrize(
    "death", ["os.kill(os.getpid(), signal.SIGILL)", "raise ImportError('libgomp.so.1: gone')"]
)
def test_a_runtime_that_dies_becomes_a_diagnosis(
    far: Far, bundle: Bundle, tmp_path: Path, death: str
) -> None:
    """Over a real connection: the process that tries the import dies, and nothing else."""
    pytest.importorskip("llama_cpp")
    (tmp_path / "llama_cpp.py").write_text(f"import os, signal\n{death}\n")
    root = Path(__file__).resolve().parents[2]
    python = interpreter(tmp_path / "python3", tmp_path, root)
    with Connection("127.0.0.1", far.access()) as connection:
        record = examine(connection, bundle, str(tmp_path / "to"), files=[], python=python)
    checks = {check["check"]: check for check in record["checks"]}
    assert checks["runtime"]["result"] == "fault"
    assert ("illegal instruction" if "SIGILL" in death else "libgomp1") in str(checks["runtime"])
    assert checks["clock"]["result"] == "ok"
    assert record["python"] == python
    assert set(RUNTIMES) == {"gguf", "onnx"}
