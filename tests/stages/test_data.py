"""Documents out of files and packages: formats, what is left out, what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import DataError, ModelError
from edgeslm.progress import Quiet
from edgeslm.stages.data import Document, documents, render, sources_digest, split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}


class Notes(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffLine 1\r\nZeile 2: Grüße\n".encode())
    assert list(documents(["a.txt"], base=tmp_path)) == [Document(text="Line 1\r\nZeile 2: Grüße\n")]


def test_every_kind_of_row(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "a.jsonl",
        {"text": "one", "id": 5},
        "",
        {"prompt": "1+1=", "completion": "2"},
        {"messages": [USER, {**ASSISTANT, "name": "x"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
    )
    chat = Document(messages=(USER, ASSISTANT))
    assert list(documents([source])) == [Document(text="one"), Document(text="1+1=2"), chat, chat]


def test_sources_come_in_order_and_are_streamed(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.md").write_text(name)
    stream = documents(["b.md", "a.md", "missing.md"], base=tmp_path)
    assert [next(stream).text, next(stream).text] == ["b", "a"]
    with pytest.raises(DataError, match=r"missing\.md"):
        next(stream)


@pytest.mark.parametrize(
    "row",
    ["{", "[]", '"text"', "null", {"text": 5}, {"prompt": "a"}, {"messages": []}, {"messages": [{"role": "user"}]},
     {"messages": "hi"}, {"messages": [{"role": "user", "content": None}]}, "[" * 200_000],
)  # fmt: skip
def test_few_bad_rows_are_counted_and_the_first_is_shown(tmp_path: Path, row: Any) -> None:
    notes = Notes()
    source = write_rows(tmp_path / "a.jsonl", {"text": "x"}, row, *[{"text": "y"}] * 18)
    assert len(list(documents([source], progress=notes))) == 19
    assert len(notes.lines) == 1
    assert "a.jsonl: left out 1 of 20 rows; line 2: " in notes.lines[0]


def test_many_bad_rows_are_an_error(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", *[{"text": "x"}] * 17, {"label": 1}, {"label": 2})
    with pytest.raises(DataError, match=r"a\.jsonl: 2 of 19 rows can't be used; line 18: .*label"):
        list(documents([source]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t ", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.parquet", b"PAR1", r"\.parquet can't be read as text"),
        ("a.json", b"[]", r"\.json can't be read as text"),
        ("a.gguf", b"GGUF", r"\.gguf can't be read as text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(documents([name], base=tmp_path))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a file"):
        list(documents([str(tmp_path)]))


def test_the_python_reference_without_importing_it() -> None:
    found = list(documents(["pkg://pydoc_data/topics.py#topics"]))
    from pydoc_data.topics import topics

    assert [document.text for document in found] == list(topics.values())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("other = ['a']", "assigns nothing to texts"),
        ("texts = open('/etc/passwd').read()", "not a plain literal"),
        ("texts = ['a', 5]", "not a dict or list of strings"),
        ("texts = 'a'", "not a dict or list of strings"),
        ("texts = (", "not a plain literal"),
    ],
)
def test_only_literals_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    package = tmp_path / "some_texts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "data.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=message):
        list(documents(["pkg://some_texts/data.py#texts"]))
    with pytest.raises(DataError, match="name the literal"):
        list(documents(["pkg://some_texts/data.py"]))


def test_the_last_assignment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more_texts").mkdir()
    (tmp_path / "more_texts" / "__init__.py").write_text("t: list[str] = ['a']\nt = {'x': 'b', 'y': 'c'}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [d.text for d in documents(["pkg://more_texts/__init__.py#t"])] == ["b", "c"]


def test_split_holds_out_every_nth() -> None:
    found = [Document(text=str(number)) for number in range(10)]
    kept, heldout = split(iter(found), 4)
    assert [document.text for document in heldout] == ["3", "7"]
    assert [document.text for document in kept] == ["0", "1", "2", "4", "5", "6", "8", "9"]
    with pytest.raises(DataError, match="too few"):
        split(found[:3], 4)


def test_render_moves_a_system_message_that_the_template_refuses() -> None:
    def without_system(messages: Sequence[Mapping[str, str]]) -> str:
        if messages[0]["role"] == "system":
            raise ModelError("no system messages")
        return "|".join(f"{message['role']}:{message['content']}" for message in messages)

    system = {"role": "system", "content": "Be brief."}
    chat = Document(messages=(system, USER, ASSISTANT))
    assert render(chat, without_system) == "user:Be brief.\n\nHi|assistant:Hello!"
    assert render(Document(text="plain"), without_system) == "plain"
    with pytest.raises(ModelError):
        render(Document(messages=(system,)), without_system)


def test_the_digest_is_of_contents_and_order(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("a")
        (tmp_path / folder / "b.txt").write_text("b")
    digest = sources_digest(["a.txt", "b.txt"], base=tmp_path / "x")
    assert digest == sources_digest(["a.txt", "b.txt"], base=tmp_path / "y")
    assert digest != sources_digest(["b.txt", "a.txt"], base=tmp_path / "x")
    (tmp_path / "y" / "b.txt").write_text("c")
    assert digest != sources_digest(["a.txt", "b.txt"], base=tmp_path / "y")
