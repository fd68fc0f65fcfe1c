"""The log of a power meter, and the energy of runs that were measured while it wrote.

A table with a header (comma, semicolon or tab) with a time and either power or voltage and current, as USB
meters and their programs write them; or what macOS' powermetrics prints.  Times are matched with the
record's, so meter and machine must agree on what time it is.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.bench.power import energy_between, energy_record, parse_powermetrics
from edgeslm.bench.sustained import energy_at
from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

MAX_BYTES = 2**28
MILLISECONDS_FROM = 1e11
"""Seconds since 1970 are below this number until the year 5138, milliseconds are above it since 1973."""
_HINT = "a header and rows such as time,voltage,current or timestamp,power_w; or what powermetrics printed"
_SAMPLED = re.compile(r"^\*\*\* Sampled system activity \((.+?)\) \(([\d.]+)ms elapsed\) \*\*\*", re.M)
_PREFIXES = {"m": 1e-3, "u": 1e-6, "k": 1e3, "": 1.0}


@dataclass(frozen=True, kw_only=True)
class PowerLog:
    """Watts over time since 1970: [N] each, in order of time."""

    name: str
    times_unix_s: Sequence[float]
    watts: Sequence[float]
    skipped: int
    """Rows that could not be read."""


def read_log(path: Path) -> PowerLog:
    """A meter's log.  Raises DataError naming the file and what it lacks."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: too big for a power log", hint="cut it to the time of the benchmark")
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint=_HINT) from error
    rows, skipped = _powermetrics(text) if _SAMPLED.search(text) else _table(text, path)
    if not rows:
        raise DataError(f"{path}: no row has a time and a power", hint=_HINT)
    rows.sort()
    return PowerLog(
        name=path.name,
        times_unix_s=[at for at, _ in rows],
        watts=[watts for _, watts in rows],
        skipped=skipped,
    )


def measure_again(path: Path, log: Path) -> dict[str, Any]:
    """The record in a file, with the energy that a log tells of its runs.  Raises DataError for either."""
    from edgeslm.bench.records import load_results

    records = load_results([path])
    if len(records) != 1 or records[0].get("schema") != "edgeslm.bench/1":
        raise DataError(f"{path}: no record of `edgeslm bench`", hint="give the file that its --out wrote")
    return attach(records[0], read_log(log))


def attach(record: Mapping[str, Any], log: PowerLog) -> dict[str, Any]:
    """A record edgeslm.bench/1 with the energy of each of its runs by the log, instead of what it had.

    A run that the log does not cover has none, and the record's power notes why.  Raises DataError for a
    record without times.
    """
    runs = list(record.get("runs") or ())
    sustained = record.get("sustained")
    spans = [_span(run) for run in (*runs, *([sustained] if sustained else ()))]
    if not spans or None in spans:
        raise DataError("the record does not say when its runs were", hint="measure again with this edgeslm")
    measured = [run | {"power": _energy(log, run, _work(run), _unit(run))} for run in runs]
    missing = sum(run["power"] is None for run in measured)
    if sustained:
        unit = str(sustained.get("unit") or "token")
        power = _energy(log, sustained, sustained.get("total") or 0, unit)
        missing += power is None
        sustained = _sustained(log, dict(sustained) | {"power": power}, unit)
    power_record: dict[str, Any] = {
        "source": "log",
        "covers": f"whatever the meter of {log.name} feeds",
        "interval_s": _interval(log.times_unix_s),
        "notes": [*([f"{log.skipped} rows of {log.name} could not be read"] if log.skipped else [])],
    }
    power_record["notes"] += _without(log, [span for span in spans if span], missing)
    added = {"runs": measured, "power": power_record}
    return dict(record) | added | ({"sustained": sustained} if sustained else {})


def _without(log: PowerLog, spans: Sequence[tuple[float, float]], missing: int) -> list[str]:
    """Why runs have no energy, where some have none."""
    first, last = log.times_unix_s[0], log.times_unix_s[-1]
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    if not missing:
        return []
    said = f"{missing} of {len(spans)} runs have no energy: "
    if first <= start and end <= last:
        every = wording.duration(_interval(log.times_unix_s))
        return [f"{said}each needs three readings, evenly spread; {log.name} has one in {every}"]
    return [
        f"{said}{log.name} has {_times([first, last])}, the runs were {_times([start, end])}; "
        "do both clocks tell the same time?"
    ]


def _sustained(log: PowerLog, sustained: dict[str, Any], unit: str) -> dict[str, Any]:
    """The curve and the steady state with the log's power."""
    start = sustained["started_unix_s"]
    curve = []
    for point in sustained.get("curve") or ():
        begin = start + (point.get("at_s") or 0.0)
        energy = energy_between(
            log.times_unix_s, log.watts, begin, begin + (point.get("seconds") or 0.0), cumulative=False
        )
        curve.append(point | {"power_w": energy.mean_w if energy else None})
    steady = dict(sustained.get("steady") or {})
    energy = energy_between(
        log.times_unix_s,
        log.watts,
        start + (steady.get("from_s") or 0.0),
        sustained["ended_unix_s"],
        cumulative=False,
    )
    steady |= energy_at(steady.get("rate_per_s"), energy, unit)
    return sustained | {"curve": curve, "steady": steady}


def _energy(log: PowerLog, run: Mapping[str, Any], work: float, unit: str) -> dict[str, Any] | None:
    energy = energy_between(
        log.times_unix_s, log.watts, run["started_unix_s"], run["ended_unix_s"], cumulative=False
    )
    return energy_record(energy, "log", work, unit)


def _span(run: Mapping[str, Any]) -> tuple[float, float] | None:
    start, end = run.get("started_unix_s"), run.get("ended_unix_s")
    return None if start is None or end is None else (start, end)


def _unit(run: Mapping[str, Any]) -> str:
    return "example" if run.get("kind") == "predict" else "token"


def _work(run: Mapping[str, Any]) -> float:
    count = (
        (run.get("calls") or 0) * (run.get("batch") or 0) if _unit(run) == "example" else run.get("tokens")
    )
    return float((count or 0) * (run.get("repetitions") or 0))


def _interval(times: Sequence[float]) -> float | None:
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def _times(times: Sequence[float]) -> str:
    ends = [
        datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")[:19]
        for at in (times[0], times[-1])
    ]
    return f"{ends[0]} to {ends[1]} UTC"


def _powermetrics(text: str) -> tuple[list[tuple[float, float]], int]:
    """Samples of powermetrics at the middle of the time that each is the mean of."""
    rows, skipped = [], 0
    heads = list(_SAMPLED.finditer(text))
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        watts = parse_powermetrics(text[head.end() : following.start() if following else len(text)])
        try:
            ended = datetime.strptime(head[1], "%a %b %d %H:%M:%S %Y %z").timestamp()
        except ValueError:
            watts = None
        if watts is None:
            skipped += 1
        else:
            rows.append((ended - float(head[2]) / 2000, watts))
    return rows, skipped


def _table(text: str, path: Path) -> tuple[list[tuple[float, float]], int]:
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = max(";\t,", key=(lines[0] if lines else "").count)
    header = next(csv.reader(lines[:1], delimiter=delimiter), [])
    time, power = _column(header, _TIME), _power(header)
    if time is None or power is None:
        raise DataError(
            f"{path}: its first line names no time or no power: {lines[0][:80] if lines else ''!r}",
            hint=_HINT,
        )
    rows, skipped = [], 0
    for cells in csv.reader(lines[1:], delimiter=delimiter):
        try:
            row = _seconds(cells[time[0]]), power(cells)
        except (ValueError, IndexError, OverflowError):
            skipped += 1
            continue
        if all(map(math.isfinite, row)):
            rows.append(row)
        else:
            skipped += 1
    return rows, skipped


_TIME = re.compile(r"(unix|epoch|date|time|timestamp|ts)\b.*", re.I)
_POWER = re.compile(r"(?:power|watts?|w|p)()|(?:power\W*)?([muk]?)w(?:atts?)?", re.I)
_VOLTAGE = re.compile(r"(?:volt(?:s|age)?|v|u|vbus)()|(?:volt(?:age)?|vbus|u)?\W*([muk]?)v(?:olts?)?", re.I)
_CURRENT = re.compile(
    r"(?:curr(?:ent)?|amp(?:ere)?s?|a|i|ibus)()|(?:curr(?:ent)?|ibus|i)?\W*([muk]?)a(?:mps?)?", re.I
)


def _column(header: Sequence[str], pattern: re.Pattern[str]) -> tuple[int, float] | None:
    """The first column whose name is of a quantity, and what its unit multiplies with: Power(mW) is 0.001."""
    for number, cell in enumerate(header):
        name = re.sub(r"[\s_\[\](){}/.]+", " ", cell).strip()
        name = re.sub(r"^(?:bus|usb|input|dc|load|average|avg|mean)\s+", "", name, flags=re.I)
        if match := pattern.fullmatch(name):
            prefix = next((group for group in match.groups() if group), "") if pattern is not _TIME else ""
            return number, _PREFIXES[prefix.lower()]
    return None


def _power(header: Sequence[str]) -> Callable[[Sequence[str]], float] | None:
    """Watts of a row: its power, or voltage times current; None where the header has neither."""
    if power := _column(header, _POWER):
        return lambda cells: _number(cells[power[0]]) * power[1]
    voltage, current = _column(header, _VOLTAGE), _column(header, _CURRENT)
    if voltage is None or current is None:
        return None
    scale = voltage[1] * current[1]
    return lambda cells: _number(cells[voltage[0]]) * _number(cells[current[0]]) * scale


def _number(cell: str) -> float:
    """A number, also with a decimal comma or its unit behind it."""
    match = re.fullmatch(r"\s*([-+]?[\d.,]+(?:e[-+]?\d+)?)\s*[a-z]*\s*", cell, re.I)
    if match is None:
        raise ValueError(cell)
    return float(match[1].replace(",", "."))


def _seconds(cell: str) -> float:
    """Seconds since 1970: given as seconds or milliseconds, or as a date in ISO 8601, local where it names no zone."""
    cell = cell.strip()
    if re.fullmatch(r"\d+([.,]\d+)?", cell):
        value = float(cell.replace(",", "."))
        return value / 1000 if value >= MILLISECONDS_FROM else value
    return datetime.fromisoformat(cell.replace("/", "-")).timestamp()
