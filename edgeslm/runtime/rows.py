"""Rows from a file or a pipe as they come: plain lines, JSONL, or CSV and TSV with a header.

A row that can't be read keeps its line number and says what is wrong; those after it are read all the same.
Nothing is held but the rows of one block of input, and of a cell with line breaks.

Rows come in lists.  An empty one says that no more input waits: whoever asks for the next list then blocks.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import select
import sys
import zlib
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

FORMATS = ("lines", "jsonl", "csv", "tsv")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "lines"}
BLOCK_BYTES = 2**18
"""Input that is read at once; a pipe gives what it holds, up to 64 KiB on Linux."""
CHUNK_ROWS = 256
"""Rows in a list at most."""
LONGEST_LINE = 16 * 2**20
LONGEST_CELL = 2000
"""Lines that a quoted cell may go over; a quote that is open for longer was never closed."""
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row: its line (the first one, from 1), what it holds, and what is wrong with it ("": nothing).

    values: the text of a plain line, or column (JSON key) to value; a JSON string is a text too.
    """

    line: int
    values: dict[str, Any] | str
    error: str = ""


class Line(NamedTuple):
    """One line without its end; None for one that is too long to be held."""

    number: int
    data: bytes | None


class Input(NamedTuple):
    """read(n): up to n bytes, as many as there are; b"" at the end.  ready: whether that would not block."""

    name: str
    read: Callable[[int], bytes]
    ready: Callable[[], bool]


@contextmanager
def open_input(path: Path | None) -> Iterator[Input]:
    """A file (unpacked where its name ends in .gz), or standard input for None.  DataError for no such file."""
    if path is None:
        yield _standard_input()
        return
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else partial(open, buffering=0)
    try:
        opened = opener(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    with opened as file:

        def read(size: int) -> bytes:
            try:
                return bytes(file.read(size))
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path}: can't be read: {error}") from error

        yield Input(str(path), read, lambda: True)


def _standard_input() -> Input:
    """By its descriptor, since Python's own buffer would wait until it is full."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):  # a stream without one
        return Input("standard input", sys.stdin.buffer.read, lambda: True)

    def ready() -> bool:
        try:
            return bool(select.select([descriptor], [], [], 0)[0])
        except (OSError, ValueError):
            return False

    return Input("standard input", lambda size: os.read(descriptor, size), ready)


def format_of(path: Path | None) -> str | None:
    """What a file's name says of its format; None: its first line has to show it."""
    suffixes = [suffix.lower() for suffix in path.suffixes] if path else []
    return SUFFIXES.get(next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), ""))


def read_rows(
    source: Input,
    kind: str | None,
    *,
    columns: Collection[str] = (),
    table: bool = False,
    every: bool = False,
) -> Iterator[list[Row]]:
    """The rows of an input in lists; kind: one of FORMATS, None: as the first line looks.

    columns: which a table must have, and by which a first line is known for a header.  table: what is no
    JSON has a header in any case.  every: an empty line is a row too, and a bad one.
    Raises DataError for a table with another header.
    """
    decoder: _Decoder | None = None
    for lines in numbered_lines(source.read, source.ready):
        if not lines:
            yield []
            continue
        rows: list[Row] = []
        for line in lines:
            if decoder is None:
                if line.data is not None and not line.data.strip() and not every:
                    continue
                found = kind or guess(line.data or b"", columns, table)
                tabular = found in ("csv", "tsv")
                decoder = _Delimited(found, columns, source.name) if tabular else _Single(found, every)
            rows += decoder.take(line)
        yield from _pieces(rows)
    if decoder is not None:
        yield from _pieces(list(decoder.end()))


def guess(first: bytes, columns: Collection[str], table: bool) -> str:
    """The format of an input by its first line: an object, a header (`table`: for sure), or text."""
    text = first.decode("utf-8", errors="replace").strip()
    if text.startswith("{"):
        return "jsonl"
    kind = "tsv" if "\t" in text else "csv"
    cells = {cell.strip().strip('"') for cell in text.split("\t" if kind == "tsv" else _delimiter(text))}
    return kind if table or (len(cells) > 1 and columns and cells.issuperset(columns)) else "lines"


def numbered_lines(read: Callable[[int], bytes], ready: Callable[[], bool]) -> Iterator[list[Line]]:
    """The lines that each block of input completes; an empty list before a read that would block."""
    number, held = 0, 0
    parts: list[bytes] = []
    block = b"\n"
    while block:
        if not ready():
            yield []
        block = read(BLOCK_BYTES)
        *ended, tail = block.split(b"\n") if block else ([b""] if held else []) + [b""]
        lines = []
        for piece in ended:
            number += 1
            held += len(piece)
            data = b"".join((*parts, piece)).removesuffix(b"\r") if held <= LONGEST_LINE else None
            lines.append(Line(number, data.removeprefix(_BOM) if data and number == 1 else data))
            parts, held = [], 0
        held += len(tail)
        parts = [*parts, tail] if held <= LONGEST_LINE else []
        if lines:
            yield lines


def _pieces(rows: list[Row]) -> Iterator[list[Row]]:
    for first in range(0, len(rows), CHUNK_ROWS):
        yield rows[first : first + CHUNK_ROWS]


# --- formats ---


class _Decoder(Protocol):
    """What makes rows of lines."""

    def take(self, line: Line) -> Iterable[Row]:
        """The rows that a line completes."""

    def end(self) -> Iterable[Row]:
        """What is left behind the last line."""


class _Single:
    """One row a line: text or JSON."""

    def __init__(self, kind: str, every: bool) -> None:
        self._parse: Callable[[str], Any] = _json_values if kind == "jsonl" else str
        self._every = every

    def take(self, line: Line) -> list[Row]:
        if line.data is not None and not line.data.strip() and not self._every:
            return []
        try:
            return [Row(line.number, self._parse(_text(line)))]
        except ValueError as error:
            return [Row(line.number, "", str(error))]

    def end(self) -> list[Row]:
        return []


class _Delimited:
    """CSV as RFC 4180 has it, with commas or semicolons; TSV with or without quotes."""

    def __init__(self, kind: str, columns: Collection[str], name: str) -> None:
        self._columns, self._name = columns, name
        self._delimiter = "\t" if kind == "tsv" else ""
        self._names: list[str] = []
        self._open: list[Line] = []
        """Lines of a record whose quotes are not closed yet."""

    def take(self, line: Line) -> list[Row]:
        rows: list[Row] = []
        waiting = deque([line])
        while waiting:
            line = waiting.popleft()
            if not self._open and line.data is not None and not line.data.strip():
                continue
            self._open.append(line)
            if len(self._open) > 1 and line.data is not None and b'"' not in line.data:
                found = None  # it closes no quote
            else:
                found = self._record(self._open)
            if found is None and self._may_go_on(line):
                continue
            if found is None or (isinstance(found, ValueError) and len(self._open) > 1):
                first, *others = self._open
                found = self._record([first], alone=True) or ValueError("a quote is never closed")
                waiting.extendleft(reversed(others))
            rows += self._row(self._open[0].number, found)
            self._open = []
        return rows

    def end(self) -> list[Row]:
        rows: list[Row] = []
        while self._open:
            first, *others = self._open
            self._open = []
            found = self._record([first], alone=True) or ValueError("a quote is never closed")
            rows += self._row(first.number, found)
            for line in others:
                rows += self.take(line)
        return rows

    def _may_go_on(self, line: Line) -> bool:
        """Whether the record whose quote is open may have more lines than those up to this one."""
        held = sum(len(one.data or b"") for one in self._open)
        swallowed = len(self._open) > 1 and self._is_row(line.data or b"")
        return len(self._open) <= LONGEST_CELL and held <= LONGEST_LINE and not swallowed

    def _is_row(self, data: bytes) -> bool:
        """Whether a line of TSV is a row by itself: a quote before it was never meant to swallow it."""
        tabs = self._delimiter == "\t" and data.count(b"\t") == len(self._names) - 1
        return tabs and b'"' not in data

    def _record(self, lines: list[Line], *, alone: bool = False) -> list[str] | ValueError | None:
        """The cells of a record, what is wrong with it, or None for one whose last quote is open.

        alone: it has no other lines.
        """
        try:
            text = "\n".join(_text(line) for line in lines)
            self._delimiter = self._delimiter or _delimiter(text)
            if self._delimiter == "\t" and text.count("\t") == len(self._names) - 1 and len(lines) == 1:
                cells = text.split("\t")  # a quote may be just a character
                opens = cells[-1].startswith('"') and cells[-1].count('"') % 2 == 1
                return None if opens and not alone else [_unquoted(cell) for cell in cells]
            csv.field_size_limit(max(csv.field_size_limit(), 2 * LONGEST_LINE))
            [cells] = csv.reader([text], delimiter=self._delimiter, strict=True)
        except csv.Error as error:
            return None if "end of data" in str(error) else ValueError(f"damaged quotes or cells: {error}")
        except ValueError as error:
            return error
        if self._names and len(cells) != len(self._names):
            return ValueError(f"has {len(cells)} columns, the header {len(self._names)}")
        return cells

    def _row(self, number: int, found: list[str] | ValueError) -> list[Row]:
        """The row of a record; none for the header."""
        if isinstance(found, ValueError):
            if not self._names:
                raise DataError(f"{self._name}: its header can't be read: {found}")
            return [Row(number, "", str(found))]
        if self._names:
            return [Row(number, dict(zip(self._names, found, strict=True)))]
        names = [name.strip() for name in found]
        if double := next((name for name in names if names.count(name) > 1), ""):
            raise DataError(
                f"{self._name}: two columns are called {double!r}", hint="the first line names the columns"
            )
        if missing := [name for name in self._columns if name not in names]:
            raise DataError(
                f"{self._name}: no column {missing[0]!r}", hint=f"its columns are {', '.join(names[:20])}"
            )
        self._names = names
        return []


def _text(line: Line) -> str:
    """A line as text.  Raises ValueError for one that is too long or not UTF-8."""
    if line.data is None:
        raise ValueError(f"is longer than {LONGEST_LINE >> 20} MiB")
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {line.data[error.start]:#04x} at {error.start}") from None


def _json_values(text: str) -> dict[str, Any] | str:
    if not text.strip():
        raise ValueError("is empty")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(found, dict | str):
        raise ValueError(f"holds {type(found).__name__}, not an object")
    return found


def _delimiter(header: str) -> str:
    return ";" if ";" in header and "," not in header else ","


def _unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets put around it; a quote that is only text stays."""
    inner = cell[1:-1]
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell
