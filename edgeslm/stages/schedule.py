"""What a step of training is made of, known from its number alone: examples, learning rate, precision."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeslm.specs import TrainSpec

WARM_UP, FLOOR = 0.05, 0.1
"""Shares: of the steps in which the rate rises, and of the peak that it ends at."""
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 0.01, 1.0
MIXED_FROM = 10_000_000
"""Parameters from which a processor with bfloat16 tiles gains by them; below, the casts cost more."""

Batch = dict[str, Any]


class Examples(Protocol):
    """A map-style data set: each item holds arrays and numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of a step (from 0): linear from peak / warm-up to the peak, then a cosine to a tenth of it.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)


def planned_steps(spec: TrainSpec, examples: int) -> int:
    """Optimizer steps: the examples of all epochs in steps of batch_size, at least one."""
    if spec.max_steps is not None:
        return spec.max_steps
    return max(1, round(spec.epochs * examples / spec.batch_size))


def chosen(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """The examples of a step: the next ones of an endless row of epochs, each in an order of its own."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [int(_shuffled(examples, seed, place // examples)[place % examples]) for place in places]


@lru_cache(maxsize=2)
def _shuffled(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def seed_of_step(seed: int, step: int, process: int) -> int:
    """What dropout and sampling in one step of one process start from."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Before the first step, after the last, and evenly in between: `evaluations` after the first one."""
    return {round(steps * index / max(1, evaluations)) for index in range(evaluations + 1)} | {0, steps}


def groups(model: Any) -> list[dict[str, Any]]:
    """AdamW's groups of the weights that are trained: matrices decay; norms and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]


def suited_precision(device: Any, model: Any) -> str:
    """bfloat16 for products where the hardware has units for them, else float32."""
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    large = sum(parameter.numel() for parameter in model.parameters()) >= MIXED_FROM
    return "bfloat16" if device.type == "cpu" and large and has_tiles() else "float32"


def length(item: Batch) -> int:
    """What an example's padding depends on."""
    ids = item.get("input_ids")
    return 0 if ids is None else len(ids)


def tokens_in(batch: Batch) -> int:
    """Positions of a batch that are not padding: tokens, or rows of sensor readings."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    first = batch["input_ids"] if "input_ids" in batch else next(iter(batch.values()))
    return int(math.prod(first.shape[:2]))
