"""How good a classifier's decisions and probabilities are: metrics with intervals, as one record.

N examples, L classes, G groups of examples that belong together (windows of one machine), K bins.

Every metric is a function of how often each example counts.  So one bootstrap serves all: whole groups
are drawn with replacement, and the metrics computed again.  With base rates of the deployment the examples
of each class are weighed, in the sample and in every draw, to occur as often as there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench import statistics
from edgeslm.bench.classify_bench import describe_classifier
from edgeslm.bench.statistics import Estimate
from edgeslm.errors import DataError
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle
    from edgeslm.progress import Progress
    from edgeslm.runtime.ort import OrtClassifier

SCHEMA = "edgeslm.task-quality/1"
BINS = 15
"""Bins of the expected calibration error, of equal width (Guo et al. 2017, arXiv:1706.04599)."""
SMALLEST = 1e-12
"""A probability below counts as this in the log-loss: one impossible example must not make it infinite."""
CHUNK = 256
"""Examples predicted between two moves of the progress bar."""


def evaluate_classifier(
    bundle: Bundle,
    examples: Iterable[tuple[Any, str]],
    *,
    prior: Mapping[str, float] | None = None,
    costs: Mapping[str, float] | None = None,
    ordinal: bool = False,
    groups: Sequence[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The record edgeslm.task-quality/1 of a bundle on (text or window [R, C], label) examples.

    prior, costs: base rates where it is deployed and costs of missing a class, in place of the bundle's.
    groups: what each example belongs to; None: each is its own.  ordinal: the classes are grades in order.
    Raises DataError for no examples or a label that the model doesn't know, and what OrtClassifier raises.
    """
    from edgeslm.runtime.ort import OrtClassifier
    from edgeslm.runtime.posterior import make_decision

    classifier = OrtClassifier(bundle, threads=threads)
    decision = classifier.decision
    if prior or costs:
        given = dict(zip(decision.labels, decision.costs, strict=True)) if decision.costs else None
        trained = dict(zip(decision.labels, decision.training_prior, strict=True))
        deployed = dict(zip(decision.labels, decision.prior, strict=True))
        decision = make_decision(decision.labels, trained, prior=prior or deployed, costs=costs or given)
    truth, probabilities, digest, truncated = _predicted(classifier, examples, progress or Quiet())
    posterior = decision.posterior(probabilities)
    elsewhere = decision.prior != decision.training_prior
    record = metrics(
        truth, posterior, classes=decision.labels, chosen=decision.choose(posterior), ordinal=ordinal,
        prior=decision.prior if elsewhere else None, groups=groups, seed=seed,
    )  # fmt: skip
    record["artifact"] = describe_classifier(bundle)
    record["text"] = {"sha256": digest}
    record["protocol"] |= {"truncated": truncated}
    record["decision"] = decision.as_record()
    return record


def metrics(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    *,
    classes: Sequence[str],
    chosen: NDArray[np.int64] | None = None,
    ordinal: bool = False,
    prior: Sequence[float] | None = None,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The record edgeslm.task-quality/1 of probabilities [N, L] against true classes [N].

    chosen: decided classes [N]; None: the likeliest.  prior: base rates [L] of the deployment, for which
    the metrics are then estimated; None: those of the examples.  groups: [N].  seed: of the bootstrap.
    A class that neither occurs nor is chosen is left out of macro averages; the precision of one that is
    never chosen counts there as 0 and is null by itself, as its value is not known.
    Raises DataError without examples, or without any of a class that the prior expects.
    """
    if len(labels) == 0:
        raise DataError("there are no examples to measure on", hint="give held-out rows with labels")
    chosen = probabilities.argmax(axis=1) if chosen is None else chosen
    scored = _Scored(labels, probabilities, chosen, prior=prior, ordinal=ordinal)
    missing = [name for name, count in zip(classes, scored.support, strict=True) if not count]
    if prior is not None and any(prior[classes.index(name)] > 0 for name in missing):
        raise DataError(f"no example of {', '.join(missing)}", hint="hold out examples of every class")
    group_of = np.arange(len(labels)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    by_chance = scored.calibration_by_chance(seed)
    estimates = _bootstrapped(scored, group_of, by_chance, seed)
    clusters = int(group_of.max()) + 1
    single = clusters == len(labels) and prior is None
    if single:  # closed forms where the examples are independent and count alike
        hits = (chosen == labels)[:, None]
        estimates["accuracy"] = statistics.proportion(hits)
    macro = ("precision", "recall", "f1")
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "artifact": None,
        "classes": list(classes),
        "ordinal": ordinal,
        "protocol": _protocol(scored, clusters, prior, missing, seed),
        "confidence": statistics.CONFIDENCE,
        "accuracy": estimates["accuracy"].as_record(),
        "log_loss": estimates["log_loss"].at_least(0.0).as_record(),
        "macro": {name: estimates[f"macro {name}"].as_record() for name in macro},
        "per_class": _per_class(scored, classes, estimates, single),
        "confusion": scored.confusion.tolist(),
        "expected_calibration_error": {**estimates["calibration"].as_record(), "by_chance": by_chance[0]},
        "reliability": scored.reliability(),
    }
    if ordinal:
        kappa = estimates["kappa"]
        record["quadratic_weighted_kappa"] = kappa.as_record() if math.isfinite(kappa.value) else None
        record["mean_absolute_error"] = estimates["mae"].as_record()
    return record


class _Scored:
    """Predictions in the form that each metric needs, so that a resample costs a few sums."""

    def __init__(
        self, labels: NDArray[np.int64], probabilities: NDArray[np.float64], chosen: NDArray[np.int64], *,
        prior: Sequence[float] | None, ordinal: bool,
    ) -> None:  # fmt: skip
        self.labels, self.ordinal = labels, ordinal
        self.classes = classes = probabilities.shape[1]
        self.prior = None if prior is None else np.asarray(prior, np.float64)
        self.cell = labels * classes + chosen
        self.nll = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], SMALLEST))
        top = probabilities.argmax(axis=1)
        self.certainty = probabilities[np.arange(len(labels)), top]
        self.right = (top == labels).astype(np.float64)
        # Bin k holds (k / K, (k + 1) / K].
        self.bin = np.clip(np.ceil(self.certainty * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self.confusion = np.bincount(self.cell, minlength=classes * classes).reshape(classes, classes)
        self.support = self.confusion.sum(axis=1)

    def measure(self, counts: NDArray[np.float64]) -> dict[str, float]:
        """All metrics where example i counts counts[i] times; counts [N]."""
        weights = self.weigh(counts)
        square = (self.classes, self.classes)
        confusion = np.bincount(self.cell, weights, minlength=self.classes**2).reshape(square)
        gaps = np.bincount(self.bin, weights * (self.right - self.certainty), minlength=BINS)
        values = {
            "accuracy": float(np.trace(confusion)),
            "log_loss": float(weights @ self.nll),
            "calibration": float(np.abs(gaps).sum()),
        }
        used = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
        for name, scores in zip(("precision", "recall", "f1"), rates(confusion), strict=True):
            values[f"macro {name}"] = float(np.nan_to_num(scores)[used].mean())
            values |= {f"{name} {number}": float(score) for number, score in enumerate(scores)}
        if self.ordinal:
            values["kappa"] = quadratic_weighted_kappa(confusion)
            distance = np.abs(np.subtract.outer(np.arange(self.classes), np.arange(self.classes)))
            values["mae"] = float((confusion * distance).sum())
        return values

    def weigh(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each example's share [N]: as often as it counts, and its class as often as the prior says."""
        if self.prior is not None:
            found = np.bincount(self.labels, counts, minlength=self.classes)
            factor = np.divide(self.prior, found, out=np.zeros(self.classes), where=found > 0)
            counts = counts * factor[self.labels]
        return np.asarray(counts / counts.sum())

    def calibration_by_chance(self, seed: int) -> tuple[float, float]:
        """Mean and 97.5 % quantile of the calibration error if the model were right as often as it is sure.

        Consistency resampling: Broecker & Smith 2007, Weather and Forecasting 22, 651.
        """
        random = np.random.default_rng([seed, 1])
        weights = self.weigh(np.ones(len(self.labels)))
        drawn = []
        for _ in range(statistics.RESAMPLES):
            right = random.random(len(weights)) < self.certainty
            gaps = np.bincount(self.bin, weights * (right - self.certainty), minlength=BINS)
            drawn.append(np.abs(gaps).sum())
        return float(np.mean(drawn)), float(np.quantile(drawn, (1 + statistics.CONFIDENCE) / 2))

    def reliability(self) -> list[dict[str, float]]:
        """Of each bin that holds examples: how many, how sure the model was, and how often it was right."""
        counts = np.bincount(self.bin, minlength=BINS)
        certainty, right = (np.bincount(self.bin, of, minlength=BINS) for of in (self.certainty, self.right))
        return [
            {"low": k / BINS, "high": (k + 1) / BINS, "examples": int(counts[k]),
             "certainty": float(certainty[k] / counts[k]), "accuracy": float(right[k] / counts[k])}
            for k in range(BINS) if counts[k]
        ]  # fmt: skip


def rates(confusion: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and F1 [L] of a confusion matrix [L true, L chosen]; NaN where nothing defines it."""
    hits, occurs, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    nothing = np.full(len(hits), math.nan)
    precision = np.divide(hits, said, out=nothing.copy(), where=said > 0)
    recall = np.divide(hits, occurs, out=nothing.copy(), where=occurs > 0)
    f1 = np.divide(2 * hits, said + occurs, out=nothing, where=said + occurs > 0)
    return precision, recall, f1


def quadratic_weighted_kappa(confusion: NDArray[Any]) -> float:
    """1 less the squared distances of grades over those expected by chance (Cohen 1968); NaN if chance has none."""
    total = confusion.sum()
    size = len(confusion)
    distance = np.subtract.outer(np.arange(size), np.arange(size)) ** 2
    expected = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / total
    by_chance = (distance * expected).sum()
    return float(1 - (distance * confusion).sum() / by_chance) if by_chance > 0 else math.nan


def _bootstrapped(
    scored: _Scored, group_of: NDArray[np.int64], by_chance: tuple[float, float], seed: int
) -> dict[str, Estimate]:
    """Every metric with its interval: percentiles of the bootstrap, the basic one for the calibration error.

    A sum of absolute gaps grows with any noise, so its bootstrap lies above the estimate as the estimate
    lies above the truth; the basic interval turns that around (Davison & Hinkley 1997, 5.2).  It reaches
    down to 0 where a perfectly calibrated model would show as much.
    """
    observed = scored.measure(np.ones(len(scored.labels)))
    groups = int(group_of.max()) + 1
    if groups < 2:
        return {name: Estimate(value=value, low=None, high=None) for name, value in observed.items()}
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in observed}
    for _ in range(statistics.RESAMPLES):
        counts = np.bincount(random.integers(groups, size=groups), minlength=groups).astype(np.float64)
        for name, value in scored.measure(counts[group_of]).items():
            drawn[name].append(value)
    tail = (1 - statistics.CONFIDENCE) / 2
    estimates = {}
    for name, value in observed.items():
        known = [each for each in drawn[name] if math.isfinite(each)]
        if not known or not math.isfinite(value):
            estimates[name] = Estimate(value=value, low=None, high=None)
            continue
        low, high = (float(end) for end in np.quantile(known, (tail, 1 - tail)))
        if name == "calibration":
            low, high = max(0.0, 2 * value - high), 2 * value - low
            low = 0.0 if value <= by_chance[1] else low
        estimates[name] = Estimate(value=value, low=min(low, value), high=max(high, value))
    return estimates


def _per_class(
    scored: _Scored, classes: Sequence[str], estimates: Mapping[str, Estimate], single: bool
) -> dict[str, Any]:
    """For each class how often it occurs and is chosen, precision, recall and F1; null where not defined."""
    found = {}
    for number, name in enumerate(classes):
        entry: dict[str, Any] = {
            "examples": int(scored.support[number]), "chosen": int(scored.confusion[:, number].sum()),
        }  # fmt: skip
        for metric in ("precision", "recall", "f1"):
            estimate = estimates[f"{metric} {number}"]
            if math.isnan(estimate.value):
                entry[metric] = None
                continue
            if single and metric != "f1":
                column = scored.confusion[:, number] if metric == "precision" else scored.confusion[number]
                hits = np.arange(int(column.sum())) < scored.confusion[number, number]
                estimate = statistics.proportion(hits[:, None])
            entry[metric] = estimate.as_record()
        found[name] = entry
    return found


def _protocol(
    scored: _Scored, clusters: int, prior: Sequence[float] | None, missing: Sequence[str], seed: int
) -> dict[str, Any]:
    count = len(scored.labels)
    method = f"Each of {count:,} held-out examples is classified by the artifact through its own runtime. "
    if clusters == count and prior is None:
        method += (
            "95 % intervals: Wilson's for accuracy, precision and recall; for the others a bootstrap of "
        )
        method += "examples "
    else:
        unit = "examples" if clusters == count else f"the {clusters:,} groups that the examples belong to"
        method += f"95 % intervals by a bootstrap of {unit} "
    method += f"({statistics.RESAMPLES} resamples, seed {seed}). "
    if clusters < 2:
        method = method.partition("95 %")[0] + "One group gives no interval. "
    if prior is not None:
        method += "The classes are weighed to occur as often as where the model is deployed. "
    method += (
        f"Calibration error: {BINS} bins of equal width over the likeliest class's probability; with few "
    )
    method += "examples it is too large, as noise counts too, and reaches 0 where chance explains it."
    if missing:
        method += f" No example of: {', '.join(missing)}."
    return {
        "examples": count, "groups": clusters, "prior": None if prior is None else list(prior), "method": method,
    }  # fmt: skip


def _predicted(
    classifier: OrtClassifier, examples: Iterable[tuple[Any, str]], progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.float64], str, int | None]:
    """(true classes [N], probabilities [N, L], sha256 of the examples, texts that were cut)."""
    number_of = {label: number for number, label in enumerate(classifier.labels)}
    truth: list[int] = []
    predicted: list[NDArray[np.float64]] = []
    digest = hashlib.sha256()
    pending: list[Any] = []
    truncated = 0

    def predict() -> None:
        nonlocal truncated
        if not pending:
            return
        if classifier.kind == "text":
            predicted.append(classifier.predict_texts(pending))
            truncated += sum(classifier.is_cut(pending))
        else:
            predicted.append(classifier.predict_readings(np.stack(pending)))
        advance(len(pending))
        pending.clear()

    total = len(examples) if isinstance(examples, Sized) else 0
    with progress.task("classify", total=total, unit="examples") as advance:
        for data, label in examples:
            if label not in number_of:
                raise DataError(
                    f"the model has no class {label!r}",
                    hint=f"its classes are {', '.join(classifier.labels)}",
                )
            content = (
                data.encode("utf-8", errors="replace")
                if isinstance(data, str)
                else np.asarray(data).tobytes()
            )
            digest.update(f"{label}\0{len(content)}\0".encode() + content)
            truth.append(number_of[label])
            pending.append(data)
            if len(pending) == CHUNK:
                predict()
        predict()
    if not truth:
        raise DataError("there are no examples to measure on", hint="give held-out rows with labels")
    cut = truncated if classifier.kind == "text" else None
    return np.asarray(truth), np.concatenate(predicted), digest.hexdigest(), cut
