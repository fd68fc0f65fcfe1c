"""Text for a terminal in columns: facts, tables, bullets.  ASCII, wrapped, and safe to print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH = 100
"""Columns that running text is wrapped at."""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names in one column, values in the next; long values wrap under their own start."""
    rows = [(name, clean(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(
        f"{name:{width}}" + f"\n{'':{width}}".join(wrap(value, WIDTH - width)) for name, value in rows
    )


def clean(text: str) -> str:
    """Control characters replaced: the name in an untrusted model must not drive the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def wrap(text: str, width: int) -> list[str]:
    """Break at spaces only: a path or a command stays whole so that it can be copied."""
    import textwrap

    lines: list[str] = []
    for line in text.split("\n"):
        whole = line.replace(" %", "\0%")  # a number keeps its percent sign
        lines += textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False) or [""]
    return [line.replace("\0", " ") for line in lines]


def bullets(heading: str, lines: Iterable[str]) -> str:
    return "\n".join((heading, *("  - " + "\n    ".join(wrap(clean(line), WIDTH - 4)) for line in lines)))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their widest cell; those in `left` start on the left, numbers end on the right."""
    cells = [[clean(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
