"""What classify and predict share: the rule that decides, the check of the task, scores and answers.

B examples, L classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bundle import open_bundle
from edgeslm.errors import BundleError, EngineError, RecipeError
from edgeslm.runtime.posterior import make_decision

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle
    from edgeslm.runtime.posterior import Decision

COMMANDS = {"text-classification": "classify", "sensor-classification": "predict", "causal-lm": "chat"}
"""Task of a bundle to the command that uses it."""
DIGITS = 6
"""Of a probability that is told: the last bits differ from batch to batch."""

Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How posteriors become decisions.  threshold: of the watched class; None: costs decide."""

    decision: Decision
    watched: int | None
    threshold: float | None = None

    @property
    def label(self) -> str | None:
        """The class that is watched for."""
        return None if self.watched is None else self.decision.labels[self.watched]

    @property
    def alarm_from(self) -> float | None:
        """The watched class's posterior from which it is decided for; None where the other classes count too."""
        if self.threshold is not None:
            return self.threshold
        return self.decision.threshold if self.watched == self.decision.positive else None

    def choose(self, posterior: NDArray[np.float64]) -> NDArray[np.int64]:
        """The decided class [B] of posteriors [B, L]."""
        chosen = self.decision.choose(posterior)
        if self.threshold is None or self.watched is None:
            return chosen
        others = posterior * (1.0 if self.decision.costs is None else np.asarray(self.decision.costs))
        others[:, self.watched] = -1.0
        return np.where(posterior[:, self.watched] >= self.threshold, self.watched, others.argmax(axis=1))

    def as_record(self) -> dict[str, Any]:
        """The manifest's `decision`, with what was asked for instead."""
        return self.decision.as_record() | {"positive": self.label, "threshold": self.alarm_from}


def make_rule(
    decision: Decision,
    *,
    prior: Mapping[str, float] | None = None,
    costs: Mapping[str, float] | None = None,
    threshold: float | None = None,
    watch: str | None = None,
) -> Rule:
    """The bundle's decision with other base rates, costs, threshold or watched class.

    Raises RecipeError for an unknown class, an impossible number, a threshold beside costs, and one where
    no class is watched for (the bundle's own, of two classes; else `watch`).
    """
    if threshold is not None and costs:
        raise RecipeError(
            "both costs and a threshold are given", hint="a threshold stands for costs: give one"
        )
    if prior or costs:
        given = dict(zip(decision.labels, decision.costs, strict=True)) if decision.costs else None
        trained = dict(zip(decision.labels, decision.training_prior, strict=True))
        deployed = dict(zip(decision.labels, decision.prior, strict=True))
        decision = make_decision(decision.labels, trained, prior=prior or deployed, costs=costs or given)
    if watch is not None and watch not in decision.labels:
        raise RecipeError(f"the model has no class {watch!r}", hint=f"known: {', '.join(decision.labels)}")
    watched = decision.positive if watch is None else decision.labels.index(watch)
    if threshold is not None and watched is None:
        raise RecipeError(
            f"a threshold is of one class, and the model has {len(decision.labels)}",
            hint="let costs decide: --cost CLASS=COST for each class that is dear to miss",
        )
    return Rule(decision=decision, watched=watched, threshold=threshold)


def open_for(path: Path, task: str) -> Bundle:
    """The bundle; BundleError, with the command to use, for one that was made for another task."""
    bundle = open_bundle(path)
    found = str((bundle.manifest or {}).get("task") or "causal-lm")
    if found != task:
        raise BundleError(
            f"{path}: a model for {found}, and edgeslm {COMMANDS[task]} takes one for {task}",
            hint=f"edgeslm {COMMANDS[found]} {path}" if found in COMMANDS else "give another bundle",
        )
    return bundle


def scored(
    predict: Callable[[Any], NDArray[np.float64]], items: Sequence[Any]
) -> list[NDArray[np.float64] | EngineError]:
    """The probabilities [L] of each item; where a batch fails, each item alone, and the error of those that do."""
    try:
        return list(predict(items))
    except EngineError as error:
        if len(items) == 1:
            return [error]
        return [scored(predict, items[number : number + 1])[0] for number in range(len(items))]


def rounded(value: float) -> float:
    """A probability with the digits that are told."""
    return float(f"{value:.{DIGITS}g}")


def as_lines(answers: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON document a line, UTF-8; half of a surrogate pair keeps its escape."""
    lines = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in answers)
    return lines.encode("utf-8", errors="backslashreplace")
