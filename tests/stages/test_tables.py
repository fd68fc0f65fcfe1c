"""Tables row by row: every format, quoting, what is left out and what is refused."""

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
from edgeslm.progress import Quiet
from edgeslm.stages import tables
from edgeslm.stages.tables import Row, Tally, is_table, read, rows, sources_digest

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    {"text": "one", "label": "a"},
    {"text": "Grüße, \u201cyou\u201d", "label": "b"},
    {"text": 'say "hi"', "label": "a"},
]
CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


class Notes(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def values(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row.values for row in rows(path, **options)]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# --- formats ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".csv", ".tsv"])
def test_every_format_of_text_gives_the_same_rows(tmp_path: Path, suffix: str, packed: bool) -> None:
    if suffix in (".csv", ".tsv"):
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ("text", "label"), delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(ROWS)
        data = buffer.getvalue().encode("utf-8-sig")
    else:
        data = "\n".join(map(json.dumps, ROWS)).encode("utf-8-sig")
    path = tmp_path / (f"a{suffix}.gz" if packed else f"a{suffix}")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert is_table(path)
    first = 1 if "json" in suffix or suffix == ".ndjson" else 2
    assert list(rows(path)) == [Row(row, f"{path.name}:{first + at}") for at, row in enumerate(ROWS)]


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    found = [{"text": str(number), "label": number % 3, "x": number / 4} for number in range(1000)]
    parquet.write_table(Table.from_pylist(found), tmp_path / "a.parquet", row_group_size=300)
    assert values(tmp_path / "a.parquet") == found
    assert next(iter(rows("a.parquet", base=tmp_path))).where == "a.parquet:1"


@pytest.mark.parametrize("data", [b"", b"PAR1", b"text\tlabel\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
        values(tmp_path / "a.parquet")


@pytest.mark.workstation
def test_a_data_set_as_the_hub_s_library_streams_it(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split, found in (("train", ROWS), ("test", ROWS[:1])):
        write(tmp_path / "set" / f"{split}.jsonl", "\n".join(map(json.dumps, found)))
    source = f"hf://datasets/{tmp_path / 'set'}"
    assert is_table(source)
    assert [row.values for row in rows(source)] == ROWS
    assert [row.values for row in rows(f"{source}@default:test")] == ROWS[:1]
    before = sources_digest([source])
    write(tmp_path / "set" / "test.jsonl", json.dumps(ROWS[1]))
    assert sources_digest([source]) != before
    with pytest.raises(DataError, match=r"can't be read: .*no-such-split"):
        list(rows(f"{source}:no-such-split"))


@pytest.mark.workstation
def test_numbered_classes_of_a_hub_s_data_set_get_their_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    (tmp_path / "set").mkdir()
    found = Dataset.from_list([{"text": "x", "label": 1}, {"text": "y", "label": 0}], features=features)
    found.to_parquet(str(tmp_path / "set" / "train.parquet"))
    assert [row.values["label"] for row in rows(f"hf://datasets/{tmp_path / 'set'}")] == ["spam", "ham"]


def test_a_malformed_name_of_a_data_set() -> None:
    with pytest.raises(DataError, match=r"hf://models/x: not a data set"):
        list(rows("hf://models/x"))


@pytest.mark.parametrize("name", ["a.json", "a", "a.xlsx", "a.parquet.gz", "a.gz"])
def test_other_files_are_no_tables(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "text\n1\n")
    assert not is_table(path)
    with pytest.raises(DataError, match="can't be read as a table"):
        values(path)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text at .*a\.csv"):
        values(tmp_path / "a.csv")


# --- CSV and TSV ---


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_csv_reads_what_python_writes(tmp_path_factory: pytest.TempPathFactory, cells: list[Any]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("x", "y"), *cells])
    assert values(path) == [dict(zip("xy", row, strict=True)) for row in cells]


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_tsv_reads_what_python_writes_or_leaves_a_row_out(
    tmp_path_factory: pytest.TempPathFactory, cells: list[Any]
) -> None:
    """Some quoted TSV can't be told from unquoted text; no row may turn into another one for that."""
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([("x", "y"), *cells])
    with_tabs = any("\t" in cell for row in cells for cell in row)
    several_lines = any("\n" in cell for row in cells for cell in row)
    found = values(path, max_bad=1)
    wanted = [dict(zip("xy", row, strict=True)) for row in cells]
    assert found == wanted or (with_tabs and several_lines and all(row in wanted for row in found))


def test_quotes_mean_nothing_in_a_plain_tsv(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tsv", 'label\ttext\nham\t"Hello there\nspam\t5" screens\nham\t"all"\nham\tsaid ""no""\n'
    )
    assert [row["text"] for row in values(path)] == ['"Hello there', '5" screens', "all", 'said ""no""']


def test_a_row_with_wrong_columns_does_not_change_how_a_plain_tsv_is_read(tmp_path: Path) -> None:
    lines = ["label\ttext", "one column", *['ham\t"Hello there', "spam\tWin"] * 10]
    notes = Notes()
    found = values(write(tmp_path / "a.tsv", "\n".join(lines)), progress=notes)
    assert [row["text"] for row in found] == ['"Hello there', "Win"] * 10
    assert notes.lines == ["a.tsv: left out 1 of 21 rows; line 2: has 1 columns, the header 2"]


def test_a_quoted_tsv_with_line_ends_and_tabs_in_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'label\ttext\nham\t"two\nlines"\nspam\t"a\ttab, ""quoted"""\n')
    assert [row["text"] for row in values(path)] == ["two\nlines", 'a\ttab, "quoted"']


def test_a_quote_that_swallows_rows_makes_a_bad_row(tmp_path: Path) -> None:
    lines = ["label\ttext", 'ham\t"two', 'lines"', 'ham\t"open', "spam\tx", 'ham\t"y"', "spam\tz"]
    tally = Tally()
    found = values(write(tmp_path / "a.tsv", "\n".join(lines)), max_bad=1, tally=tally)
    assert {"label": "ham", "text": "two\nlines"} in found
    assert {"label": "spam", "text": "z"} in found
    assert all("\t" not in row["text"] for row in found)
    assert tally.bad == 1
    assert tally.first.startswith("a.tsv:4: ")


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_wrong_columns_are_bad_rows(tmp_path: Path, suffix: str) -> None:
    text = "a,b\n" + "1,2\n" * 30 + "1,2,3\n" + "\n" + "1\n"
    path = tmp_path / f"t{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    notes, tally = Notes(), Tally()
    assert values(path, progress=notes, max_bad=0.1, tally=tally) == [{"a": "1", "b": "2"}] * 30
    assert notes.lines == [f"t{suffix}: left out 2 of 32 rows; line 32: has 3 columns, the header 2"]
    assert tally == Tally(rows=32, bad=2, first=f"t{suffix}:32: has 3 columns, the header 2")
    with pytest.raises(DataError, match="2 of 32 rows can't be used; line 32"):
        values(path, max_bad=0.05)


def test_semicolons_as_spreadsheets_write_them_where_the_comma_is_decimal(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.csv", 'x;y\n1,5;"a;b"\n')) == [{"x": "1,5", "y": "a;b"}]


def test_windows_line_ends(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.tsv", "x\ty\r\n1\t2\r\n")) == [{"x": "1", "y": "2"}]
    assert values(write(tmp_path / "a.csv", "x,y\r\n1,2\r\n")) == [{"x": "1", "y": "2"}]


def test_a_long_field(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert values(write(tmp_path / "a.csv", f'x,y\n"{long}",2\n')) == [{"x": long, "y": "2"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("a,b\n", "holds no rows"),
        ("a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ('a,"b\n1,2\n', "its header can't be read"),
        ('a,b\n1,"2\n', "1 of 1 rows can't be used; line 2: damaged quotes"),
    ],
)
def test_what_no_table_can_be_made_of(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        values(write(tmp_path / "a.csv", text))


def test_rows_that_are_not_utf8(tmp_path: Path) -> None:
    tally = Tally()
    path = tmp_path / "a.csv"
    path.write_bytes(b"x,y\n1,caf\xe9\n1,ok\n")
    assert values(path, max_bad=0.5, tally=tally) == [{"x": "1", "y": "ok"}]
    assert tally.first == "a.csv:2: not UTF-8"
    write(path, "x,y\n1,2\n", "utf-16")
    with pytest.raises(DataError, match="its header can't be read: not UTF-8"):
        values(path)


# --- what all formats share ---


@pytest.mark.parametrize(
    "data", [b"\x1f\x8b\x08damaged", gzip.compress(b"a,b\n1,2\n" * 50)[:-9], b"a,b\n1,2\n"]
)
def test_a_damaged_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.csv\.gz: can't be read: "):
        values(tmp_path / "a.csv.gz")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST_LINE", 2**20)
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' + "[" + "1," * 2**20)
    with pytest.raises(DataError, match="line 2 is longer than 1 MiB"):
        values(path)


def test_a_hopeless_table_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n' * 5000)

    def refuse(_: dict[str, Any]) -> None:
        raise ValueError("no")

    tally = Tally()
    with pytest.raises(DataError, match="1000 of 1000 rows can't be used; line 1: no"):
        list(read(path, refuse, tally=tally, hint="give better rows"))
    assert tally.rows == 1000


def test_a_tally_is_over_all_tables(tmp_path: Path) -> None:
    tally = Tally()
    for name in ("a", "b"):
        values(write(tmp_path / f"{name}.jsonl", '{"x": 1}\n{'), max_bad=0.5, tally=tally)
    assert (tally.rows, tally.bad) == (4, 2)
    assert tally.first.startswith("a.jsonl:2: ")


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"x": 1}\n' + "{\n" * 20)
    stream = rows(path)
    assert next(stream).values == {"x": 1}
    with pytest.raises(DataError, match="20 of 21"):
        next(stream)


def test_the_digest_is_of_contents_and_not_of_places(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.csv", "a,b\n1,2\n")
    assert sources_digest(["a.csv"], base=tmp_path / "x") == sources_digest([tmp_path / "y" / "a.csv"])
