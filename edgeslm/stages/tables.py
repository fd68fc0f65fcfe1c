"""Rows of tables, streamed: JSONL, CSV, TSV, Parquet and data sets of a hub.

A source is a path, pkg://package/path, or hf://datasets/NAME[@CONFIG][:SPLIT], which the library
`datasets` streams.  JSONL, CSV and TSV may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from edgeslm.bundle import file_sha256
from edgeslm.errors import DataError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.checkpoint import package_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Numbered = Iterator[tuple[int, "dict[str, Any] | ValueError"]]

T = TypeVar("T")

HUB = re.compile(r"hf://datasets/(?P<name>[^@:]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?")
MOST_BAD_ROWS = 0.05
"""Share of a table's rows that may be unusable; beyond it the table is taken for the wrong one."""
HOPELESS_ROWS = 1000
"""A table whose first so many rows are all unusable is not read to its end."""
LONGEST_LINE = 64 * 2**20
PROBED_LINES = 1000
BATCH_ROWS = 256


class Row(NamedTuple):
    """One row: column (or JSON key) to value, and its place as FILE:LINE."""

    values: dict[str, Any]
    where: str


@dataclass
class Tally:
    """How many rows were read, over all tables that it was given to, and how many could not be used."""

    rows: int = 0
    bad: int = 0
    first: str = ""
    """FILE:LINE of the first bad row, and what is wrong with it."""


def is_table(source: str | Path) -> bool:
    """Whether a source is a table by its suffix, or a data set of a hub."""
    return is_hub(source) or _format(Path(source)) in READERS


def is_hub(source: str | Path) -> bool:
    return str(source).startswith("hf://")


def rows(
    source: str | Path,
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    max_bad: float = MOST_BAD_ROWS,
    tally: Tally | None = None,
) -> Iterator[Row]:
    """The rows of one table.  CSV and TSV have a header and their values are strings.

    A row that can't be read (wrong columns, damaged JSON, not UTF-8) is left out, counted, and the first
    is shown.  Raises DataError for a missing or empty table and when more than the share `max_bad` is bad.
    """
    found = read(source, dict, base=base, progress=progress, max_bad=max_bad, tally=tally)
    return (Row(values, where) for values, where in found)


def read(
    source: str | Path,
    convert: Callable[[dict[str, Any]], T],
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    max_bad: float = MOST_BAD_ROWS,
    tally: Tally | None = None,
    hint: str = "",
) -> Iterator[tuple[T, str]]:
    """(convert(row), FILE:LINE) of each row of one table; as `rows` otherwise.

    convert: raises ValueError, saying what is wrong, for a row that can't be used; such rows count as bad.
    hint: what a row should hold.
    """
    name, numbered = _open(source, base or Path())
    short = name.rpartition("/")[2]
    total, bad, first = 0, 0, ""
    tally = tally if tally is not None else Tally()
    for number, found in numbered:
        total += 1
        tally.rows += 1
        try:
            if isinstance(found, ValueError):
                raise found
            result = convert(found)
        except ValueError as error:
            bad += 1
            tally.bad += 1
            first = first or f"line {number}: {error}"
            tally.first = tally.first or f"{short}:{number}: {error}"
            if bad == total == HOPELESS_ROWS and max_bad < 1:
                break
        else:
            yield result, f"{short}:{number}"
    if total == 0:
        raise DataError(f"{name}: holds no rows", hint=hint)
    if bad > max_bad * total:
        raise DataError(f"{name}: {bad} of {total} rows can't be used; {first}", hint=hint)
    if bad:
        (progress or Quiet()).note(f"{short}: left out {bad} of {total} rows; {first}")


def locate(source: str | Path, base: Path) -> tuple[Path, str]:
    """The file that a source names, and the name after '#' of a pkg:// source ("" without one)."""
    if str(source).startswith("pkg://"):
        where, _, name = str(source).partition("#")
        path = package_path(where)
    else:
        path, name = base / Path(source).expanduser(), ""
    if not path.exists():
        raise DataError(
            f"no text at {path}",
            hint="a relative path starts from the recipe's folder, or from here without a recipe",
        )
    if not path.is_file():
        raise DataError(f"{path}: not a file", hint="name the files in it")
    return path, name


def sources_digest(sources: Sequence[str | Path], *, base: Path | None = None) -> str:
    """sha256 over the contents of all sources, in order; where they lie does not matter.

    A hub's data set stands for its commit.
    """
    total = hashlib.sha256()
    for source in sources:
        if is_hub(source):
            total.update(f"{source}\0{_hub_commit(source)}\n".encode())
        else:
            path, name = locate(source, base or Path())
            total.update(f"{path.suffix.lower()}\0{name}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def _open(source: str | Path, base: Path) -> tuple[str, Numbered]:
    """What messages call the table, and its rows with their line numbers."""
    if is_hub(source):
        return str(source), _hub_rows(str(source))
    path, _ = locate(source, base)
    reader = READERS.get(_format(path))
    if reader is None:
        raise DataError(
            f"{path}: {''.join(path.suffixes[-2:]) or 'a file without a suffix'} can't be read as a table",
            hint=f"use {', '.join(READERS)}; all but .parquet may be gzipped",
        )
    return str(path), reader(path)


def _format(path: Path) -> str:
    """The suffix that decides how a file is read: .csv of a.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if suffixes[-2:-1] and suffixes[-2] != ".parquet" else ".gz"
    return suffixes[-1] if suffixes else ""


# --- lines ---


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked where its name says so."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    raise DataError(
                        f"{path}: line {number} is longer than {LONGEST_LINE >> 20} MiB",
                        hint="one row a line",
                    )
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error


def _json_lines(path: Path) -> Numbered:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield number, _json_object(line)
            except ValueError as error:
                yield number, error


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"holds {type(row).__name__}, not an object")
    return row


# --- CSV and TSV ---


def _delimited(path: Path) -> Numbered:
    """CSV as RFC 4180 has it, or with semicolons; TSV with or without quotes."""
    tabs = _format(path) == ".tsv"
    records = _plain_records(path) if tabs and _is_plain(path) else _quoted_records(path, tabs=tabs)
    _, header = next(records, (0, None))
    if header is None:
        return
    if isinstance(header, ValueError) or _not_utf8(header):
        raise DataError(f"{path}: its header can't be read: {_not_utf8(header) or header}")
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two columns are called {double!r}", hint="the first line names the columns")
    for number, cells in records:
        if isinstance(cells, ValueError):
            yield number, cells
        elif problem := _not_utf8(cells):
            yield number, ValueError(problem)
        elif len(cells) != len(names):
            yield number, ValueError(f"has {len(cells)} columns, the header {len(names)}")
        else:
            yield number, dict(zip(names, cells, strict=True))


def _text_lines(path: Path) -> Iterator[str]:
    """Lines as text; bytes that are not UTF-8 become surrogates, for `_not_utf8` to find."""
    return (line.decode("utf-8", errors="surrogateescape") for line in _lines(path))


def _not_utf8(cells: Iterable[str] | ValueError) -> str:
    if isinstance(cells, ValueError) or all(cell.isascii() for cell in cells):
        return ""
    return "not UTF-8" if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell) else ""


def _is_plain(path: Path) -> bool:
    """Whether a TSV is one record a line, as IANA's text/tab-separated-values: a quote means nothing then.

    They mean something when the header has them, or a line that has not as many tabs as the header.
    """
    lines = islice(_lines(path), PROBED_LINES)
    header = next(lines, b"")
    return b'"' not in header and not any(
        b'"' in line and line.count(b"\t") != header.count(b"\t") for line in lines
    )


def _plain_records(path: Path) -> Iterator[tuple[int, list[str] | ValueError]]:
    for number, line in enumerate(_text_lines(path), 1):
        if line.strip():
            yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets put around it; a quote that is only text stays."""
    inner = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _quoted_records(path: Path, *, tabs: bool) -> Iterator[tuple[int, list[str] | ValueError]]:
    """A record may go over several lines within quotes.  A quote that is never closed makes a bad row.

    In a TSV that is also a quote which swallows whole rows.
    """
    taken: list[str] = []

    def remembered() -> Iterator[str]:
        for line in _text_lines(path):
            taken.append(line)
            yield line

    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    first = next(_text_lines(path), "")
    delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
    reader = csv.reader(remembered(), delimiter=delimiter, strict=True)
    width, start = 0, 1
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield start, ValueError(f"damaged quotes or cells: {error}")
        else:
            if cells is None:
                return
            width = width or len(cells)
            if tabs and width > 1 and any(_is_whole_row(line, width) for line in taken[1:-1]):
                yield start, ValueError(f"a quote that goes over {len(taken)} lines, whole rows among them")
            elif cells:
                yield start, cells
        start = reader.line_num + 1


def _is_whole_row(line: str, width: int) -> bool:
    return line.count("\t") == width - 1 and '"' not in line


# --- Parquet and hubs ---


def _parquet(path: Path) -> Numbered:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        with ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {error}") from error


def _hub_rows(source: str) -> Numbered:
    name, config, split = _hub_parts(source)
    with _hub_errors(source):
        from datasets import load_dataset

        found = load_dataset(name, config, split=split, streaming=True)
        features = (found.features or {}).items()
        classes = {column: feature.int2str for column, feature in features if hasattr(feature, "int2str")}
        for number, values in enumerate(found, 1):
            for column, label in classes.items():
                if isinstance(values.get(column), int) and values[column] >= 0:
                    values[column] = label(values[column])
            yield number, dict(values)


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    match = HUB.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source}: not a data set of a hub", hint="write hf://datasets/OWNER/NAME[@CONFIG][:SPLIT]"
        )
    return match["name"], match["config"], match["split"] or "train"


def _hub_commit(source: str | Path) -> str:
    """The commit that a data set of a hub is at; for a local folder, which `datasets` reads alike, its contents."""
    name, *_ = _hub_parts(str(source))
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        return " ".join(file_sha256(path) for path in files)
    with _hub_errors(str(source)):
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(name).sha)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"{source}: reading it needs {error.name}", hint="pip install datasets") from error
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # whatever the library and the network raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source}: can't be read: {message}", hint="check the name, the split and the network"
        ) from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".parquet": _parquet,
}
