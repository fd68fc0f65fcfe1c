"""The processes of one build: `accelerate launch -m edgeslm build ...` starts several, which train together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Team:
    """This process's place among the others; implements edgeslm.work.Team."""

    is_main: bool

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""
        from edgeslm.stages.train import from_main

        return from_main(value)

    def wait(self) -> None:
        """Return when all processes have come here."""
        from edgeslm.stages.train import wait_for_all

        wait_for_all()


def join(processes: int) -> Team | None:
    """The team of so many processes that a launcher started; None for one (torch is not loaded then)."""
    if processes < 2:
        return None
    from edgeslm.stages.train import is_main

    return Team(is_main=is_main())
