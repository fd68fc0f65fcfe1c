"""Documents out of files and packages: formats, what is left out, what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import DataError, ModelError
from edgeslm.progress import Quiet
from edgeslm.recipe import load_recipe
from edgeslm.specs import ScrubSpec
from edgeslm.stages.data import (
    Document,
    calibration_documents,
    documents,
    heldout_documents,
    render,
    split,
    split_stream,
    train_documents,
)
from edgeslm.stages.scrub import Scrubber
from edgeslm.stages.tables import sources_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgeslm.recipe import Recipe

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
    assert list(documents([source])) == [
        Document(text="one"),
        Document(text="1+1=2", prompt="1+1="),
        Document(messages=(USER, ASSISTANT)),
        Document(messages=(USER, ASSISTANT), given=1),
    ]


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_texts_in_columns(tmp_path: Path, suffix: str, separator: str) -> None:
    rows = ["id,body", "1,one", '2,"two', 'lines"', "3,"]
    (tmp_path / f"a{suffix}").write_text("\n".join(row.replace(",", separator) for row in rows))
    found = list(documents([f"a{suffix}"], base=tmp_path, text="body"))
    assert found == [Document(text="one"), Document(text="two\nlines")]
    with pytest.raises(
        DataError, match=rf"a\{suffix}: 3 of 3 rows can't be used; line 2: has neither text, .*'body'"
    ):
        list(documents([f"a{suffix}"], base=tmp_path))


def test_prompts_and_conversations_in_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    rows = [
        {"prompt": "1+1=", "completion": "2", "messages": None},
        {"prompt": None, "completion": None, "messages": [USER, ASSISTANT]},
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(documents(["a.parquet"], base=tmp_path)) == [
        Document(text="1+1=2", prompt="1+1="),
        Document(messages=(USER, ASSISTANT)),
    ]


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
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.txt.gz", b"", r"\.gz can't be read as text"),
        ("a.csv", b"", "holds no rows"),
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


@pytest.mark.parametrize("count", [4, 10, 12])
def test_a_stream_is_split_alike(count: int) -> None:
    found = [Document(text=str(number)) for number in range(count)]
    kept, heldout = split(found, 4)
    assert list(split_stream(iter(found), 4, "train")) == kept
    assert list(split_stream(iter(found), 4, "heldout")) == heldout


@pytest.mark.parametrize("keep", ["train", "heldout"])
def test_a_stream_that_is_too_short_to_split(keep: Any) -> None:
    with pytest.raises(DataError, match="3 documents are too few to hold out every 4th"):
        list(split_stream([Document(text="x")] * 3, 4, keep))


def test_a_split_stream_reads_no_further_than_it_gives() -> None:
    def endless() -> Iterator[Document]:
        yield from (Document(text=str(number)) for number in range(3))
        raise AssertionError("read too far")

    stream = split_stream(endless(), 2, "train")
    assert [next(stream).text, next(stream).text] == ["0", "2"]


def recipe(tmp_path: Path, **data: Any) -> Recipe:
    """A recipe of which only the data matter; three files of six documents each."""
    for name in ("train", "other", "held"):
        write_rows(tmp_path / f"{name}.jsonl", *({"text": f"{name} {number}"} for number in range(6)))
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in data.items())
    (tmp_path / "recipe.toml").write_text(
        f'name = "x"\ntask = "causal-lm"\nmodel = "m"\n[data]\n{lines}\n', encoding="utf-8"
    )
    return load_recipe(tmp_path / "recipe.toml")


def texts(found: Iterable[Document]) -> list[str]:
    return [str(document.text) for document in found]


def six(name: str, *without: int) -> list[str]:
    return [f"{name} {number}" for number in range(6) if number not in without]


def test_calibration_data_alone_are_divided(tmp_path: Path) -> None:
    made = recipe(tmp_path, calibration=["other.jsonl"], heldout_every=3)
    assert texts(calibration_documents(made, Quiet())) == six("other", 2, 5)
    assert texts(heldout_documents(made, Quiet())) == ["other 2", "other 5"]


def test_training_data_are_calibrated_on_where_nothing_else_is_named(tmp_path: Path) -> None:
    made = recipe(tmp_path, train=["train.jsonl"], heldout_every=3)
    assert texts(train_documents(made, Quiet())) == six("train", 2, 5)
    assert texts(calibration_documents(made, Quiet())) == six("train", 2, 5)
    assert texts(heldout_documents(made, Quiet())) == ["train 2", "train 5"]


def test_training_data_are_divided_and_calibration_data_are_not(tmp_path: Path) -> None:
    made = recipe(tmp_path, train=["train.jsonl"], calibration=["other.jsonl"], heldout_every=3)
    assert texts(train_documents(made, Quiet())) == six("train", 2, 5)
    assert texts(calibration_documents(made, Quiet())) == six("other")
    assert texts(heldout_documents(made, Quiet())) == ["train 2", "train 5"]


def test_heldout_data_of_their_own(tmp_path: Path) -> None:
    made = recipe(tmp_path, train=["train.jsonl"], heldout=["held.jsonl"])
    assert texts(train_documents(made, Quiet())) == six("train")
    assert texts(calibration_documents(made, Quiet())) == six("train")
    assert texts(heldout_documents(made, Quiet())) == six("held")


def test_a_recipe_s_documents_are_scrubbed(tmp_path: Path) -> None:
    made = recipe(tmp_path, train=["train.jsonl"], heldout=["held.jsonl"])
    scrubber = Scrubber(ScrubSpec(), ["train", "held"])
    assert texts(train_documents(made, Quiet(), scrubber))[:2] == ["[NAME] 0", "[NAME] 1"]
    assert texts(calibration_documents(made, Quiet(), scrubber))[0] == "[NAME] 0"
    assert texts(heldout_documents(made, Quiet(), scrubber))[0] == "[NAME] 0"


def test_more_bad_rows_where_a_recipe_allows_them(tmp_path: Path) -> None:
    made = recipe(tmp_path, train=["bad.jsonl"], max_bad_rows=0.5)
    write_rows(tmp_path / "bad.jsonl", {"text": "x"}, "{")
    assert texts(train_documents(made, Quiet())) == ["x"]
    with pytest.raises(DataError, match="1 of 2 rows"):
        list(train_documents(recipe(tmp_path, train=["bad.jsonl"]), Quiet()))


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
