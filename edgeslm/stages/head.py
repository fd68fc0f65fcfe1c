"""A classifier in seconds: an encoder's features as they are, and a maximum-entropy head fitted by a solver.

The head is multinomial logistic regression (Berger et al. 1996, "A maximum entropy approach to natural
language processing"), its regularization chosen by cross-validated log-loss.

N examples, H hidden size, L classes.
"""

from __future__ import annotations

import json
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import atomic_write, writing
from edgeslm.errors import DataError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages import saving
from edgeslm.stages.classifier import (
    EXAMPLES_AT_ONCE,
    HEAD_FILE,
    POOLED,
    heldout_metrics,
    load_encoder,
    pad_token,
)
from edgeslm.stages.team import is_main, processes, wait_for_all
from edgeslm.stages.train import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.specs import FinetuneSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.schedule import Examples

INVERSE_PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""scikit-learn's C; features of length 1 need little regularization."""
FOLDS, MOST_ITERATIONS = 5, 1000


def run(
    checkpoint: Checkpoint,
    spec: FinetuneSpec,
    out: Path,
    *,
    train: Any,
    heldout: Any | None,
    labels: Sequence[str],
    seed: int,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Checkpoint:
    """Fit a head on the frozen features of `checkpoint` and write the classifier into `out`.

    train, heldout: labelled examples (input_ids, label).  Raises DataError for a class without examples.
    """
    if is_main():
        _fit(
            checkpoint, spec, out, train=train, heldout=heldout, labels=labels, seed=seed,
            progress=progress or Quiet(), clock=clock,
        )  # fmt: skip
    wait_for_all()
    return saving.saved(out, checkpoint, here=is_main())


def _fit(
    checkpoint: Checkpoint,
    spec: FinetuneSpec,
    out: Path,
    *,
    train: Any,
    heldout: Any | None,
    labels: Sequence[str],
    seed: int,
    progress: Progress,
    clock: Callable[[], float],
) -> None:
    from safetensors.torch import save_file

    from edgeslm.stages.labelled import collate_texts
    from edgeslm.stages.networks import PooledClassifier, set_head

    begin = clock()
    classifier = PooledClassifier(load_encoder(checkpoint), len(labels)).eval().to(processes().device)
    collate = collate_texts(pad_token(checkpoint.tokenizer()))
    found = np.array([train[index]["label"] for index in range(len(train))])
    features = encode(classifier, train, collate, progress)
    weight, bias, facts = fit_head(features, found, len(labels), seed=seed)
    progress.note(f"finetune: head of {len(labels)} classes on {len(train)} texts, C = {facts['C']:g}")
    set_head(classifier, weight, bias)
    metrics = heldout_metrics(classifier, heldout, collate) if heldout is not None else None
    encoder = classifier.cpu().encoder
    encoder.config.id2label = dict(enumerate(labels))
    encoder.config.label2id = {label: index for index, label in enumerate(labels)}
    saving.save_model(
        encoder, None, out, parent=checkpoint, stage="finetune", spec=spec, notes={"kind": POOLED}
    )
    with writing(out):
        save_file(
            {"weight": classifier.head.weight.detach(), "bias": classifier.head.bias.detach()},
            out / HEAD_FILE,
        )
    record = {
        "schema": SCHEMA,
        "steps": facts["iterations"],
        "epochs": 1.0,
        "examples": len(train),
        "tokens": sum(len(train[index]["input_ids"]) for index in range(len(train))),
        "seconds": clock() - begin,
        "curve": [],
        "evaluations": []
        if metrics is None
        else [{"step": facts["iterations"], "loss": metrics["log_loss"]}],
        "best_step": None,
        "stopped_early": False,
        "resumed_from": None,
        "processes": 1,
        "precision": "float32",
        "seed": seed,
        "method": "head-only",
        "trained_parameters": int(weight.size + bias.size),
        "C": facts["C"],
        "heldout": metrics,
    }
    atomic_write(out / "training.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def encode(
    classifier: Any,
    examples: Examples,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    progress: Progress,
) -> NDArray[np.float32]:
    """[N, H] features of all examples, in their order; computed in batches of like lengths."""
    import torch

    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    features = np.zeros((len(order), classifier.head.in_features), np.float32)
    device = classifier.head.weight.device
    with torch.inference_mode(), progress.task("features", len(order), "texts") as advance:
        for at in range(0, len(order), EXAMPLES_AT_ONCE):
            chosen = order[at : at + EXAMPLES_AT_ONCE]
            batch = collate([examples[index] for index in chosen])
            ids, mask = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
            features[chosen] = classifier.features(ids, mask).cpu().numpy()
            advance(len(chosen))
    return features


def fit_head(
    features: NDArray[np.float32], labels: NDArray[np.int64], classes: int, *, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, Any]]:
    """(weight [L, H], bias [L], {C, iterations}) of multinomial logistic regression.

    features: [N, H].  labels: [N], below `classes`.  C: the best of INVERSE_PENALTIES by log-loss over
    folds; with fewer than two examples of a class there are no folds and it is 1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        raise DataError(
            f"{int((counts == 0).sum())} of {classes} classes have no training example",
            hint="name only classes that occur, or add rows",
        )

    def model(penalty: float) -> Any:
        return LogisticRegression(C=penalty, max_iter=MOST_ITERATIONS)

    folds = int(min(FOLDS, counts.min()))
    best = INVERSE_PENALTIES[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if folds >= 2:
            split = StratifiedKFold(folds, shuffle=True, random_state=seed)
            scores = [
                cross_val_score(model(penalty), features, labels, cv=split, scoring="neg_log_loss").mean()
                for penalty in INVERSE_PENALTIES
            ]
            best = INVERSE_PENALTIES[int(np.argmax(scores))]
        fitted = model(best).fit(features, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if classes == 2:  # one row of log-odds: halves of it in both directions give the same probabilities
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    facts = {"C": best, "iterations": int(np.max(fitted.n_iter_))}
    return weight.astype(np.float32), bias.astype(np.float32), facts
