"""What a training run keeps on disk: its last checkpoint and its best weights, each whole or not at all.

WORK/NAME-checkpoint.pt    weights that change, optimizer, how far it has come, whose it is
WORK/NAME-best.pt          the weights of the lowest held-out loss
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import replacing, writing
from edgeslm.errors import EdgeslmError

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.progress import Progress
    from edgeslm.stages.schedule import Examples


@dataclass(kw_only=True)
class State:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    stopped_early: bool = False


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """The files of one run.  fingerprint: what must be equal for a checkpoint to be of this run."""

    work: Path
    name: str
    fingerprint: str

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.name}-checkpoint.pt"

    @property
    def best(self) -> Path:
        return self.work / f"{self.name}-best.pt"

    def save(self, model: Any, optimizer: Any, state: State, progress: Progress) -> None:
        """Write the checkpoint; a disk that is full costs a warning, not the training."""
        import torch

        kept = {
            "fingerprint": self.fingerprint,
            "state": asdict(state),
            "weights": changing(model),
            "optimizer": optimizer.state_dict(),
        }
        try:
            with writing(self.checkpoint), replacing(self.checkpoint) as beside:
                torch.save(kept, beside)
        except EdgeslmError as error:
            progress.note(f"warning: no checkpoint of step {state.step}: {error}")

    def load(self, model: Any, optimizer: Any, progress: Progress) -> State | None:
        """Put weights and optimizer back and return the state; None without a checkpoint of this run."""
        import torch

        if not self.checkpoint.exists():
            return None
        kept = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if kept["fingerprint"] != self.fingerprint:
            progress.note(f"{self.name}: the checkpoint there is of another training and is not used")
            return None
        _put_back(model, kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
        return State(**kept["state"])

    def save_best(self, model: Any) -> None:
        import torch

        with writing(self.best), replacing(self.best) as beside:
            torch.save(changing(model), beside)

    def restore_best(self, model: Any) -> None:
        import torch

        _put_back(model, torch.load(self.best, map_location="cpu", weights_only=True))


def changing(model: Any) -> dict[str, Any]:
    """What training changes: weights that are not frozen, and buffers."""
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    return trained | dict(model.named_buffers())


def _put_back(model: Any, kept: dict[str, Any]) -> None:
    for name, tensor in changing(model).items():
        tensor.copy_(kept[name])


def fingerprint(model: Any, dataset: Examples, facts: str) -> str:
    """sha256 over the shapes of a model, what of it is trained, three examples, and `facts`."""
    total = hashlib.sha256(facts.encode())
    for name, one in model.named_parameters():
        total.update(f"{name} {tuple(one.shape)} {one.requires_grad}\n".encode())
    count = len(dataset)
    for index in (0, count // 2, count - 1):
        for key, value in sorted(dataset[index].items()):
            total.update(key.encode() + np.asarray(value).tobytes())
    return total.hexdigest()
