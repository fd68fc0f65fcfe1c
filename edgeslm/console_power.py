"""Power, heat and endurance of a benchmark on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import layout, wording_power

if TYPE_CHECKING:
    from collections.abc import Mapping

    Record = Mapping[str, Any]


def facts(record: Record) -> list[tuple[str, str]]:
    """Where the energy is from, and what lasts; [] for a record that tells neither."""
    power, sustained = record.get("power"), record.get("sustained")
    found = []
    if power:
        found.append(("energy from", "\n".join((wording_power.source(power), *(power.get("notes") or ())))))
    return found + (wording_power.sustained_facts(sustained) if sustained else [])


def tables(record: Record) -> list[str]:
    """Energy and heat of each run, and the curve over time."""
    sustained = record.get("sustained")
    found = []
    header, rows = wording_power.run_rows([*(record.get("runs") or ()), *([sustained] if sustained else [])])
    if rows:
        found.append(layout.table(header, rows))
    if sustained:
        found.append(layout.table(*wording_power.curve_rows(sustained)))
    return found
