"""classify and predict as a shell and a parent process meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bundle import write_bundle
from edgeslm.console_predict import Table, classify_text, predict_text
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("onnxruntime")

COMMAND = (sys.executable, "-m", "edgeslm")
FLAT_BYTES = 24 * 2**20
"""What a process may grow by while it reads on and on."""


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.write_classifier(tmp_path_factory.mktemp("text") / "router").path


@pytest.fixture(scope="module")
def bearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"columns": {"time": "t", "unit": "machine"}, "windows": {"max_gap": 1.5, "max_missing": 0.2}}
    manifest = onnx_models.manifest("sensors", data=data)
    files: dict[str, Any] = {"model.onnx": onnx_models.sensor_model()}
    return write_bundle(tmp_path_factory.mktemp("sensors") / "bearing", files=files, manifest=manifest).path


def edgeslm(
    *arguments: str | Path, stdin: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, check=False, cwd=cwd, timeout=120
    )


def answers(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def sensor_rows(count: int, *, seed: int = 0) -> list[str]:
    center, scale = (np.asarray(onnx_models.NORMALIZATION[key]) for key in ("center", "scale"))
    values = center + scale * np.random.default_rng(seed).standard_normal((count, 3))
    return [f"{number},m,{','.join(f'{value:.5f}' for value in row)}" for number, row in enumerate(values)]


HEADER = f"t,machine,{','.join(onnx_models.CHANNELS)}"


# --- one call ---


def test_a_text_a_file_and_a_pipe(router: Path, tmp_path: Path) -> None:
    (tmp_path / "mails.tsv").write_text("id\ttext\na\twin money\nb\tmeeting at noon\n")
    one = answers(edgeslm("classify", router, "win money"))
    assert [answer["text"] for answer in one] == ["win money"]
    table = answers(edgeslm("classify", router, tmp_path / "mails.tsv"))
    assert [answer["id"] for answer in table] == ["a", "b"]
    piped = edgeslm("classify", router, stdin=b"win money\n\nmeeting at noon")
    assert [answer["line"] for answer in answers(piped)] == [1, 3]
    found = [answer["probabilities"] for answer in (one[0], table[0], answers(piped)[0])]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
    assert piped.stderr.startswith(b"2 rows; ")
    assert (piped.returncode, [*found[0]]) == (0, list(onnx_models.LABELS))


def test_rates_and_costs_change_the_answer(router: Path) -> None:
    plain = answers(edgeslm("classify", router, "hello"))[0]
    rare = answers(edgeslm("classify", router, "hello", "--prior", "ham=0.9"))[0]
    assert rare["probabilities"]["ham"] > plain["probabilities"]["ham"]
    never = min(plain["probabilities"], key=plain["probabilities"].get)
    dear = answers(edgeslm("classify", router, "hello", "--cost", f"{never}=1e9"))[0]
    assert dear["label"] == never
    assert dear["probability"] == dear["probabilities"][never]


def test_json_is_one_document(router: Path, bearing: Path) -> None:
    record = json.loads(edgeslm("classify", router, "--json", stdin=b"hello\nnow\n").stdout)
    assert (record["schema"], record["answered"], record["answer"]) == ("edgeslm.classify/1", 2, None)
    assert json.loads(edgeslm("classify", router, "hello", "--json").stdout)["answer"]["text"] == "hello"
    rows = "\n".join([HEADER, *sensor_rows(20)]).encode()
    record = json.loads(edgeslm("predict", bearing, "-", "--json", stdin=rows).stdout)
    assert (record["schema"], record["rows"], record["answered"]) == ("edgeslm.predict/1", 20, 9)


def test_exit_codes(router: Path, tmp_path: Path) -> None:
    """1 only where every row failed: one bad line among good ones is that line's answer."""
    assert edgeslm("classify", router, stdin=b"hello\n\xff\n").returncode == 0
    assert edgeslm("classify", router, stdin=b"").returncode == 0
    done = edgeslm("classify", router, stdin=b"\xff\n\xfe\n")
    assert (done.returncode, len(answers(done))) == (1, 2)
    assert b"2 of them failed (line 1: not UTF-8" in done.stderr


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no file": (("classify", "router", "mails.csv"), "no file 'mails.csv'"),
    "no table": (("predict", "bearing", "nowhere"), "no file 'nowhere'"),
    "no bundle": (("classify", "nowhere", "hello"), "nowhere"),
    "another task": (("classify", "bearing", "hello"), "edgeslm predict"),
    "texts for sensors": (("predict", "router", "-"), "edgeslm classify"),
    "unknown class": (("classify", "router", "hello", "--prior", "spma=0.1"), "'spam'"),
    "both": (("predict", "bearing", "-", "--cost", "failure=2", "--threshold", "0.1"), "threshold"),
    "no rate": (("classify", "router", "hello", "--cost", "spam=dear"), "CLASS=NUMBER"),
    "no threshold": (("predict", "bearing", "-", "--threshold", "0"), "threshold"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_message_and_exit_code_2(
    mistake: str, router: Path, bearing: Path, tmp_path: Path
) -> None:
    arguments, said = MISTAKES[mistake]
    places = {"router": str(router), "bearing": str(bearing)}
    done = edgeslm(*(places.get(one, one) for one in arguments), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


def test_predict_as_a_table_and_as_lines(bearing: Path, tmp_path: Path) -> None:
    rows = [HEADER, *sensor_rows(12)]
    rows[5] = "4,m,high,1,2"
    (tmp_path / "week.csv").write_text("\n".join(rows))
    wishes = ("--threshold", "1e-6", "--hold", "2")
    table = edgeslm("predict", bearing, tmp_path / "week.csv", *wishes)
    lines = table.stdout.decode().splitlines()
    assert lines[0].split() == ["line", "unit", "time", "P(E|D)", "posterior", "held", "alarm"]
    assert lines[2].split() == ["6", "error:", "rms", "holds", "'high',", "not", "a", "number"]
    found = answers(edgeslm("predict", bearing, tmp_path / "week.csv", "--jsonl", *wishes))
    assert [line.split()[0] for line in lines[1:]] == [str(one["line"]) for one in found]
    assert [line.endswith("ALARM") for line in lines[1:]] == [one.get("alarm", False) for one in found]
    assert b"in alarm for " in table.stderr
    assert max(len(line) for line in lines) <= 100


# --- a parent process ---


class Child:
    """A process that is asked a line at a time and must answer before it is asked again."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout

    def tell(self, line: str) -> None:
        self.stdin.write(line.encode() + b"\n")
        self.stdin.flush()

    def hear(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout.readline()))

    def end(self) -> int:
        self.stdin.close()
        self.stdout.close()
        return self.process.wait(60)


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.wait()


@pytest.mark.timeout(60)
def test_a_line_in_is_a_line_out(router: Path, children: list[Child]) -> None:
    """Each answer comes while the pipe stays open; every line has its own, an empty one too."""
    child = Child("classify", router, "--jsonl")
    children.append(child)
    for number, line in enumerate(['{"id": "a", "text": "win"}', "", "nonsense", '"now"', '{"id": 5}'], 1):
        child.tell(line)
        answer = child.hear()
        assert answer["line"] == number
        assert ("error" in answer) == (number in (2, 3, 5))
        assert answer.get("id") == {1: "a", 5: 5}.get(number)
    for number in range(50):  # several at once keep their order
        child.tell(json.dumps({"id": number, "text": "hello " * (1 + number % 7)}))
    assert [child.hear()["id"] for _ in range(50)] == list(range(50))
    assert child.end() == 0


@pytest.mark.timeout(60)
def test_plain_lines_from_a_slow_pipe_are_answered_at_once(router: Path, children: list[Child]) -> None:
    child = Child("classify", router, "-")
    children.append(child)
    for text in ("win money", "meeting at noon"):
        child.tell(text)
        assert child.hear()["text"] == text
    assert child.end() == 0


@pytest.mark.timeout(60)
def test_readings_are_scored_row_by_row(bearing: Path, children: list[Child]) -> None:
    child = Child("predict", bearing, "-", "--jsonl", "--stride", "1")
    children.append(child)
    child.tell(HEADER)
    for number, row in enumerate(sensor_rows(12)):
        child.tell(row)
        if number >= onnx_models.ROWS - 1:
            answer = child.hear()
            assert (answer["line"], answer["unit"], answer["time"]) == (number + 2, "m", number)
    assert child.end() == 0


@pytest.mark.timeout(60)
def test_a_reader_that_leaves_is_no_error(router: Path) -> None:
    line = " ".join([*COMMAND, "classify", str(router), "-"])
    done = subprocess.run(
        ["bash", "-c", f"yes hello | head -n 200000 | {line} | head -n 1"], capture_output=True, check=False
    )
    assert len(done.stdout.splitlines()) == 1
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.timeout(240)
def test_memory_is_flat_and_answers_stream(router: Path, children: list[Child]) -> None:
    """From the 1,000th to the last of 10,000 texts the process grows by next to nothing."""
    child = Child("classify", router, "-", "-t", "2")
    children.append(child)
    random = np.random.default_rng(0)
    words = np.asarray(onnx_models.WORDS[3:])

    def resident() -> int:
        status = Path(f"/proc/{child.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    sizes = []
    for _ in range(10):
        for _ in range(1000):
            child.tell(" ".join(random.choice(words, random.integers(1, 20))))
            child.hear()
        sizes.append(resident())
    assert max(sizes[1:]) - sizes[0] < FLAT_BYTES, sizes
    assert child.end() == 0


# --- text ---


def test_summaries() -> None:
    record: dict[str, Any] = {
        "answered": 9998, "failed": 2, "first_failure": "line 17: no JSON", "truncated": 1,
        "classes": {"ham": 7001, "spam": 2997, "other": 0},
    }  # fmt: skip
    assert classify_text(record) == (
        "10,000 rows, 2 of them failed (line 17: no JSON); 7,001 ham, 2,997 spam; 1 text longer than the model reads"
    )
    watched: dict[str, Any] = {
        "rows": 600, "failed": 0, "answered": 140, "rows_of_window": 32, "left_out": 2, "gaps": 1,
        "decision": {"positive": "failure", "threshold": 0.02},
        "alarms": {"windows": 3, "begun": 1, "first": {"line": 588}}, "classes": {},
    }  # fmt: skip
    assert predict_text(watched) == (
        "600 rows; 140 windows of 32 rows; 2 left out, with too many readings missing; 1 gap; 3 in alarm for failure "
        "(posterior from 2.0 % on), 1 time, first at line 588"
    )
    assert predict_text(watched | {"alarms": None, "classes": {"a": 1}, "gaps": 0, "left_out": 0}).endswith(
        "; 1 a"
    )


def test_a_table_of_several_classes() -> None:
    rows = [
        {"line": 4, "label": "a", "posteriors": {"a": 0.7, "b": 0.2, "c": 0.1}},
        {"line": 6, "left_out": "all"},
    ]
    lines = Table()(rows).decode().splitlines()
    assert [line.split() for line in lines] == [
        ["line", "label", "posterior"], ["4", "a", "0.700000"], ["6", "left", "out:", "all"],
    ]  # fmt: skip
