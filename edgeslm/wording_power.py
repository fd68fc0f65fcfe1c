"""Power, heat and the speed that lasts in words, the same on the terminal and in a report.

Like wording.py: None is NOT_AVAILABLE, and the text is ASCII.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Record = Mapping[str, Any]

MOST_ROWS = 12
"""Of the curve as a table."""


def watts(value: float | None) -> str:
    return wording.NOT_AVAILABLE if value is None else f"{wording.significant(value)} W"


def energy(value_j: float | None) -> str:
    """'1.24 J', '83.0 mJ', '4.03 kJ'."""
    if value_j is None:
        return wording.NOT_AVAILABLE
    for scale, unit in ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ")):
        if abs(value_j) >= scale:
            return f"{wording.significant(value_j / scale)} {unit}"
    return f"{wording.significant(value_j * 1e6)} uJ"


def energy_per_unit(power: Record | None) -> str:
    """'0.412 J/token'."""
    for unit in ("token", "example"):
        value = (power or {}).get(f"joules_per_{unit}")
        if value is not None:
            return f"{energy(value)}/{unit}"
    return wording.NOT_AVAILABLE


def source(power: Record | None) -> str:
    """'rapl: package-0, dram'."""
    if not power:
        return wording.NOT_AVAILABLE
    return ": ".join(str(power[key]) for key in ("source", "covers") if power.get(key))


def temperature(heat: Record | None) -> str:
    """'52 C to 78 C, at most 81 C'."""
    degrees = (heat or {}).get("temperature_c") or {}
    if degrees.get("start") is None:
        return wording.NOT_AVAILABLE
    start, end, most = (wording.celsius(degrees.get(key)) for key in ("start", "end", "max"))
    return f"{start} to {end}, at most {most}"


def clock(heat: Record | None) -> str:
    """The lowest clock of the fastest core in a run."""
    return wording.frequency(((heat or {}).get("frequency_hz") or {}).get("min"))


RUN_COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("energy", lambda run: energy((run.get("power") or {}).get("energy_j"))),
    ("per unit", lambda run: energy_per_unit(run.get("power"))),
    ("mean power", lambda run: watts((run.get("power") or {}).get("mean_w"))),
    ("highest", lambda run: watts((run.get("power") or {}).get("max_w"))),
    ("temperature", lambda run: temperature(run.get("thermal"))),
    ("lowest clock", lambda run: clock(run.get("thermal"))),
    ("slowed by", lambda run: ", ".join((run.get("thermal") or {}).get("flags") or ())),
)
"""What a run took and how warm it got."""


def run_rows(runs: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the runs with power or heat, without columns that nobody knows; ((), []) for none."""
    known = [run for run in runs if run.get("power") or run.get("thermal")]
    cells = [(name_of(run), *(show(run) for _, show in RUN_COLUMNS)) for run in known]
    keep = [
        column
        for column in range(1 + len(RUN_COLUMNS))
        if any(row[column] not in ("", wording.NOT_AVAILABLE) for row in cells)
    ]
    header = ("run", *(name for name, _ in RUN_COLUMNS))
    if len(keep) < 2:
        return (), []
    return tuple(header[column] for column in keep), [tuple(row[column] for column in keep) for row in cells]


def name_of(run: Record) -> str:
    """'decode, 128 tokens, 4 threads'; of a run of minutes 'sustained decode, ...'."""
    kind = f"{'sustained ' if run.get('curve') else ''}{wording.text(run.get('kind'))}"
    return f"{kind}, {wording.conditions(run)}"


def rate(value: float | None, unit: str | None) -> str:
    return wording.item_rate(value) if unit == "example" else wording.rate(value)


def lasting(sustained: Record) -> str:
    """'9.31 tokens/s from 3 min 20 s on, 78.1 % of the 11.9 tokens/s at the start'."""
    steady, unit = sustained.get("steady") or {}, sustained.get("unit")
    parts = [rate(steady.get("rate_per_s"), unit)]
    if not steady.get("reached"):
        parts.append("and still changing: go on for longer")
    elif steady.get("from_s"):
        parts.append(f"from {wording.duration(steady['from_s'])} on")
    else:
        parts.append("from the start")
    said = f"{parts[0]} {parts[1]}"
    if steady.get("fraction_of_start") is not None:
        start = rate(sustained.get("start_rate_per_s"), unit)
        said += f", {wording.percent(steady['fraction_of_start'])} of the {start} at the start"
    return said


def sustained_facts(sustained: Record) -> list[tuple[str, str]]:
    """What was done for how long, what lasts, and at what temperature, clock and power."""
    steady = sustained.get("steady") or {}
    facts = [
        ("endurance", f"{name_of(sustained)}, {wording.duration(sustained.get('seconds'))}"),
        ("  lasting", lasting(sustained)),
        ("  temperature", wording.celsius(steady.get("temperature_c"))),
        ("  clock", wording.frequency(steady.get("frequency_hz"))),
        ("  power", watts(steady.get("power_w"))),
        ("  energy", energy_per_unit(steady)),
        ("  validity", "INVALID" if sustained.get("valid") is False else ""),
    ]
    return [(name, value) for name, value in facts if value not in ("", wording.NOT_AVAILABLE)]


CURVE_COLUMNS = (
    ("temperature", "temperature_c", wording.celsius),
    ("clock", "frequency_hz", wording.frequency),
    ("power", "power_w", watts),
)


def curve_rows(sustained: Record) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and at most MOST_ROWS rows of the curve, neighbours joined; columns that nobody knows left out."""
    points = list(sustained.get("curve") or ())
    unit = "examples/s" if sustained.get("unit") == "example" else "tokens/s"
    size = -(-len(points) // MOST_ROWS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    columns = [each for each in CURVE_COLUMNS if any(point.get(each[1]) is not None for point in points)]
    rows = []
    for group in groups:
        seconds = sum(point.get("seconds") or 0.0 for point in group)
        work = sum((point.get("rate_per_s") or 0.0) * (point.get("seconds") or 0.0) for point in group)
        flags = dict.fromkeys(flag for point in group for flag in point.get("flags") or ())
        cells = [show(_mean(group, key)) for _, key, show in columns]
        speed = wording.rate_number(work / seconds if seconds else None)
        rows.append((_minutes(group[0].get("at_s") or 0.0), speed, *cells, ", ".join(flags)))
    header = ("minute", unit, *(name for name, _, _ in columns), "slowed by")
    if not any(row[-1] for row in rows):
        return header[:-1], [row[:-1] for row in rows]
    return header, rows


def _minutes(seconds: float) -> str:
    """'3:05'."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _mean(points: Sequence[Record], key: str) -> float | None:
    known = [point[key] for point in points if point.get(key) is not None]
    return sum(known) / len(known) if known else None
