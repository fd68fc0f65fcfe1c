"""Rows as they come: any blocks of input, every format, and bad rows that cost no other row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.errors import DataError
from edgeslm.runtime import rows
from edgeslm.runtime.rows import Input, Row, format_of, guess, numbered_lines, open_input, read_rows

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


def source(*blocks: bytes) -> Input:
    left = list(blocks)
    return Input("the table", lambda _: left.pop(0) if left else b"", lambda: True)


def read(data: bytes, kind: str | None, *, size: int = 7, **options: Any) -> list[Row]:
    blocks = [data[start : start + size] for start in range(0, len(data), size)]
    return [row for some in read_rows(source(*blocks), kind, **options) for row in some]


@given(st.binary(max_size=60).map(lambda data: data.replace(b"\x00", b"\n")), st.integers(1, 9))
def test_lines_are_those_of_the_whole_whatever_the_blocks(data: bytes, size: int) -> None:
    blocks = [data[start : start + size] for start in range(0, len(data), size)]
    found = [line for some in numbered_lines(*source(*blocks)[1:]) for line in some]
    expected = data.split(b"\n")
    expected = expected[:-1] if not expected[-1] else expected
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    stripped = [line.removesuffix(b"\r") for line in expected]
    stripped[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in stripped[:1]]
    assert [line.data for line in found] == stripped


def test_an_empty_list_comes_before_a_read_that_would_wait() -> None:
    """Whoever holds back answers to work ahead learns here that he should not."""
    events, waits = [b"one\ntw", b"o\n", b""], iter([True, False, False])
    reader = Input("pipe", lambda _: events.pop(0), lambda: next(waits))
    found = list(numbered_lines(reader.read, reader.ready))
    assert [[line.data for line in some] for some in found] == [[b"one"], [], [b"two"], []]


def test_a_line_too_long_to_hold_is_told_and_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE", 20)
    found = read(b"short\n" + b"x" * 50 + b"\nlast", "lines")
    assert [(row.line, row.values, bool(row.error)) for row in found] == [
        (1, "short", False), (2, "", True), (3, "last", False),
    ]  # fmt: skip
    assert "longer than" in found[1].error


def test_json_lines() -> None:
    found = read(
        b'{"text": "a", "id": 7}\n\n"b"\n[1]\n{"text"\n\xff\n' + b"[" * 100_000, "jsonl", size=10_000
    )
    assert [(row.line, row.values) for row in found if not row.error] == [
        (1, {"text": "a", "id": 7}),
        (3, "b"),
    ]
    assert [row.line for row in found if row.error] == [4, 5, 6, 7]
    assert [row.line for row in read(b"\n1\n", "jsonl", every=True)] == [1, 2]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8), st.integers(1, 30))
def test_csv_is_what_the_csv_module_wrote(table: list[tuple[str, str]], size: int) -> None:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "text"), *table])
    found = read(written.getvalue().encode(), "csv", size=size)
    assert [(row.values["id"], row.values["text"]) for row in found if isinstance(row.values, dict)] == table
    assert not any(row.error for row in found)


def values(found: list[Row]) -> list[tuple[int, Any]]:
    return [(row.line, row.error or tuple(row.values.values())) for row in found if row.error or row.values]


def test_a_bad_row_of_a_table_costs_no_other() -> None:
    data = (
        b'id,text\n1,a\n2\n3,"b\nb"\n4,\xff\n5,6" pipe\n6,7" pipe\n7,x\n8,"open\n9,y\n10,"z"\n11,"open\n12,w'
    )
    found = values(read(data, "csv"))
    good = [(line, row) for line, row in found if isinstance(row, tuple)]
    assert good == [
        (2, ("1", "a")), (4, ("3", "b\nb")), (7, ("5", '6" pipe')), (8, ("6", '7" pipe')), (9, ("7", "x")),
        (11, ("9", "y")), (12, ("10", "z")), (14, ("12", "w")),
    ]  # fmt: skip
    assert [line for line, row in found if isinstance(row, str)] == [3, 6, 10, 13]


def test_a_quote_that_stays_open_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live table would else wait for its end."""
    monkeypatch.setattr(rows, "LONGEST_CELL", 3)
    lines = [b'id,text\n1,"open\n', *(f"{number},row\n".encode() for number in range(2, 8))]
    seen = [[row.line for row in some] for some in read_rows(source(*lines), "csv")]
    assert [numbers for numbers in seen if numbers] == [[2, 3, 4, 5], [6], [7], [8]]


def test_tsv_with_and_without_quotes() -> None:
    data = b'id\ttext\n1\tsay "hi\n2\t"quoted ""word"""\n3\t"two\nlines"\n4\tend\n'
    assert values(read(data, "tsv")) == [
        (2, ("1", 'say "hi')), (3, ("2", 'quoted "word"')), (4, ("3", "two\nlines")), (6, ("4", "end")),
    ]  # fmt: skip


def test_semicolons_and_a_mark_of_byte_order() -> None:
    assert values(read(b"\xef\xbb\xbfid;text\r\n1;a,b\r\n", None, columns=("text",))) == [(2, ("1", "a,b"))]


@pytest.mark.parametrize(
    ("first", "kind", "table"),
    [
        (b'{"text": 1}', "jsonl", "jsonl"), (b"id,text", "csv", "csv"), (b"id;text", "csv", "csv"),
        (b"text\tid", "tsv", "tsv"), (b"text", "lines", "csv"), (b"Dear Sir, your text", "lines", "csv"),
        (b"\xff", "lines", "csv"),
    ],
)  # fmt: skip
def test_the_first_line_shows_the_format(first: bytes, kind: str, table: str) -> None:
    assert guess(first, ("text",), False) == kind
    assert guess(first, ("text",), True) == table


@pytest.mark.parametrize(
    ("header", "columns", "said"),
    [
        (b"id,label\n", ("text",), "no column 'text'"),
        (b"id,id\n", (), "two columns are called 'id'"),
        (b"\xffid\n", (), "header can't be read"),
        (b'"id\n', (), "header can't be read"),
    ],
)
def test_another_header_is_an_error(header: bytes, columns: Collection[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(header, "csv", columns=columns)


def test_files_packed_or_not(tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(1000))
    plain, packed, cut = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    cut.write_bytes(gzip.compress(data)[:-40])
    found = []
    for path in (plain, packed):
        assert format_of(path) == "jsonl"
        with open_input(path) as opened:
            lists = list(read_rows(opened, format_of(path)))
        assert max(map(len, lists)) <= rows.CHUNK_ROWS
        found.append([row for some in lists for row in some])
    assert found[0] == found[1]
    assert len(found[0]) == 1000
    with pytest.raises(DataError, match="can't be read"), open_input(cut) as opened:
        list(read_rows(opened, "jsonl"))
    with pytest.raises(DataError, match="nowhere"), open_input(tmp_path / "nowhere.csv"):
        pass
    assert [format_of(one) for one in (tmp_path / "x.txt", tmp_path / "mails", None)] == ["lines", None, None]
