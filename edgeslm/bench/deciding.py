"""How well a classifier decides, as blocks: metrics, classes, confusion, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording, wording_learning
from edgeslm.bench import charts, plots
from edgeslm.bench.blocks import Block, Figure, Notes, Table, at, colour, matrix, said_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry, Rows


def is_measured(entry: Entry) -> bool:
    """Whether an entry's quality is that of a classifier."""
    return at(entry, "quality", "accuracy") is not None or bool(at(entry, "quality", "classes"))


def deciding(entries: Sequence[Entry]) -> list[Block]:
    measured = [entry for entry in entries if is_measured(entry)]
    if not measured:
        return []
    blocks = [*matrix("Metrics with their intervals", METRIC_ROWS, measured, numbers=True)]
    blocks += _figures(measured)
    for number, entry in enumerate(measured):
        blocks += _classes(number, entry, measured)
    blocks += matrix("How it was measured", PROTOCOL_ROWS, measured)
    methods = dict.fromkeys(method for e in measured if (method := at(e, "quality", "protocol", "method")))
    if methods:
        blocks.append(Notes(title="Method", lines=list(methods)))
    return blocks


def _metric(*keys: str, as_percent: bool = False) -> Any:
    return lambda entry: wording.interval(at(entry, "quality", *keys), as_percent=as_percent)


def by_chance(quality: Mapping[str, Any]) -> str:
    """What a perfectly calibrated model's calibration error would be on so few examples."""
    value = at(quality, "expected_calibration_error", "by_chance")
    return wording.NOT_AVAILABLE if value is None else f"{value:.4f}"


METRIC_ROWS: Rows = (
    ("accuracy", _metric("accuracy", as_percent=True)),
    ("macro F1", _metric("macro", "f1")),
    ("macro precision", _metric("macro", "precision")),
    ("macro recall", _metric("macro", "recall")),
    ("log-loss, nats", _metric("log_loss")),
    ("expected calibration error", _metric("expected_calibration_error")),
    ("calibration error by chance alone", lambda e: by_chance(e.get("quality") or {})),
    ("quadratic weighted kappa", _metric("quadratic_weighted_kappa")),
    ("mean absolute error, grades", _metric("mean_absolute_error")),
)
PROTOCOL_ROWS: Rows = (
    ("examples", lambda e: wording.count(at(e, "quality", "protocol", "examples"))),
    ("groups of examples", lambda e: _groups(at(e, "quality", "protocol") or {})),
    ("texts that were cut", lambda e: wording.count(at(e, "quality", "protocol", "truncated"))),
    ("base rates", lambda e: wording_learning.base_rates(at(e, "quality", "decision") or {})),
    ("decision", lambda e: wording_learning.decision_rule(at(e, "quality", "decision") or {})),
    ("data", lambda e: ", ".join(at(e, "quality", "text", "sources") or ()) or wording.NOT_AVAILABLE),
)


def _groups(protocol: Mapping[str, Any]) -> str:
    groups = protocol.get("groups")
    return wording.NOT_AVAILABLE if groups == protocol.get("examples") else wording.count(groups)


def _figures(measured: Sequence[Entry]) -> list[Block]:
    """Accuracy and F1 of several results beside each other."""
    if len(measured) < 2:
        return []
    blocks: list[Block] = []
    for key, keys, title in (("accuracy", ("accuracy",), "Accuracy"), ("f1", ("macro", "f1"), "Macro F1")):
        rows = [
            _interval(
                entry["label"], at(entry, "quality", *keys), colour(number), as_percent=key == "accuracy"
            )
            for number, entry in enumerate(measured)
        ]
        known = [row for row in rows if row is not None]
        if known:
            svg = plots.intervals(f"task-{key}", title, known, unit=title)
            blocks.append(Figure(caption=f"{title} with its interval: more is better", svg=svg))
    return blocks


def _classes(number: int, entry: Entry, measured: Sequence[Entry]) -> list[Block]:
    """Precision, recall and F1 of every class, what is taken for what, and how sure against how right."""
    quality = entry["quality"]
    classes = [str(name) for name in quality.get("classes") or ()]
    per_class = quality.get("per_class") or {}
    blocks: list[Block] = []
    rows = [
        (
            name,
            wording.count(at(of, "examples")),
            wording.count(at(of, "chosen")),
            *(wording.interval(at(of, metric)) for metric in ("precision", "recall", "f1")),
        )
        for name in classes
        if (of := per_class.get(name))
    ]
    scores = [
        row for name in classes if (row := _interval(name, at(per_class.get(name), "f1"), colour(number)))
    ]
    if len(scores) > 1:
        svg = plots.intervals(
            f"class-f1-{number}", said_of(entry, measured, "F1 by class"), scores, unit="F1"
        )
        blocks.append(Figure(caption=said_of(entry, measured, "F1 of each class with its interval"), svg=svg))
    if rows:
        header = ("class", "examples", "chosen", "precision", "recall", "F1")
        blocks.append(Table(caption=said_of(entry, measured, "classes"), header=header, rows=rows))
    blocks += [*_confusion(number, entry, classes, measured), *_calibration(number, entry, measured)]
    return [*blocks, *_alarms(entry, measured)]


def _alarms(entry: Entry, measured: Sequence[Entry]) -> list[Block]:
    """How long before each machine's failure it was announced, and by a plain threshold."""
    alarms = at(entry, "quality", "alarms") or {}
    said = wording_learning.alarms(alarms)
    if said == wording.NOT_AVAILABLE:
        return []
    plain = f"by a threshold on {wording.text(at(alarms, 'baseline', 'name'))}"
    leads, others = (at(alarms, who, "lead_s") or {} for who in ("score", "baseline"))
    rows = [(name, _lead(lead), _lead(others.get(name))) for name, lead in leads.items()]
    gain = wording.interval(at(alarms, "gain_s"))
    lines = [
        f"{said}.",
        f"Mean gain in seconds for a machine: {gain}; {wording.count(alarms.get('earlier'))} earlier, "
        f"{wording.count(alarms.get('later'))} later.",
        f"An alarm more than {wording.duration(alarms.get('warning_s'))} before the failure is false; both "
        "watch at the same moments, one a row; the plain threshold is the best for these very machines.",
    ]
    return [
        Notes(title=said_of(entry, measured, "alarms"), lines=lines),
        Table(
            caption=said_of(entry, measured, "announced before failure"),
            header=("machine", "by the model", plain),
            rows=rows,
        ),
    ]


def _lead(seconds: float | None) -> str:
    return "missed" if seconds is None else wording.duration(seconds)


def _confusion(number: int, entry: Entry, classes: Sequence[str], measured: Sequence[Entry]) -> list[Block]:
    counts = at(entry, "quality", "confusion") or ()
    square = len(counts) == len(classes) and all(len(row or ()) == len(classes) for row in counts)
    if not classes or not square:
        return []
    blocks: list[Block] = []
    said = said_of(entry, measured, "confusion matrix")
    if len(classes) <= charts.MOST_CLASSES:
        svg = charts.confusion(f"confusion-{number}", said, classes, counts)
        caption = f"{said}: rows are what it is, columns what was chosen; shaded by the share of the row"
        blocks.append(Figure(caption=caption, svg=svg))
        rows = [(name, *map(wording.count, row)) for name, row in zip(classes, counts, strict=True)]
        blocks.append(Table(caption=f"{said}, counts", header=("is, chosen as", *classes), rows=rows))
    mistakes = sorted(
        (
            (count, name, other)
            for name, row in zip(classes, counts, strict=True)
            for other, count in zip(classes, row, strict=True)
            if other != name and count
        ),
        key=lambda mistake: (-mistake[0], mistake[1], mistake[2]),
    )
    if len(classes) > 2 and mistakes:
        lines = [f"{name} taken for {other}: {wording.count(count)}" for count, name, other in mistakes[:5]]
        blocks.append(Notes(title=said_of(entry, measured, "most frequent mistakes"), lines=lines))
    return blocks


def _calibration(number: int, entry: Entry, measured: Sequence[Entry]) -> list[Block]:
    bins = [
        each
        for each in at(entry, "quality", "reliability") or ()
        if all(each.get(key) is not None for key in ("low", "high", "examples", "accuracy"))
    ]
    if not bins:
        return []
    drawn = [
        charts.Bin(**{key: each[key] for key in ("low", "high", "examples", "accuracy")}) for each in bins
    ]
    said = said_of(entry, measured, "how sure against how right")
    rows = [
        (
            f"{wording.percent(each['low'], 0)[:-2]} to {wording.percent(each['high'], 0)}",
            wording.count(each["examples"]),
            wording.percent(each.get("certainty")),
            wording.percent(each["accuracy"]),
        )
        for each in bins
    ]
    return [
        Figure(
            caption=f"{said}: bars that end at the dashed line are calibrated",
            svg=charts.reliability(f"reliability-{number}", said, drawn),
        ),
        Table(
            caption=said_of(entry, measured, "calibration"),
            header=("probability", "examples", "mean probability", "right"),
            rows=rows,
        ),
    ]


def _interval(
    label: str, estimate: Mapping[str, Any] | None, of_colour: int, *, as_percent: bool = False
) -> plots.Interval | None:
    if estimate is None or estimate.get("value") is None:
        return None
    low, high = estimate.get("low"), estimate.get("high")
    text = wording.interval(estimate, as_percent=as_percent)
    return plots.Interval(
        label=label, text=text, value=estimate["value"], low=low, high=high, colour=of_colour
    )
