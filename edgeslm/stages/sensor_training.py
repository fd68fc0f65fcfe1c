"""A network for sensor windows, trained from scratch: no model to start from is needed.

B windows of a batch, S rows, C channels, L classes.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import assembling, atomic_write, writing
from edgeslm.errors import RecipeError
from edgeslm.stages.checkpoint import Checkpoint, model_directory
from edgeslm.stages.saving import ANCESTRY_FILE, ANCESTRY_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import FinetuneSpec
    from edgeslm.stages.sensors import SensorWindows

LAYERS = 1
SMALL = 100_000
"""Parameters below which a step is over before a second thread has begun."""
HEAVIEST = 20.0
"""A rare class's windows count so many times those of the most frequent at most."""
EVALUATED_AT_ONCE = 1024


def run(
    spec: FinetuneSpec,
    out: Path,
    *,
    train: SensorWindows,
    heldout: SensorWindows,
    work: Path,
    seed: int,
    progress: Progress | None = None,
) -> Checkpoint:
    """Train a network of `spec.network` and `spec.units` on windows and write the directory `out`.

    out: config.json (with all that a device needs: channels, rows, stride, normalization, labels, class
    shares), model.safetensors, training.json, edgeslm.json.  Raises RecipeError for a method that needs a
    model to start from, DataError without windows, EdgeslmError when `out` can't be written.
    """
    from edgeslm.stages import sensor_net
    from edgeslm.stages.team import is_main, wait_for_all
    from edgeslm.stages.train import train as train_network

    if spec.method != "full":
        raise RecipeError(
            f'method = "{spec.method}" needs a model to start from, and sensor tables have none',
            hint='give [finetune] method = "full"',
        )
    net = sensor_net.create(config_of(spec, train), seed=seed)
    weight = class_weights(np.bincount(train.label, minlength=len(train.labels)))
    with suited_threads(net):
        record = train_network(
            net,
            train,
            collate,
            spec.train,
            work,
            loss=weighted_loss(weight),
            counted=lambda batch: len(batch["labels"]),
            evaluate=lambda model: log_loss(predict(model, heldout), heldout.label),
            seed=seed,
            progress=progress,
            name="finetune",
        )
    if is_main():
        write(net, out, stage="finetune", spec=spec, training=record)
    wait_for_all()
    return model_directory(out, "sensor tables")


@contextmanager
def suited_threads(net: Any) -> Iterator[None]:
    """One thread for products that cost more to share than to compute; torch's own number otherwise."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1 if net.parameter_count < SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write(net: Any, out: Path, *, stage: str, spec: FinetuneSpec, training: dict[str, Any]) -> None:
    """The directory `out`, whole or not at all."""
    from edgeslm.stages import sensor_net

    ancestry = {
        "schema": ANCESTRY_SCHEMA,
        "stage": stage,
        "parent": None,
        "spec": asdict(spec),
        "before": None,
    }
    with writing(out), assembling(out) as beside:
        sensor_net.save(net, beside)
        for name, value in (("training.json", training), (ANCESTRY_FILE, ancestry)):
            atomic_write(beside / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def config_of(spec: FinetuneSpec, train: SensorWindows) -> Any:
    """The SensorConfig of a network for these windows."""
    from edgeslm.stages.sensor_net import SensorConfig
    from edgeslm.stages.sensors import stride_of

    return SensorConfig(
        network=spec.network,
        units=spec.units,
        layers=LAYERS,
        channels=train.normalization.channels,
        labels=train.labels,
        rows=train.spec.rows,
        stride=stride_of(train.spec),
        normalization=train.normalization.as_record(),
        max_missing=train.spec.max_missing,
        class_shares={name: count / len(train) for name, count in train.classes.items()},
    )


def class_weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[L] weight of an example of each class: as if all were equally frequent; mean 1 over the examples.

    counts: [L] examples of each class, all above 0.
    """
    weight = np.minimum(counts.max() / counts, HEAVIEST)
    return np.asarray(weight * counts.sum() / (weight * counts).sum())


def weighted_loss(weight: NDArray[np.float64]) -> Any:
    """The loss of a batch: a rare class counts more while the network learns, and what it says stays calibrated.

    Weighting by w moves the best logits by log w; they are compared with that already added, so that the
    network's own are the log-posteriors under the base rates of training (logit adjustment, Menon et al.
    2021, arXiv:2007.07314).  weight: [L].
    """
    import torch

    weights = torch.tensor(weight, dtype=torch.float32)

    def loss(model: Any, batch: dict[str, Any]) -> Any:
        """Sum over the batch, in nats."""
        here = weights.to(batch["labels"].device)
        logits = model(batch["readings"]) + here.log()
        return torch.nn.functional.cross_entropy(logits, batch["labels"], here, reduction="sum")

    return loss


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"readings": float32 [B, S, C], "labels": int64 [B]} of a batch's windows, as tensors."""
    import torch

    return {
        "readings": torch.from_numpy(np.stack([item["readings"] for item in items])),
        "labels": torch.tensor([item["label"] for item in items], dtype=torch.int64),
    }


def predict(model: Any, windows: SensorWindows) -> NDArray[np.float64]:
    """[W, L] log-probabilities of all windows, in order; on the model's device, in evaluation mode."""
    import torch

    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        found = [
            model(torch.from_numpy(windows.normalization.apply(batch)).to(device))
            .double()
            .log_softmax(-1)
            .cpu()
            .numpy()
            for batch in windows.batches(EVALUATED_AT_ONCE)
        ]
    model.train(training)
    return np.concatenate(found)


def log_loss(log_probabilities: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    """Mean negative log-probability of the true classes, in nats; [W, L] and [W]."""
    return float(-log_probabilities[np.arange(len(label)), label].mean())
