"""Machines as they were recorded: trees of /sys, and what programs printed on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

POWER = Path(__file__).parent / "data" / "power"


def plant(root: Path, device: str) -> Path:
    """The /sys of a device below root."""
    for line in (POWER / device / "sysfs.txt").read_text().splitlines():
        path, _, value = line.partition(" ")
        put(root, path, value)
    return root


def put(root: Path, path: str, value: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{value}\n")


class Programs:
    """Runs no program: says what each would print.  asked: the commands, in order."""

    def __init__(self, **printed: str) -> None:
        self.printed: Mapping[str, str] = printed
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, arguments: Sequence[str]) -> str | None:
        self.asked.append(tuple(arguments))
        return self.printed.get(arguments[1] if arguments[0] == "vcgencmd" else arguments[0])
