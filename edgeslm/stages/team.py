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
        return from_main(value)

    def wait(self) -> None:
        """Return when all processes have come here."""
        wait_for_all()

    def leave(self) -> None:
        """Wait for all, then close: a process that ends with connections open may take the others with it."""
        close()


def join(count: int) -> Team | None:
    """The team of so many processes that a launcher started; None for one (torch is not loaded then)."""
    return Team(is_main=is_main()) if count > 1 else None


def processes() -> Any:
    """The processes of `accelerate launch` or torchrun as accelerate's PartialState; a single one without them.

    They join on the first call; those that wait for the main one's other work may wait for a day.
    """
    from datetime import timedelta

    from accelerate import PartialState

    return PartialState(cpu=only_processor(), timeout=timedelta(days=1))


def only_processor() -> bool:
    """Whether there is no accelerator: several processes then talk by gloo, which accelerate must be told."""
    import torch

    return not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())


def is_main() -> bool:
    """Whether this process is the one that writes: always, unless several were launched."""
    return bool(processes().is_main_process)


def wait_for_all() -> None:
    """Return when every process has come here."""
    processes().wait_for_everyone()


def close() -> None:
    """Wait for all, then end the group that they form."""
    wait_for_all()
    processes().destroy_process_group()


def from_main(value: Any) -> Any:
    """The main process's value, in all processes; they must call this together."""
    from accelerate.utils import broadcast_object_list

    if processes().num_processes == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]
