"""How much text a recipe's sources hold, as far as their files tell."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

from edgeslm.stages.examples import sources_bytes

if TYPE_CHECKING:
    from pathlib import Path


def test_bytes_of_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("naïve")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000))
    assert sources_bytes(["a.txt", "b.jsonl"], tmp_path) == 6 + 14
    assert sources_bytes([], tmp_path) == 0
    assert sources_bytes(["a.txt", "c.jsonl.gz"], tmp_path) == 0  # packed: its size says little
    assert sources_bytes(["a.txt", "hf://datasets/some/one"], tmp_path) == 0
