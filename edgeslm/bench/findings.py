"""What the measurements say, as blocks: quality, size, speed, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.bench import plots
from edgeslm.bench.blocks import (
    Block,
    Figure,
    Notes,
    Table,
    at,
    bench_runs,
    colour,
    matrix,
    said_of,
    whose,
)  # fmt: skip
from edgeslm.bench.deciding import is_measured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry, Rows

LOGARITHMIC_FROM = 20
"""Ratio between the largest and the smallest value from which an axis is logarithmic."""


def quality(entries: Sequence[Entry]) -> list[Block]:
    measured = [entry for entry in entries if entry.get("quality") and not is_measured(entry)]
    if not measured:
        return []
    blocks: list[Block] = []
    perplexities = _perplexities(measured)
    if len(perplexities) > 1:
        svg = plots.intervals("perplexity", "Perplexity", perplexities, unit="perplexity")
        blocks.append(Figure(caption="Perplexity with its interval: less is better", svg=svg))
    divergences = _divergences(measured)
    if divergences:
        logarithmic = _spans(divergences)
        what = (
            "KL divergence to the reference" if len(measured) == 1 else "Mean KL divergence to the reference"
        )
        svg = plots.intervals("kl", what, divergences, unit="nats", logarithmic=logarithmic)
        blocks.append(Figure(caption=f"{what}, in nats: less is better", svg=svg))
    level = {quality.get("confidence") for entry in measured if (quality := entry["quality"])}
    percent = f"{min(level) * 100:g} % " if len(level) == 1 and None not in level else ""
    blocks += matrix(f"Quality with {percent}intervals", QUALITY_ROWS, measured, numbers=True)
    for entry in measured:
        blocks += _levels(entry, measured)
    blocks += matrix("How it was measured", PROTOCOL_ROWS, measured)
    methods = dict.fromkeys(method for e in measured if (method := at(e, "quality", "protocol", "method")))
    if methods:
        blocks.append(Notes(title="Method", lines=list(methods)))
    return blocks


QUALITY_ROWS: Rows = (
    ("reference perplexity", lambda e: wording.interval(at(e, "quality", "reference_perplexity"))),
    ("perplexity", lambda e: wording.interval(at(e, "quality", "perplexity"))),
    ("perplexity ratio", lambda e: wording.interval(at(e, "quality", "perplexity_ratio"))),
    ("KL divergence, mean", lambda e: wording.interval(at(e, "quality", "kl_nats", "mean"))),
    ("KL divergence, median", lambda e: wording.interval(at(e, "quality", "kl_nats", "median"))),
    ("KL divergence, p99", lambda e: wording.interval(at(e, "quality", "kl_nats", "p99"))),
    ("KL divergence, max", lambda e: wording.interval(at(e, "quality", "kl_nats", "max"))),
    ("top-1 agreement", lambda e: wording.interval(at(e, "quality", "top1_agreement"), as_percent=True)),
)
PROTOCOL_ROWS: Rows = (
    ("reference", lambda e: _reference(e) if at(e, "quality", "reference") else wording.NOT_AVAILABLE),
    ("text", lambda e: ", ".join(at(e, "quality", "text", "sources") or ()) or wording.NOT_AVAILABLE),
    ("tokens scored", lambda e: wording.count(at(e, "quality", "protocol", "scored_tokens"))),
    ("windows", lambda e: f"{wording.count(at(e, 'quality', 'protocol', 'windows'))} of "
                          f"{wording.count(at(e, 'quality', 'protocol', 'context'), 'token')}"),
)  # fmt: skip


ACTIVATIONS = ("float32, by default", "float32", "float16", "bfloat16", "int8")
"""What each accuracy level of a product with 4-bit or 8-bit weights may compute in."""


def _levels(entry: Entry, entries: Sequence[Entry]) -> list[Block]:
    """The accuracy level of an ONNX model that was chosen, and what the others cost and give."""
    audit = at(entry, "quality", "accuracy_level") or {}
    columns: tuple[tuple[str, str, Any], ...] = (
        ("same likeliest token as level 0", "top1_agreement", wording.percent),
        ("KL divergence to level 0, nats", "kl_nats", lambda value: wording.interval({"value": value})),
        ("prefill", "prefill_tokens_per_s", wording.rate),
        ("decode", "decode_tokens_per_s", wording.rate),
    )
    levels = [of for of in audit.get("levels") or () if of.get("level") is not None]
    known = [column for column in columns if any(of.get(column[1]) is not None for of in levels)]
    rows = [
        (
            f"{of['level']:.0f}{' (chosen)' if of['level'] == audit.get('chosen') else ''}",
            ACTIVATIONS[int(of["level"])]
            if of["level"] in range(len(ACTIVATIONS))
            else wording.NOT_AVAILABLE,
            *(show(of.get(key)) for _, key, show in known),
        )
        for of in levels
    ]
    header = ("accuracy level", "activations", *(name for name, _, _ in known))
    caption = said_of(entry, entries, "accuracy levels")
    return [Table(caption=caption, header=header, rows=rows, left=2)] if rows else []


def _perplexities(entries: Sequence[Entry]) -> list[plots.Interval]:
    """Each reference once, then the artifacts."""
    references: dict[tuple[Any, ...], plots.Interval] = {}
    artifacts = []
    for number, entry in enumerate(entries):
        name = f"before: {_reference(entry)}"
        for row in _interval(name, at(entry, "quality", "reference_perplexity"), 5):
            references.setdefault((row.value, row.low, row.high), row)
        name = entry["label"] if len(entries) > 1 else f"after: {entry['label']}"
        artifacts += _interval(name, at(entry, "quality", "perplexity"), colour(number))
    return [*references.values(), *artifacts]


def _divergences(entries: Sequence[Entry]) -> list[plots.Interval]:
    if len(entries) > 1:
        return [
            row
            for number, entry in enumerate(entries)
            for row in _interval(entry["label"], at(entry, "quality", "kl_nats", "mean"), colour(number))
        ]
    names = ("median", "mean", "p99", "max")
    kl = at(entries[0], "quality", "kl_nats") or {}
    return [row for name in names for row in _interval(name, kl.get(name), 1)]


def size(entries: Sequence[Entry]) -> list[Block]:
    plans = [entry for entry in entries if at(entry, "quantization", "types")]
    if not plans:
        return []
    order = _type_colours(plans)
    head = ("result",) if len(entries) > 1 else ()
    rows, colours, stacks = [], [], []
    for entry in plans:
        types = entry["quantization"]["types"]
        total = sum(at(of, "bytes") or 0 for of in types.values()) or 1
        segments = []
        for name in sorted(types, key=list(order).index):
            of = types[name]
            share = wording.percent((at(of, "bytes") or 0) / total)
            rows.append((*whose(entry, entries), name, *_sums(of), share))
            colours.append(order[name])
            segments.append((name, at(of, "bytes") or 0, order[name]))
        said = (
            f"{wording.size(total)}, {wording.significant(at(entry, 'quantization', 'bits_per_weight'))} bits"
        )
        stacks.append(plots.Stack(label=entry["label"], text=said, segments=segments))
    header = (*head, "type", "tensors", "parameters", "size", "bits per weight", "share")
    svg = plots.stacks("types", "Bytes by tensor type", stacks)
    blocks: list[Block] = [
        Figure(caption="Where the bytes are, by tensor type", svg=svg),
        Table(caption="Tensor types", header=header, rows=rows, left=len(header) - 5, colours=colours),
    ]
    if len(entries) == 1 and entries[0].get("kinds"):
        blocks += _kinds(entries[0]["kinds"], order)
    for entry in plans:
        fallbacks = entry["quantization"].get("fallbacks") or ()
        if fallbacks:
            said = f"{wording.count(len(fallbacks), 'tensor')} fell back to another type than the scheme's"
            lines = wording.fallback_lines(fallbacks)
            blocks.append(Notes(title=said_of(entry, entries, said), lines=lines))
    return blocks


def _kinds(kinds: Sequence[Mapping[str, Any]], order: Mapping[str, int]) -> list[Block]:
    largest = max(kind.get("bytes") or 0 for kind in kinds)
    rows, stacks = [], []
    for kind in kinds:
        name, types = wording.text(kind.get("kind")), kind.get("types") or {}
        rows.append((name, ", ".join(types), *_sums(kind)))
        if (kind.get("bytes") or 0) * 200 > largest:  # a hair is no bar
            segments = [(each, at(of, "bytes") or 0, order.get(each, 5)) for each, of in types.items()]
            said = ", ".join((wording.size(kind.get("bytes")), *types))
            stacks.append(plots.Stack(label=name, text=said, segments=segments))
    header = ("kind", "types", "tensors", "parameters", "size", "bits per weight")
    svg = plots.stacks("kinds", "Bytes by kind of tensor", stacks)
    return [
        Figure(caption="Where the bytes are, by kind of tensor", svg=svg),
        Table(caption="Kinds of tensors", header=header, rows=rows, left=2),
    ]


def speed(entries: Sequence[Entry]) -> list[Block]:
    blocks: list[Block] = []
    timed = [entry for entry in entries if bench_runs(entry)]
    head = ("result",) if len(entries) > 1 else ()
    for kind, name in (("prefill", "Prefill"), ("decode", "Decode"), ("predict", "Classifying")):
        runs = [(number, entry, run) for number, entry in enumerate(timed) for run in bench_runs(entry)
                if run.get("kind") == kind and wording.speed_of(run) is not None]  # fmt: skip
        if not runs:
            continue
        rows = [_bar(run, colour(number), _run_label(entry, run, timed)) for number, entry, run in runs]
        unit = "examples/s" if kind == "predict" else "tokens/s"
        svg = plots.bars(kind, f"{name} speed", rows, unit=unit)
        said = f"{name}, {unit}: more is better"
        said += "; the outline ends at the ceiling that memory bandwidth sets" if kind == "decode" else ""
        columns = wording.RUN_COLUMNS[kind]
        cells = [(*whose(entry, entries), *(show(run) for _, show in columns)) for _, entry, run in runs]
        header = (*head, *(name for name, _ in columns))
        keep = [
            i for i in range(len(header)) if any(row[i] not in ("", wording.NOT_AVAILABLE) for row in cells)
        ]
        blocks += [
            Figure(caption=said, svg=svg),
            Table(
                caption=name, header=[header[i] for i in keep], rows=[[row[i] for i in keep] for row in cells],
                left=len(head),
            ),
        ]  # fmt: skip
    for entry in timed:
        reasons = wording.invalid_reasons(entry["bench"])
        if reasons:
            blocks.append(Notes(title=said_of(entry, entries, "INVALID runs"), lines=reasons, bad=True))
    return blocks


def _bar(run: Mapping[str, Any], colour: int, label: str) -> plots.Bar:
    speed = wording.speed_of(run) or 0.0
    if run.get("kind") == "predict":
        work, text = (run.get("calls") or 0) * (run.get("batch") or 0), wording.item_rate(speed)
    else:
        work, text = run.get("tokens") or 0, wording.rate(speed)
    rates = [work / seconds for seconds in run.get("samples_s") or () if seconds > 0 and work]
    valid = run.get("valid") is not False
    if valid and run.get("ceiling_fraction") is not None:
        text += f", {wording.percent(run['ceiling_fraction'], 0)} of ceiling"
    return plots.Bar(
        label=label, text=text if valid else f"INVALID {text}", value=speed,
        low=min(rates, default=None), high=max(rates, default=None), ceiling=run.get("ceiling_tokens_per_s"),
        valid=valid, colour=colour,
    )  # fmt: skip


def memory(entries: Sequence[Entry]) -> list[Block]:
    known = [entry for entry in entries if at(entry, "bench", "memory", "peak_rss_bytes") is not None]
    if not known:
        return []
    stacks = []
    for entry in known:
        memory = entry["bench"]["memory"]
        parts = [
            ("file-backed", memory.get("file_backed_bytes"), 1),
            ("anonymous", memory.get("anonymous_bytes"), 2),
        ]
        segments = [(name, value, colour) for name, value, colour in parts if value is not None]
        rest = memory["peak_rss_bytes"] - sum(value for _, value, _ in segments)
        segments += [("not attributed", rest, 5)] if rest > 0 else []
        text = wording.size(memory["peak_rss_bytes"])
        stacks.append(plots.Stack(label=entry["label"], text=text, segments=segments))
    svg = plots.stacks("rss", "Peak resident memory", stacks)
    said = "Peak resident memory; file-backed pages are the mapped weights, which the system can drop"
    rows: Rows = (
        ("peak RSS", lambda e: wording.size(at(e, "bench", "memory", "peak_rss_bytes"))),
        ("file-backed", lambda e: wording.size(at(e, "bench", "memory", "file_backed_bytes"))),
        ("anonymous", lambda e: wording.size(at(e, "bench", "memory", "anonymous_bytes"))),
        ("weights", lambda e: wording.size(at(e, "artifact", "weight_bytes"))),
        ("time to load", lambda e: wording.duration(at(e, "bench", "load_s"))),
    )
    return [Figure(caption=said, svg=svg), *matrix("Memory", rows, known, numbers=True)]


def _interval(label: str, estimate: Mapping[str, Any] | None, of_colour: int) -> list[plots.Interval]:
    """A row of a plot, or none for what was not measured."""
    if estimate is None or estimate.get("value") is None:
        return []
    return [
        plots.Interval(
            label=label, text=wording.interval(estimate), value=estimate["value"], low=estimate.get("low"),
            high=estimate.get("high"), colour=of_colour,
        )
    ]  # fmt: skip


def _spans(rows: Sequence[plots.Interval]) -> bool:
    """Whether the values are too far apart for a linear axis."""
    values = [row.value for row in rows if row.value > 0]
    return bool(values) and max(values) > LOGARITHMIC_FROM * min(values)


def _reference(entry: Entry) -> str:
    reference = at(entry, "quality", "reference") or {}
    return str(reference.get("name") or reference.get("description") or "reference")


def _type_colours(plans: Sequence[Entry]) -> dict[str, int]:
    """A colour for each tensor type of the report, the types of most bits first."""
    widths: dict[str, float] = {}
    for entry in plans:
        for name, of in entry["quantization"]["types"].items():
            widths[name] = max(widths.get(name, 0.0), (at(of, "bytes") or 0) / (at(of, "parameters") or 1))
    ordered = sorted(widths, key=lambda name: (widths[name], name))
    return {name: colour(number) for number, name in enumerate(ordered)}


def _sums(group: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    group = group or {}
    return (
        wording.count(group.get("tensors")), wording.parameters(group.get("parameters")),
        wording.size(group.get("bytes")), wording.bits(group),
    )  # fmt: skip


def _run_label(entry: Entry, run: Mapping[str, Any], timed: Sequence[Entry]) -> str:
    """What tells the bars of a plot apart: the result, the conditions, or both."""
    conditions = {
        wording.conditions(each)
        for other in timed
        for each in bench_runs(other)
        if each.get("kind") == run.get("kind")
    }
    parts = [
        *whose(entry, timed),
        *([wording.conditions(run)] if len(conditions) > 1 or len(timed) == 1 else []),
    ]
    return "\n".join(parts)
