"""From a classifier's probabilities to a decision: the base rate where it runs, and what mistakes cost.

A classifier learns P(E|D) under the base rates of its training data.  Where the classes occur at other
rates and only those differ, Bayes' rule P(E|D) = P(D|E) P(E) / P(D) gives the posterior there without the
model: each class is weighed by deployed over trained base rate (Saerens, Latinne & Decaestecker 2002,
Neural Computation 14, eq. 2.4).

B examples, L classes.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import BundleError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Probabilities = NDArray[np.float64]

SUM_TOLERANCE = 1e-6
"""By how much given base rates may miss 1."""


def reweigh(
    probabilities: Probabilities, training_prior: Sequence[float], deployed_prior: Sequence[float]
) -> Probabilities:
    """Posterior [B, L] under deployed_prior [L] of probabilities [B, L] learned under training_prior [L].

    training_prior must be above 0 wherever deployed_prior is.  A row that gives all its probability to
    classes that never occur where it is deployed says nothing there: it becomes deployed_prior.
    """
    trained, deployed = np.asarray(training_prior, np.float64), np.asarray(deployed_prior, np.float64)
    weighed = probabilities * np.divide(deployed, trained, out=np.zeros_like(trained), where=deployed > 0)
    total = weighed.sum(axis=1, keepdims=True)
    return np.where(total > 0, weighed / np.where(total > 0, total, 1), deployed)


def threshold_from_costs(cost_of_missing: float, cost_of_false_alarm: float) -> float:
    """The probability from which calling it is cheaper on average than not: c_fa / (c_fa + c_miss).

    At probability p, calling costs (1 - p) c_fa and keeping quiet p c_miss (Elkan 2001, eq. 2).
    """
    return cost_of_false_alarm / (cost_of_false_alarm + cost_of_missing)


def decide(probabilities: Probabilities, costs: Sequence[float] | None = None) -> NDArray[np.int64]:
    """The class [B] of least expected cost, where missing class k costs costs[k]; None: the likeliest.

    Expected cost of saying j is the sum over k != j of p_k c_k, so the largest p_k c_k wins; at equality
    the first class.
    """
    return np.asarray((probabilities if costs is None else probabilities * np.asarray(costs)).argmax(axis=1))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How probabilities become decisions; base rates and costs [L] in the order of labels."""

    labels: tuple[str, ...]
    training_prior: tuple[float, ...]
    prior: tuple[float, ...]
    """Base rates where it runs; training_prior where nothing else is known."""
    costs: tuple[float, ...] | None = None
    """Cost of missing each class; None: all alike."""

    @property
    def positive(self) -> int | None:
        """Of two classes the one that is watched for: the costlier to miss, else the rarer in training."""
        if len(self.labels) != 2:
            return None
        first, second = self.costs or (1.0, 1.0)
        if first == second:
            second, first = self.training_prior
        return int(second >= first)

    @property
    def threshold(self) -> float | None:
        """Of two classes: the posterior of the positive one from which it is decided for."""
        if self.positive is None:
            return None
        costs = self.costs or (1.0, 1.0)
        return threshold_from_costs(costs[self.positive], costs[1 - self.positive])

    def posterior(self, probabilities: Probabilities) -> Probabilities:
        """[B, L] under the deployed base rates."""
        if self.prior == self.training_prior:
            return probabilities
        return reweigh(probabilities, self.training_prior, self.prior)

    def choose(self, posterior: Probabilities) -> NDArray[np.int64]:
        """The decided class [B] of posteriors [B, L]; the positive one also exactly at the threshold."""
        if self.positive is None or self.threshold is None:
            return decide(posterior, self.costs)
        called = posterior[:, self.positive] >= self.threshold
        return np.where(called, self.positive, 1 - self.positive)

    def as_record(self) -> dict[str, Any]:
        """The manifest's `decision`."""
        return {
            "labels": list(self.labels),
            "training_prior": list(self.training_prior),
            "prior": list(self.prior),
            "costs": None if self.costs is None else list(self.costs),
            "positive": None if self.positive is None else self.labels[self.positive],
            "threshold": self.threshold,
        }


def make_decision(
    labels: Sequence[str],
    training_prior: Mapping[str, float],
    *,
    prior: Mapping[str, float] | None = None,
    costs: Mapping[str, float] | None = None,
) -> Decision:
    """A decision rule out of what a user gives; RecipeError for an unknown class or an impossible number.

    training_prior: counts or shares of the training examples.  prior: base rates of some or all classes;
    the others share the rest as in training.  costs: of missing a class; 1 for classes not named.
    """
    for given in (prior, costs):
        for name in given or {}:
            if name not in labels:
                raise _unknown(name, labels)
    counts = np.asarray([float(training_prior.get(label, 0.0)) for label in labels])
    if not (np.isfinite(counts).all() and (counts > 0).all()):
        bare = labels[int(np.argmin(counts))]
        raise RecipeError(f"the class {bare!r} has no base rate in the training data", hint="drop the class")
    trained = tuple((counts / counts.sum()).tolist())
    return Decision(
        labels=tuple(labels),
        training_prior=trained,
        prior=_completed(labels, trained, prior) if prior else trained,
        costs=_costs(labels, costs) if costs else None,
    )


def read_decision(record: Mapping[str, Any] | None, labels: Sequence[str], where: str) -> Decision:
    """The manifest's `decision`; without one all classes are taken for equally frequent and mistakes alike.

    where: the bundle, for messages.  Raises BundleError for a record that does not fit `labels`.
    """
    even = tuple([1 / len(labels)] * len(labels))
    if record is None:
        return Decision(labels=tuple(labels), training_prior=even, prior=even)
    if record.get("labels") != list(labels):
        raise BundleError(
            f"{where}: the decision's labels are not the model's", hint="build the bundle again"
        )
    trained = _numbers(record.get("training_prior"), len(labels), where, "training_prior")
    prior = record.get("prior")
    costs = record.get("costs")
    return Decision(
        labels=tuple(labels),
        training_prior=trained,
        prior=trained if prior is None else _numbers(prior, len(labels), where, "prior"),
        costs=None if costs is None else _numbers(costs, len(labels), where, "costs"),
    )


def _completed(
    labels: Sequence[str], trained: Sequence[float], prior: Mapping[str, float]
) -> tuple[float, ...]:
    """Base rates of all classes: what is not given shares the rest as in training."""
    for name, value in prior.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise RecipeError(f"the base rate of {name} is {value}", hint="give a share from 0 to 1")
    given, rest = sum(prior.values()), [label for label in labels if label not in prior]
    if given > 1 + SUM_TOLERANCE or (not rest and given < 1 - SUM_TOLERANCE):
        raise RecipeError(
            f"the base rates add up to {given:g}", hint="give rates that add up to 1, or leave classes out"
        )
    known = dict(zip(labels, trained, strict=True))
    others = sum(known[label] for label in rest)
    left = max(0.0, 1 - given)
    values = [prior[label] if label in prior else left * known[label] / others for label in labels]
    return tuple(value / sum(values) for value in values)


def _costs(labels: Sequence[str], costs: Mapping[str, float]) -> tuple[float, ...]:
    for name, value in costs.items():
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f"the cost of missing {name} is {value}", hint="give a number above 0")
    return tuple(float(costs.get(label, 1.0)) for label in labels)


def _numbers(values: Any, count: int, where: str, key: str) -> tuple[float, ...]:
    """`count` numbers from 0 up, not all 0; base rates add up to 1."""
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(
        isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values
    ):
        raise BundleError(f"{where}: {key} of the decision is {str(values)[:60]}, not {count} numbers")
    total = sum(values)
    if total <= 0 or (key != "costs" and abs(total - 1) > SUM_TOLERANCE) or (key != "prior" and 0 in values):
        raise BundleError(f"{where}: {key} of the decision is {str(values)[:60]}", hint="build it again")
    return tuple(float(value) for value in values)


def _unknown(name: str, labels: Sequence[str]) -> RecipeError:
    near = difflib.get_close_matches(name, labels, n=1)
    return RecipeError(
        f"the model has no class {name!r}",
        hint=f"{f'did you mean {near[0]!r}? ' if near else ''}known: {', '.join(labels)}",
    )
