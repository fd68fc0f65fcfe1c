"""What a model learned from and how, and what was cut out of it, as blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording, wording_learning
from edgeslm.bench import charts, plots
from edgeslm.bench.blocks import Block, Figure, Notes, Table, at, colour, matrix, said_of, whose

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry, Rows

    Record = Mapping[str, Any]


def _once(entries: Sequence[Entry], key: str) -> list[Entry]:
    """Entries with something under a key; those that learned together are one, under the names of all."""
    known: list[dict[str, Any]] = []
    for entry in entries:
        same = next((other for other in known if other[key] == entry.get(key)), None)
        if same is not None:
            same["label"] = f"{same['label']}, {entry['label']}"
        elif entry.get(key):
            known.append(dict(entry))
    return list(known)


def data(entries: Sequence[Entry]) -> list[Block]:
    """Counts of both sides of the split, the classes' balance, what was left out, masked or there twice."""
    known = _once(entries, "data")
    if not known:
        return []
    blocks = matrix("What it learned from", DATA_ROWS, known)
    for number, entry in enumerate(known):
        blocks += _balance(number, entry, known)
        warnings = wording_learning.data_warnings(entry["data"])
        if warnings:
            blocks.append(Notes(title=said_of(entry, known, "about the data"), lines=warnings, bad=True))
    return blocks


DATA_ROWS: Rows = (
    ("training", lambda e: wording_learning.data_side(at(e, "data", "train") or {})),
    ("held out", lambda e: wording_learning.data_side(at(e, "data", "heldout") or {})),
    ("split by", lambda e: wording.text(at(e, "data", "split_by"))),
    ("in both", lambda e: wording.count(at(e, "data", "duplicates"))),
    ("texts that were cut", lambda e: wording.count(at(e, "data", "truncated"))),
    ("unusable rows", lambda e: wording.count(at(e, "data", "bad_rows"))),
    ("rows of the same time", lambda e: wording.count(at(e, "data", "repeated_rows"))),
    ("gaps in time", lambda e: wording.count(at(e, "data", "gaps"))),
    ("missing readings", lambda e: wording.percent(at(e, "data", "missing_readings"), 2)),
    ("masked", lambda e: wording_learning.masked(at(e, "data", "scrubbed"))),
    ("channels", lambda e: ", ".join(at(e, "data", "channels") or ())),
    ("licence", lambda e: wording.text(at(e, "data", "licence"))),
)


def _balance(number: int, entry: Entry, known: Sequence[Entry]) -> list[Block]:
    sides = [
        (name, at(entry, "data", key, "classes") or {})
        for name, key in (("training", "train"), ("held out", "heldout"))
    ]
    classes = list(dict.fromkeys(name for _, counts in sides for name in counts))
    totals = [sum(count or 0 for count in counts.values()) for _, counts in sides]
    if not classes or not totals[0]:
        return []
    stacks = [
        plots.Stack(
            label=name, text=wording.count(total, "example"),
            segments=[(label, (counts.get(label) or 0) / total, colour(i)) for i, label in enumerate(classes)],
        )
        for (name, counts), total in zip(sides, totals, strict=True)
        if total
    ]  # fmt: skip
    rows = [
        (
            label,
            *(
                cell
                for (_, counts), total in zip(sides, totals, strict=True)
                for cell in (
                    wording.count(counts.get(label)),
                    wording.percent((counts.get(label) or 0) / total) if total else wording.NOT_AVAILABLE,
                )
            ),
        )
        for label in classes
    ]
    said = said_of(entry, known, "balance of the classes")
    header = ("class", "training", "share", "held out", "share of held out")
    return [
        Figure(caption=said, svg=plots.stacks(f"balance-{number}", said, stacks)),
        Table(
            caption=said_of(entry, known, "classes"), header=header, rows=rows,
            colours=[colour(i) for i in range(len(classes))],
        ),
    ]  # fmt: skip


def training(entries: Sequence[Entry]) -> list[Block]:
    """The loss over the steps of every training, and its facts."""
    known = _once(entries, "training")
    if not known:
        return []
    blocks: list[Block] = []
    runs = [(entry, record) for entry in known for record in entry["training"] or () if record]
    several = [{"label": _label(entry, record, known), "record": record} for entry, record in runs]
    for number, run in enumerate(several):
        blocks += _curve(number, run["label"], run["record"])
    for run in several:
        run["label"] = run["label"] or "training"
    return [*blocks, *matrix("Training", TRAINING_ROWS, several)]


def _label(entry: Entry, record: Record, known: Sequence[Entry]) -> str:
    stage = wording_learning.STAGES.get(record.get("stage") or "", record.get("stage") or "")
    return ": ".join(part for part in (*whose(entry, known), stage) if part)


def _run(*keys: str) -> Any:
    return lambda run: at(run["record"], *keys)


TRAINING_ROWS: Rows = (
    ("steps", lambda e: wording_learning.training_length(e["record"])),
    ("learned from", lambda e: wording_learning.training_amount(e["record"])),
    ("took", lambda e: wording_learning.training_time(e["record"])),
    ("held-out loss", lambda e: wording_learning.heldout_loss(e["record"])),
    ("held-out metrics", lambda e: wording_learning.heldout_figures(e["record"])),
    ("method", lambda e: wording.text(e["record"].get("method"))),
    ("trained parameters", lambda e: wording.parameters(e["record"].get("trained_parameters"))),
    ("precision", lambda e: wording.text(e["record"].get("precision"))),
    ("processes", lambda e: wording.count(e["record"].get("processes"))),
    ("resumed from step", lambda e: wording.count(e["record"].get("resumed_from"))),
    (
        "seed",
        lambda e: wording.NOT_AVAILABLE if at(e["record"], "seed") is None else f"{e['record']['seed']:.0f}",
    ),
)


def _curve(number: int, label: str, record: Record) -> list[Block]:
    """Loss of the steps and of the evaluations; nothing where there are fewer than two points."""
    steps = _points(record.get("curve"))
    held = _points(record.get("evaluations"))
    if len(steps) < 2 and len(held) < 2:
        return []
    # The first steps of a fresh head may lie so high that the rest would be a flat line.
    lines = [charts.Curve(label="training", points=steps, colour=1),
             charts.Curve(label="held out", points=held, colour=2, dots=True)]  # fmt: skip
    said = f"{label}: loss" if label else "Loss"
    svg = charts.curves(f"loss-{number}", said, lines, x_unit="step", y_unit="loss, nats")
    return [Figure(caption=f"{said} over the steps, in nats: less is better", svg=svg)]


def _points(found: Sequence[Record] | None) -> list[tuple[float, float]]:
    """(step, loss) in order, without what was not measured."""
    points = [
        (each["step"], each["loss"])
        for each in found or ()
        if each.get("step") is not None and each.get("loss") is not None
    ]
    return sorted(points)


def pruning(entries: Sequence[Entry]) -> list[Block]:
    """What was cut: parameters, layers by influence, widths and tokens before and after."""
    known = _once(entries, "prune")
    blocks: list[Block] = []
    for number, entry in enumerate(known):
        for turn, record in enumerate(_in_order(entry["prune"])):
            blocks += _one_pruning(f"{number}-{turn}", entry, record, known)
    return blocks


def _in_order(record: Record) -> list[Record]:
    """A pruning after those that came before it; a record can't nest deeper than JSON was read."""
    found = [record]
    while isinstance(before := found[0].get("before"), dict) and before:
        found.insert(0, before)
    return found


def _one_pruning(number: str, entry: Entry, record: Record, known: Sequence[Entry]) -> list[Block]:
    blocks: list[Block] = []
    rows = wording_learning.pruned_rows(record)
    if rows:
        caption = said_of(entry, known, "what was cut")
        blocks.append(Table(caption=caption, header=("", "before", "after", "kept"), rows=rows))
    dropped = sorted(set(record.get("dropped_layers") or ()))
    if dropped:
        lines = [", ".join(f"{layer:.0f}" for layer in dropped)]
        blocks.append(Notes(title=said_of(entry, known, "layers that were cut"), lines=lines))
    influence = record.get("influence") or ()
    if influence and None not in influence:
        said = said_of(entry, known, "influence of each layer")
        by = (
            "perplexity" if record.get("layers_by") == "perplexity" else "cosine distance of input and output"
        )
        outlined = [layer in dropped for layer in range(len(influence))]
        values = [max(score, 0.0) for score in influence]
        svg = charts.columns(f"influence-{number}", said, values, outlined, x_unit="layer", y_unit=by)
        blocks.append(Figure(caption=f"{said}, by {by}; the outlined ones were cut", svg=svg))
    if record.get("notes"):
        blocks.append(Notes(title=said_of(entry, known, "about the cut"), lines=record["notes"]))
    return blocks
