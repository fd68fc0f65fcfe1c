"""Bars on a terminal: with and without a total."""

from __future__ import annotations

import io
from typing import Any

import pytest

from edgeslm import progress


@pytest.mark.parametrize(("total", "shown"), [(2_000.0, "1,000/2,000 bytes"), (0.0, "1,000 bytes")])
def test_how_far_it_is(monkeypatch: pytest.MonkeyPatch, total: float, shown: str) -> None:
    import rich.console

    made: list[Any] = []
    whole = rich.console.Console

    def on_terminal(**options: Any) -> Any:
        made.append(whole(file=io.StringIO(), force_terminal=True, width=120))
        return made[-1]

    monkeypatch.setattr(rich.console, "Console", on_terminal)
    with progress.Bars().task("tokenizing", total, "bytes") as advance:
        advance(1_000)
    text = made[0].file.getvalue()
    assert shown in text
    assert ("50%" in text) == bool(total)
    assert "/0" not in text
