"""Progress of long work: a protocol that every stage takes, silence, and a bar on a terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


class Progress(Protocol):
    """Shows how far a piece of long work has come."""

    def task(
        self, name: str, total: float, unit: str = ""
    ) -> AbstractContextManager[Callable[[float], None]]:
        """A context whose value is called with the amount done since the last call, in `unit` of `total`.

        total: 0 where it is not known.
        """

    def note(self, text: str) -> None:
        """Tell the user one line now, above the bars."""


class Quiet:
    """No output: for libraries, tests and machine-readable runs."""

    @contextmanager
    def task(self, name: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:  # noqa: ARG002
        yield lambda _amount: None

    def note(self, text: str) -> None:
        pass


class Lines:
    """One line a note on standard error, no bars: for logs and pipes."""

    @contextmanager
    def task(self, name: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:  # noqa: ARG002
        yield lambda _amount: None

    def note(self, text: str) -> None:
        sys.stderr.write(text + "\n")


class Bars:
    """rich progress bars on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        done = f"{{task.completed:,.0f}}/{total:,.0f} {unit}" if total else f"{{task.completed:,.0f}} {unit}"
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            *([TaskProgressColumn()] if total else []),
            TextColumn(done),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=total or None)
            yield lambda amount: bars.advance(task, amount)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


def for_terminal() -> Progress:
    """Bars where standard error is a terminal, plain lines elsewhere."""
    return Bars() if sys.stderr.isatty() else Lines()
