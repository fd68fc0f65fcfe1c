"""The record of `edgeslm fit` for a terminal: one artifact on one device, or a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import layout, wording

if TYPE_CHECKING:
    from collections.abc import Mapping

    Record = Mapping[str, Any]

VERDICTS = {
    "yes": "fits",
    "tight": "fits, with nothing beside it",
    "no": "does not fit",
}
NO_FIT = "-"
"""Of a cell of the table of all devices."""


def fit_text(record: Record) -> str:
    """One artifact in full; several schemes or several devices in a table; the notes below."""
    devices = record["devices"]
    if len(devices) == 1 and len(devices[0]["schemes"]) == 1:
        text = _one(record, devices[0], devices[0]["schemes"][0])
    elif len(devices) == 1:
        text = _schemes(record, devices[0])
    else:
        text = _devices(record)
    return "\n\n".join([text, layout.bullets("notes", record["notes"])] if record["notes"] else [text])


def band(estimate: Record | None, unit: str = "") -> str:
    """{value, low, high} as '11.2 tokens/s, 9.3 to 13.4'."""
    if estimate is None:
        return wording.NOT_AVAILABLE
    if unit == "s":
        value, low, high = (wording.duration(estimate[key]) for key in ("value", "low", "high"))
        return f"{value}, {low} to {high}"
    value, low, high = (wording.rate_number(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} tokens/s, {low} to {high}"


def _one(record: Record, device: Record, found: Record) -> str:
    memory, context = found["memory"], record["context"]
    parts = {
        "weights": memory["weights_bytes"],
        f"KV cache, {context} tokens": memory["kv_cache_bytes"],
        "compute buffer": memory["compute_bytes"],
        "runtime": memory["runtime_bytes"],
    }
    share = memory["total_bytes"] / device["free_bytes"] if device["free_bytes"] > 0 else None
    facts = [
        ("model", f"{record['model']['name']}, {found['scheme']}, {wording.size(found['file_bytes'])}"),
        ("device", f"{device['device']}: {device['description']}"),
        *((name, wording.size(value)) for name, value in parts.items()),
        ("needed", f"{wording.size(memory['total_bytes'])} of {wording.size(device['free_bytes'])} that are free"
                   + (f", {wording.percent(share, 0)}" if share is not None else "")),
        ("load", f"{wording.duration(found['load_s'])}, file not cached" if found["load_s"] else wording.NOT_AVAILABLE),
        ("first token", f"{band(found['ttft_s'], 's')}, {wording.count(record['prompt_tokens'], 'token')} of prompt"),
        ("prefill", band(found["prefill_tokens_per_s"])),
        ("decode", band(found["decode_tokens_per_s"])),
        ("verdict", VERDICTS[found["verdict"]]),
    ]  # fmt: skip
    return layout.facts(facts)


def _schemes(record: Record, device: Record) -> str:
    rows = [
        (
            found["scheme"],
            wording.significant(found["bits_per_weight"]),
            wording.size(found["file_bytes"]),
            wording.size(found["memory"]["total_bytes"]),
            wording.duration(found["load_s"]),
            wording.duration((found["ttft_s"] or {}).get("value")),
            wording.rate_number((found["decode_tokens_per_s"] or {}).get("value")),
            VERDICTS[found["verdict"]],
        )
        for found in device["schemes"]
    ]
    head = (
        f"{record['model']['name']} on {device['device']}, {wording.size(device['free_bytes'])} free, "
        f"{record['context']} tokens of context, {record['prompt_tokens']} of prompt"
    )
    table = layout.table(
        ("scheme", "bits", "file", "memory", "load", "first token", "tokens/s", ""), rows, left=(0, 7)
    )
    return f"{layout.clean(head)}\n\n{table}"


def _devices(record: Record) -> str:
    """A row for each device, a column for each scheme: tokens/s where it fits."""
    devices = record["devices"]
    rows = [
        (device["device"], wording.size(device["free_bytes"]), *map(_cell, device["schemes"]))
        for device in devices
    ]
    head = (
        f"{record['model']['name']}: decode in tokens/s with {record['context']} tokens of context; "
        f"{NO_FIT} does not fit, ! fits with nothing beside it"
    )
    schemes = [found["scheme"] for found in devices[0]["schemes"]]
    return f"{layout.clean(head)}\n\n{layout.table(('device', 'free', *schemes), rows)}"


def _cell(found: Record) -> str:
    if not found["fits"]:
        return NO_FIT
    rate = wording.rate_number((found["decode_tokens_per_s"] or {}).get("value"))
    return f"{rate}!" if found["verdict"] == "tight" else rate
