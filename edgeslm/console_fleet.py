"""Devices as text: what a deployment did on each, and their speeds side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.layout import bullets, facts, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Record = Mapping[str, Any]


KINDS = {"prefill": "prefill tokens/s", "decode": "decode tokens/s", "predict": "examples/s"}


def deploy_text(record: Record) -> str:
    """One device in lines, several in a table; then what their checks said."""
    hosts = record["hosts"]
    blocks = [_deployed(record, hosts[0]) if len(hosts) == 1 else _table(hosts)]
    return "\n\n".join([*blocks, *_remarks(hosts)])


def bench_text(record: Record) -> str:
    """The speeds of all devices in one table; then what was wrong."""
    rows = []
    for host in record["hosts"]:
        bench, machine = host["bench"] or {}, host["machine"] or {}
        rows.append(
            (
                host["host"],
                machine.get("cpu_model") or wording.NOT_AVAILABLE,
                *(_speed(bench, kind) for kind in KINDS),
                wording.size((bench.get("memory") or {}).get("peak_rss_bytes")),
                "yes" if machine.get("emulated") else "no",
                "failed" if host["status"] == "failed" else _validity(bench),
            )
        )
    header = ("device", "processor", *KINDS.values(), "peak memory", "emulated", "result")
    keep = [i for i in range(len(header)) if not 2 <= i < 5 or any(row[i] for row in rows)]
    text = table([header[i] for i in keep], [[row[i] for i in keep] for row in rows], left=(0, 1))
    return "\n\n".join([text, *_remarks(record["hosts"])])


def _deployed(record: Record, host: Record) -> str:
    return facts(
        [
            ("device", host["host"]),
            ("processor", (host["machine"] or {}).get("cpu_model") or wording.NOT_AVAILABLE),
            ("artifact", f"{record['artifact']['name']}, {wording.size(record['artifact']['bytes'])}"),
            ("result", host["status"]),
            ("sent", _sent(host)),
            ("release", host["path"] or wording.NOT_AVAILABLE),
            ("current", f"{host['directory']}/current" if host["path"] else wording.NOT_AVAILABLE),
        ]
    )


def _table(hosts: Sequence[Record]) -> str:
    rows = [
        (
            host["host"],
            host["status"],
            wording.size(host["sent_bytes"]),
            wording.size(host["present_bytes"] + host["resumed_bytes"]),
            wording.duration(host["duration_s"]),
            host["directory"] or wording.NOT_AVAILABLE,
        )
        for host in hosts
    ]
    return table(("device", "result", "sent", "was there", "time", "directory"), rows, left=(0, 1, 5))


def _sent(host: Record) -> str:
    there = host["present_bytes"] + host["resumed_bytes"]
    return f"{wording.size(host['sent_bytes'])}; {wording.size(there)} was there"


def _remarks(hosts: Sequence[Record]) -> list[str]:
    """Errors and checks that did not pass, with the way out."""
    lines = []
    for host in hosts:
        failed = host["error"]
        if failed:
            hint = f"; try: {host['hint']}" if host["hint"] else ""
            lines.append(failed + hint)
        reasons = wording.invalid_reasons(host.get("bench") or {})
        if reasons:
            lines.append(f"{host['host']}: INVALID, do not quote: {'; '.join(reasons)}")
        for check in host["checks"]:
            if check["result"] != "ok" and check["detail"] not in (failed or ""):
                hint = f"; try: {check['hint']}" if check["hint"] else ""
                lines.append(f"{host['host']}: {check['check']}: {check['detail']}{hint}")
    return [bullets("Remarks", lines)] if lines else []


def _speed(bench: Record, kind: str) -> str:
    """The rate to quote first; "" where nothing of that kind was measured."""
    run = wording.headline(bench.get("runs") or (), kind)
    return wording.rate_number(wording.speed_of(run)) if run else ""


def _validity(bench: Record) -> str:
    return "INVALID" if wording.invalid_reasons(bench) else "measured"
