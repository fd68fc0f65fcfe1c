"""What a run takes and how long its speed lasts, as blocks of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording_power
from edgeslm.bench import charts
from edgeslm.bench.blocks import Block, Figure, Notes, Table, at, bench_runs, colour, said_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry

CURVES = (
    ("rate_per_s", "Speed while it went on", 1.0),
    ("temperature_c", "Temperature of the processor", 1.0),
    ("frequency_hz", "Clock of the fastest core", 1e-9),
    ("power_w", "Power", 1.0),
)
"""Key of a point, caption, and what makes it the unit of the axis."""


def power_and_heat(entries: Sequence[Entry]) -> list[Block]:
    """The curves of sustained runs with what lasts, then energy and heat of every run."""
    blocks: list[Block] = []
    lasting = [
        (number, entry) for number, entry in enumerate(entries) if at(entry, "bench", "sustained", "curve")
    ]
    for unit in ("token", "example"):
        some = [each for each in lasting if (at(each[1], "bench", "sustained", "unit") or "token") == unit]
        for key, caption, scale in CURVES:
            blocks += _curves(some, unit, key, caption, scale)
    for _, entry in lasting:
        sustained = entry["bench"]["sustained"]
        facts = [f"{name.strip()}: {value}" for name, value in wording_power.sustained_facts(sustained)]
        blocks.append(Notes(title=said_of(entry, entries, "what lasts"), lines=facts))
        header, rows = wording_power.curve_rows(sustained)
        blocks.append(Table(caption=said_of(entry, entries, "over time"), header=header, rows=rows))
    for entry in entries:
        blocks += _runs(entry, entries)
    return blocks


def _curves(
    entries: Sequence[tuple[int, Entry]], unit: str, key: str, caption: str, scale: float
) -> list[Block]:
    """One plot with a line for each result that knows the quantity; none if nobody does."""
    lines = []
    for number, entry in entries:
        points = [
            (((point.get("at_s") or 0.0) + (point.get("seconds") or 0.0) / 2) / 60, point[key] * scale)
            for point in entry["bench"]["sustained"]["curve"]
            if point.get(key) is not None
        ]
        if points:
            label = f"{entry['label']}, {wording_power.name_of(entry['bench']['sustained'])}"
            lines.append(charts.Curve(label=label, points=points, colour=colour(number)))
    units = {"rate_per_s": f"{unit}s/s", "temperature_c": "C", "frequency_hz": "GHz", "power_w": "W"}
    if not lines:
        return []
    name = f"lasting-{unit}-{key.partition('_')[0]}"
    svg = charts.curves(
        name, caption, lines, x_unit="minutes", y_unit=units[key], from_zero=key != "temperature_c"
    )
    return [Figure(caption=f"{caption}, {units[key]}", svg=svg)]


def _runs(entry: Entry, entries: Sequence[Entry]) -> list[Block]:
    sustained: Mapping[str, Any] | None = at(entry, "bench", "sustained")
    header, rows = wording_power.run_rows([*bench_runs(entry), *([sustained] if sustained else [])])
    power = at(entry, "bench", "power")
    blocks: list[Block] = []
    if rows:
        said = said_of(entry, entries, "energy and heat of each run")
        blocks.append(Table(caption=said, header=header, rows=rows))
    if power:
        lines = [f"energy from {wording_power.source(power)}", *(power.get("notes") or ())]
        blocks.append(Notes(title=said_of(entry, entries, "where the energy is from"), lines=lines))
    return blocks
