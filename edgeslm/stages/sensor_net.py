"""The network over windows of sensor readings: recurrent over the rows, or a perceptron where a window is one row.

B batch, S rows of a window, C channels, U units, L classes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgeslm.atomic import atomic_write
from edgeslm.errors import DataError, ModelError, first_line
from edgeslm.stages.checkpoint import read_json
from edgeslm.stages.normalization import Normalization

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.specs import StudentSpec

MODEL_TYPE = "edgeslm-sensor"
NETWORKS = {"gru": nn.GRU, "lstm": nn.LSTM}


@dataclass(frozen=True, kw_only=True)
class SensorConfig:
    """Shape of a network, and what a device must know to feed it: config.json of a directory."""

    network: str
    """gru or lstm; windows of one row have neither."""
    units: int
    layers: int
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    rows: int
    stride: int
    normalization: dict[str, Any] = field(hash=False)
    max_missing: float
    """Share of a window's readings that may be missing."""
    class_shares: dict[str, float] = field(hash=False)
    """Class -> share of the training windows: the base rates that the probabilities hold for."""


class SensorNet(nn.Module):
    """GRU or LSTM forward in time, its last state and mean state through a small perceptron.

    The logits are meant for the base rates of training, however rare a class is.  Nothing is dropped at random
    while it learns, which changed the held-out loss by less than the seed does: so several processes, which
    would draw apart, learn what one does.
    """

    def __init__(self, config: SensorConfig) -> None:
        super().__init__()
        self.config = config
        channels, units = len(config.channels), config.units
        if config.rows == 1:
            sizes = [channels, *[units] * config.layers]
            self.body: nn.Module = nn.Sequential(
                *(part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU()))
            )
        else:
            self.body = NETWORKS[config.network](channels, units, config.layers, batch_first=True)
        features = units if config.rows == 1 else 2 * units
        self.head = nn.Sequential(nn.Linear(features, units), nn.ReLU(), nn.Linear(units, len(config.labels)))

    def forward(self, readings: Tensor) -> Tensor:
        """[B, S, C] normalized readings; returns [B, L] logits."""
        readings = torch.asinh(readings)  # itself near 0, a logarithm beyond: spikes keep their sign and rank
        if self.config.rows == 1:
            return self.head(self.body(readings[:, 0]))  # type: ignore[no-any-return]
        zero = readings.new_zeros(self.config.layers, readings.shape[0], self.config.units)
        states, _last = self.body(readings, zero if self.config.network == "gru" else (zero, zero))
        return self.head(torch.cat([states[:, -1], states.mean(1)], -1))  # type: ignore[no-any-return]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def create(config: SensorConfig, *, seed: int) -> SensorNet:
    """A network with fresh weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SensorNet(config)


def student_net(teacher: SensorNet, student: StudentSpec, *, seed: int = 0) -> SensorNet:
    """A fresh network of the student's shape that reads and says what `teacher` does.

    Raises ModelError for a student that is no network of this kind, or no smaller than its teacher.
    """
    if student.kind not in NETWORKS:
        raise ModelError(
            f"a sensor network can't be distilled into {student.kind!r}",
            hint=f'give [distill.student] kind = "{teacher.config.network}"',
        )
    config = replace(teacher.config, network=student.kind, units=student.units, layers=student.layers)
    net = create(config, seed=seed)
    if net.parameter_count >= teacher.parameter_count:
        raise ModelError(
            f"the student has {net.parameter_count:,} parameters, its teacher {teacher.parameter_count:,}",
            hint="give fewer units or layers",
        )
    return net


def save(net: SensorNet, out: Path, **facts: Any) -> None:
    """Write config.json and model.safetensors into `out`.  facts: more fields of config.json."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "model_type": MODEL_TYPE,
        "architectures": [type(net).__name__],
        **asdict(net.config),
        "parameters": net.parameter_count,
        **facts,
    }
    atomic_write(out / "config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def load(path: Path) -> SensorNet:
    """The network in a directory, in evaluation mode.  Raises ModelError for one that does not fit its config."""
    from safetensors.torch import load_file

    record = read_json(path / "config.json")
    if record.get("model_type") != MODEL_TYPE:
        raise ModelError(f"{path.name}: model_type is {record.get('model_type')!r}, not {MODEL_TYPE!r}")
    try:
        config = SensorConfig(
            network=record["network"],
            units=record["units"],
            layers=record["layers"],
            channels=tuple(record["channels"]),
            labels=tuple(record["labels"]),
            rows=int(record["rows"]),
            stride=int(record["stride"]),
            normalization=Normalization.from_record(record["normalization"]).as_record(),
            max_missing=float(record["max_missing"]),
            class_shares=dict(record["class_shares"]),
        )
        net = SensorNet(config)
        net.load_state_dict(load_file(path / "model.safetensors"))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, DataError) as error:
        raise ModelError(
            f"{path.name}: config.json and model.safetensors do not fit: {first_line(error)}",
            hint="get the model again",
        ) from error
    return net.eval()
