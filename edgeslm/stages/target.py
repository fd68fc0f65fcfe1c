"""A number of parameters as layers and MLP channels: the shape within it that loses least on a text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import RecipeError
from edgeslm.stages.influence import mean_loss, narrowed, without
from edgeslm.stages.widths import (
    PLAIN_MULTIPLE,
    Shape,
    count_parameters,
    cut_config,
    layers_kept,
    required_kinds,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import PruneSpec
    from edgeslm.stages.rope import Config

LOSS_WINDOWS = 8
"""Windows of text that each loss with something left out is measured on."""
FEWEST_LAYERS, NARROWEST_MLP = 0.5, 0.25
"""Shares of the whole that a target goes down to by itself: beyond, little of the model is left to heal."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The whole model and what is known of its parts."""

    model: Any
    config: Config
    names: tuple[str, ...]
    """Its tensors."""
    windows: NDArray[np.int64]
    """[W, C] token ids."""
    scores: NDArray[np.float64]
    """[L] how much each layer matters."""
    mlp: NDArray[np.float64]
    """[L, I] how much each MLP channel matters."""
    tokens: int
    """Of the vocabulary that remains."""

    def parameters(self, shape: Shape) -> int:
        layers = range(shape.layers)
        config = cut_config(self.config, layers, shape) | {"vocab_size": self.tokens}
        return count_parameters(self.names, config)

    def layers(self, shape: Shape) -> tuple[int, ...]:
        drop = self.config["num_hidden_layers"] - shape.layers
        return layers_kept(self.scores, drop, required_kinds(self.config))


def few(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """LOSS_WINDOWS of [W, C] windows, taken evenly."""
    count = min(LOSS_WINDOWS, len(windows))
    return windows[[index * len(windows) // count for index in range(count)]]


def fit(subject: Subject, spec: PruneSpec, shape: Shape, progress: Progress) -> tuple[Shape, str]:
    """(the shape within spec.target of the least loss, without training; a sentence that says so).

    shape: what the other settings leave; layers and MLP width that they state are not changed.
    Raises RecipeError for a target above the model, or below what can be reached.
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
    note = f"target: {best.layers} layers with an MLP of {best.mlp}, {subject.parameters(best):,} parameters"
    if losses:
        note += (
            f"; of {len(losses)} shapes that fit it loses least ({min(losses):.3f} nats a token, untrained)"
        )
    return best, note


def candidates(subject: Subject, spec: PruneSpec, shape: Shape) -> list[Shape]:
    """For each number of layers the widest MLP within the target, down to where the MLP stays whole."""
    assert spec.target is not None
    before = count_parameters(subject.names, subject.config)
    limit = int(spec.target * before if spec.target < 1 else spec.target)
    if limit >= before:
        raise RecipeError(
            f"target = {limit:,} parameters, the model has {before:,}", hint="give less than it has"
        )
    fewest = shape.layers if spec.drop_layers is not None else max(1, round(FEWEST_LAYERS * shape.layers))
    block = min(spec.multiple or PLAIN_MULTIPLE, shape.mlp)
    narrowest = shape.mlp if spec.mlp_width is not None else max(block, int(NARROWEST_MLP * shape.mlp))
    found, smallest = [], before
    for one in _by_layers(subject, shape, fewest):
        smallest = min(smallest, subject.parameters(replace(one, mlp=narrowest)))
        rest = subject.parameters(replace(one, mlp=0))
        room = int((limit - rest) * one.mlp // (subject.parameters(one) - rest))
        if room < narrowest:
            continue
        mlp = one.mlp if room >= one.mlp else rounded(room, one.mlp, spec.multiple, "mlp_width", [])
        if mlp >= narrowest:
            found.append(replace(one, mlp=mlp))
        if mlp == one.mlp:
            break
    if not found:
        raise RecipeError(
            f"target = {limit:,} parameters can't be reached by dropping layers and MLP channels: "
            f"what they leave is {smallest:,}",
            hint="add vocabulary = true, kv_heads or hidden_size, or give more",
        )
    return found


def _by_layers(subject: Subject, shape: Shape, fewest: int) -> Iterator[Shape]:
    """`shape` with fewer and fewer layers, as far as the family's pattern of layers lets."""
    for layers in range(shape.layers, fewest - 1, -1):
        one = replace(shape, layers=layers)
        try:
            subject.layers(one)
        except RecipeError:
            continue
        yield one
