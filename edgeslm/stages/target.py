"""A number of parameters or bytes as layers and MLP channels: the shape within it that loses least on a text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import RecipeError
from edgeslm.stages.influence import mean_loss, narrowed, without
from edgeslm.stages.widths import (
    K_QUANT_MULTIPLE,
    PLAIN_MULTIPLE,
    Shape,
    count_parameters,
    cut_config,
    layers_kept,
    required_kinds,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import PruneSpec
    from edgeslm.stages.rope import Config

LOSS_WINDOWS = 8
"""Windows of text that each loss with something left out is measured on."""
FEWEST_LAYERS, NARROWEST_MLP = 0.5, 0.25
"""Shares of the whole that a target goes down to by itself: beyond, little of the model is left to heal."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a pruned model may have.  size: of a configuration, in `unit`; limit: the target, in the same."""

    size: Callable[[Config], int]
    limit: int
    unit: str
    key: str
    """Of the recipe."""


def asked(spec: PruneSpec) -> bool:
    """Whether the settings leave layers and widths to a target."""
    return spec.target is not None or spec.target_bytes is not None


def goal(
    spec: PruneSpec,
    names: Sequence[str],
    config: Config,
    *,
    file_bytes: Callable[[Config], int],
    tokens_before: int | None = None,
) -> Goal:
    """The target of the settings for a model of this configuration; names: its tensors.

    file_bytes: of the artifact of a configuration.  tokens_before: of the model before an earlier pruning took
    tokens: shares are of that model.  Raises RecipeError for a target that is no less than the model.
    """
    whole = config | {"vocab_size": tokens_before or config["vocab_size"]}
    if spec.target_bytes is not None:
        found = Goal(size=file_bytes, limit=spec.target_bytes, unit="bytes", key="target_bytes")
    else:
        assert spec.target is not None
        before = count_parameters(names, whole)
        limit = int(spec.target * before if spec.target < 1 else spec.target)
        found = Goal(
            size=lambda one: count_parameters(names, one), limit=limit, unit="parameters", key="target"
        )
    before = found.size(whole)
    if found.limit >= before:
        raise RecipeError(
            f"{found.key} = {found.limit:,} {found.unit}, the model has {before:,}",
            hint="give less than it has",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The whole model and what is known of its parts."""

    model: Any
    config: Config
    goal: Goal
    windows: NDArray[np.int64]
    """[W, C] token ids."""
    scores: NDArray[np.float64]
    """[L] how much each layer matters."""
    mlp: NDArray[np.float64]
    """[L, I] how much each MLP channel matters."""
    tokens: int
    """Of the vocabulary that remains."""

    def size(self, shape: Shape) -> int:
        """In the goal's unit."""
        layers = range(shape.layers)
        return self.goal.size(cut_config(self.config, layers, shape) | {"vocab_size": self.tokens})

    def layers(self, shape: Shape) -> tuple[int, ...]:
        drop = self.config["num_hidden_layers"] - shape.layers
        return layers_kept(self.scores, drop, required_kinds(self.config))


def few(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """LOSS_WINDOWS of [W, C] windows, taken evenly."""
    count = min(LOSS_WINDOWS, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def fit(subject: Subject, spec: PruneSpec, shape: Shape, progress: Progress) -> tuple[Shape, str]:
    """(the shape within the goal of the least loss, without training; a sentence that says so).

    shape: what the other settings leave; layers and MLP width that they state are not changed.
    Raises RecipeError for a goal below what can be reached.
    """
    found, losses = candidates(subject, spec, shape), []
    with progress.task("choosing layers and widths", len(found), "shapes") as advance:
        for candidate in found if len(found) > 1 else ():
            kept = subject.layers(candidate)
            gone = sorted(set(range(len(subject.scores))) - set(kept))
            with without(subject.model, gone, narrowed(subject.mlp, candidate.mlp, kept)):
                losses.append(mean_loss(subject.model, subject.windows))
            advance(1)
    best = found[int(np.argmin(losses))] if losses else found[0]
    note = (
        f"target: {best.layers} layers with an MLP of {best.mlp}, {subject.size(best):,} {subject.goal.unit}"
    )
    if losses:
        note += (
            f"; of {len(losses)} shapes that fit it loses least ({min(losses):.3f} nats a token, untrained)"
        )
    return best, note


def candidates(subject: Subject, spec: PruneSpec, shape: Shape) -> list[Shape]:
    """For each number of layers the widest MLP within the goal, down to where the MLP stays whole."""
    limit = subject.goal.limit
    fewest = shape.layers if spec.drop_layers is not None else max(1, round(FEWEST_LAYERS * shape.layers))
    block = min(spec.multiple or PLAIN_MULTIPLE, shape.mlp)
    narrowest = shape.mlp if spec.mlp_width is not None else max(block, int(NARROWEST_MLP * shape.mlp))
    found, smallest = [], subject.size(shape)
    for one in _by_layers(subject, shape, fewest):
        if subject.size(one) <= limit:
            found.append(one)
            break
        smallest = min(smallest, subject.size(replace(one, mlp=narrowest)))
        room = _room(subject, one, spec.multiple)
        mlp = rounded(room, one.mlp, spec.multiple, "mlp_width", []) if room >= narrowest else 0
        if mlp >= narrowest:
            found.append(replace(one, mlp=mlp))
    if not found:
        raise RecipeError(
            f"{subject.goal.key} = {limit:,} {subject.goal.unit} can't be reached by dropping layers and MLP "
            f"channels: what they leave is {smallest:,}",
            hint="add vocabulary = true, kv_heads or hidden_size, or give more",
        )
    return found


def _room(subject: Subject, one: Shape, multiple: int | None) -> int:
    """The widest MLP within the goal; of widths that suit K-quants, whose types are smaller, and of others."""
    widest = 0
    for step in (PLAIN_MULTIPLE, K_QUANT_MULTIPLE) if multiple is None else (multiple,):
        low, high = 0, (one.mlp - 1) // step
        while low < high:
            middle = (low + high + 1) // 2
            if subject.size(replace(one, mlp=middle * step)) <= subject.goal.limit:
                low = middle
            else:
                high = middle - 1
        widest = max(widest, low * step)
    return widest


def _by_layers(subject: Subject, shape: Shape, fewest: int) -> Iterator[Shape]:
    """`shape` with fewer and fewer layers, as far as the family's pattern of layers lets."""
    for layers in range(shape.layers, fewest - 1, -1):
        one = replace(shape, layers=layers)
        try:
            subject.layers(one)
        except RecipeError:
            continue
        yield one
