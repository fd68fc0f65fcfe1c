"""Records of training, cutting and classifying as text for a terminal; see console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import layout, wording, wording_learning

if TYPE_CHECKING:
    from collections.abc import Mapping

    Record = Mapping[str, Any]

MOST_CLASSES = 12
"""Columns of a confusion matrix that fit beside each other."""
NAME_CHARACTERS = 22


def checkpoint_text(record: Record) -> str:
    """What a stage that trains or cuts made of a model."""
    facts = [("stages", wording.stages(record["stages"]))] if record.get("stages") else []
    facts += [
        ("model", wording.text(record.get("path"))),
        ("parameters", wording.parameters(record.get("parameters"))),
        *learned_facts(record),
    ]
    return layout.facts(facts)


def learned_facts(record: Record) -> list[tuple[str, str]]:
    """What a model learned from, how far each training came, and what was cut; [] where nothing was."""
    facts: list[tuple[str, str]] = []
    data = record.get("data")
    if data:
        facts.append(("learned from", wording_learning.data_side(data.get("train") or {})))
        held = wording_learning.data_side(data.get("heldout") or {})
        facts.append(("held out", "nothing" if held == wording.NOT_AVAILABLE else held))
        if data.get("scrubbed") is not None:
            facts.append(("masked", wording_learning.masked(data["scrubbed"])))
        facts += [("about the data", warning) for warning in wording_learning.data_warnings(data)]
    facts += [("pruned", wording_learning.pruned(each)) for each in _in_order(record.get("prune"))]
    for each in record.get("training") or ():
        if each:
            stage = each.get("stage") or ""
            facts.append((wording_learning.STAGES.get(stage, stage or "training"), training_line(each)))
    return facts


def training_line(record: Record) -> str:
    """'110 steps, 1.00 epochs; held-out loss 2.71 before, 2.29 after; perplexity 15.0 -> 9.91; 9 min 40 s'."""
    parts = [
        wording_learning.training_length(record),
        f"held-out loss {wording_learning.heldout_loss(record)}",
        wording_learning.heldout_figures(record),
        wording_learning.training_time(record),
    ]
    return "; ".join(part for part in parts if not part.endswith(wording.NOT_AVAILABLE))


def task_summary(quality: Record) -> list[tuple[str, str]]:
    """A classifier's metrics in a few lines."""
    protocol = quality.get("protocol") or {}
    macro = quality.get("macro") or {}
    facts = [
        ("measured on", f"{wording.count(protocol.get('examples'), 'held-out example')}, {level(quality)}s"),
        ("accuracy", wording.interval(quality.get("accuracy"), as_percent=True)),
        ("macro F1", wording.interval(macro.get("f1"))),
        ("log-loss", _nats(quality.get("log_loss"))),
        ("calibration error", wording.interval(quality.get("expected_calibration_error"))),
    ]
    if quality.get("ordinal"):
        facts.append(("weighted kappa", wording.interval(quality.get("quadratic_weighted_kappa"))))
        facts.append(("mean error", f"{wording.interval(quality.get('mean_absolute_error'))} grades"))
    if quality.get("alarms"):
        facts.append(("alarms", wording_learning.alarms(quality["alarms"])))
    return facts


def task_quality_text(record: Record) -> str:
    """Metrics with intervals, each class, and what is taken for what."""
    artifact, text, protocol = (record.get(key) or {} for key in ("artifact", "text", "protocol"))
    decision = record.get("decision") or {}
    digest = artifact.get("digest")
    facts = [
        ("artifact", f"{wording.text(artifact.get('name'))} ({digest[:12] if digest else 'no digest'})"),
        ("data", ", ".join(map(str, text.get("sources") or ())) or wording.NOT_AVAILABLE),
        ("examples", _examples(protocol)),
        ("base rates", wording_learning.base_rates(decision)),
        ("decision", wording_learning.decision_rule(decision)),
        ("alarms", wording_learning.alarms(record.get("alarms"))),
    ]
    facts = [(name, value) for name, value in facts if value != wording.NOT_AVAILABLE or name == "data"]
    macro = record.get("macro") or {}
    rows = [
        ("accuracy", wording.interval(record.get("accuracy"), as_percent=True)),
        ("macro precision", wording.interval(macro.get("precision"))),
        ("macro recall", wording.interval(macro.get("recall"))),
        ("macro F1", wording.interval(macro.get("f1"))),
        ("log-loss, nats", wording.interval(record.get("log_loss"))),
        ("expected calibration error", wording.interval(record.get("expected_calibration_error"))),
    ]
    if record.get("ordinal"):
        rows.append(("quadratic weighted kappa", wording.interval(record.get("quadratic_weighted_kappa"))))
        rows.append(("mean absolute error, grades", wording.interval(record.get("mean_absolute_error"))))
    parts = [layout.facts(facts), layout.table(("", f"value [{level(record)}]"), rows, left=(0, 1))]
    return "\n\n".join([*parts, *_classes(record)])


def classifier_facts(record: Record) -> list[tuple[str, str]]:
    """Of an inspected classifier: its classes, what it is given and how it decides; [] for other models."""
    if not record.get("labels"):
        return []
    decision = record.get("decision") or {}
    facts = [
        ("classes", ", ".join(map(str, record["labels"]))),
        ("reads", wording_learning.reads(record.get("preprocessing") or {})),
        ("base rates", wording_learning.base_rates(decision)),
        ("decision", wording_learning.decision_rule(decision)),
        ("opset", wording.count(record.get("opset"))),
    ]
    return [(name, value) for name, value in facts if value != wording.NOT_AVAILABLE]


def level(quality: Record) -> str:
    """'95 % interval'."""
    return f"{quality['confidence'] * 100:g} % interval" if quality.get("confidence") else "interval"


def _classes(record: Record) -> list[str]:
    """A table of the classes, and the confusion matrix where it fits."""
    names = [str(name) for name in record.get("classes") or ()]
    per_class = record.get("per_class") or {}
    rows = [
        (
            _short(name),
            wording.count(of.get("examples")),
            wording.count(of.get("chosen")),
            *(_percents(of.get(metric)) for metric in ("precision", "recall", "f1")),
        )
        for name in names
        if (of := per_class.get(name))
    ]
    header = ("class", "examples", "chosen", "precision, %", "recall, %", "F1, %")
    parts = [layout.table(header, rows)] if rows else []
    confusion = record.get("confusion") or ()
    if len(confusion) != len(names) or len(names) > MOST_CLASSES or not all(confusion):
        return parts
    numbered = [
        (f"{number} {_short(name)}", *map(wording.count, row))
        for number, (name, row) in enumerate(zip(names, confusion, strict=True), 1)
    ]
    if all(len(row) == len(names) + 1 for row in numbered):
        parts.append(layout.table(("is, chosen as", *map(str, range(1, len(names) + 1))), numbered))
    return parts


def _examples(protocol: Record) -> str:
    said = wording.count(protocol.get("examples"))
    if protocol.get("groups") is not None and protocol.get("groups") != protocol.get("examples"):
        said += f" in {wording.count(protocol['groups'], 'group')}"
    if protocol.get("truncated"):
        said += f", {wording.count(protocol['truncated'], 'text')} cut at the model's length"
    return said


def _nats(estimate: Record | None) -> str:
    said = wording.interval(estimate)
    return said if said == wording.NOT_AVAILABLE else f"{said} nats"


def _percents(estimate: Record | None) -> str:
    """'87.1 [82.5, 90.6]': so short that all three fit beside a name."""
    value, low, high = ((estimate or {}).get(key) for key in ("value", "low", "high"))
    if value is None:
        return wording.NOT_AVAILABLE
    said = f"{100 * value:.1f}"
    return said if low is None or high is None else f"{said} [{100 * low:.1f}, {100 * high:.1f}]"


def _short(name: str) -> str:
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 3] + "..."


def _in_order(record: Record | None) -> list[Record]:
    """A pruning after those that came before it."""
    found = [record] if record else []
    while found and (before := found[0].get("before")):
        found.insert(0, before)
    return found
