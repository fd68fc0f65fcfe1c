"""Records as text for a terminal: each function takes one plain record and returns lines of ASCII.

A value that could not be read is n/a, a run that interference spoiled says INVALID and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import console_power, layout, wording
from edgeslm.console_learning import (
    checkpoint_text,
    classifier_facts,
    learned_facts,
    level,
    task_quality_text,
    task_summary,
)
from edgeslm.console_variants import variants_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    Record = Mapping[str, Any]

__all__ = [
    "bench_text", "build_text", "checkpoint_text", "devices_text", "doctor_text", "inspect_text", "paths_text",
    "quality_text", "quantize_text",
]  # fmt: skip


def build_text(record: Record) -> str:
    """What a build made and how good it is; the gate's verdict and the report's path come last."""
    if record.get("variants") is not None:
        return variants_text(record)
    quality, bench = record.get("quality") or {}, record.get("bench") or {}
    facts = [("stages", wording.stages(record["stages"]))] if record.get("stages") else []
    facts += [
        ("bundle", f"{record['bundle']}, {wording.size(record.get('bytes'))}"),
        *learned_facts(record),
        ("bits per weight", wording.significant(record.get("bits_per_weight"))),
        *(task_summary(quality) if quality.get("classes") else _quality_summary(quality)),
        *_speed_summary(bench),
        ("peak RSS", _memory(bench.get("memory") or {})),
        *[("warning", text) for text in record.get("warnings") or ()],
        ("gate", _gate(record.get("gate"))),
        ("report", wording.text(record.get("report"))),
    ]
    return layout.facts(facts)


def quantize_text(record: Record) -> str:
    """What was written, in which types, and every fallback with the bits it really costs."""
    plan = record.get("quantization") or {}
    facts = [
        (record.get("kind") or "file", f"{record['path']}, {wording.size(record.get('bytes'))}"),
        ("scheme", wording.text(plan.get("scheme"))),
        ("bits per weight", wording.significant(plan.get("bits_per_weight"))),
        ("importance", f"matrix {_digest(plan['importance'])}" if plan.get("importance") else "none"),
        *(
            [("accuracy level", wording.accuracy_level(plan))]
            if plan.get("accuracy_level") is not None
            else []
        ),
        ("took", wording.duration(record.get("seconds"))),
    ]
    types = plan.get("types") or {}
    rows = [
        (name, wording.count(of.get("tensors")), wording.parameters(of.get("parameters")),
         wording.size(of.get("bytes")), wording.bits(of))
        for name, of in sorted(types.items(), key=lambda item: -(item[1].get("bytes") or 0))
    ]  # fmt: skip
    fallbacks = plan.get("fallbacks") or ()
    parts = [layout.facts(facts)]
    if rows:
        parts.append(layout.table(("type", "tensors", "parameters", "size", "bits"), rows))
    if fallbacks:
        total = sum(of.get("tensors") or 0 for of in types.values())
        heading = (
            f"{len(fallbacks):,} of {wording.count(total, 'tensor')} fell back" if total else "fallbacks"
        )
        parts.append(layout.bullets(heading, wording.fallback_lines(fallbacks)))
    if record.get("warnings"):
        parts.append(layout.bullets("warnings", record["warnings"]))
    return "\n\n".join(parts)


def inspect_text(record: Record, *, tensors: bool = False) -> str:
    """Facts, the kinds of tensors (or each one), estimated memory, and the traps at the end."""
    facts = [
        (record.get("kind") or "model", wording.text(record.get("path"))),
        ("size", wording.size(record.get("file_bytes"))),
        ("name", wording.text(record.get("name"))),
        ("architecture", _architecture(record)),
        ("parameters", wording.parameters(record.get("parameters"))),
        ("bits per weight", f"{wording.significant(record.get('bits_per_weight'))} "
                            f"({wording.size(record.get('weight_bytes'))} of weights)"),
        ("context", wording.count(record.get("context_length"), "token")),
        ("tokenizer", _tokenizer(record.get("tokenizer") or {})),
        *classifier_facts(record),
    ]  # fmt: skip
    if record.get("verified") is not None:
        facts.append(("hashes", "all files match the manifest" if record["verified"] else "DIFFER"))
    parts = [layout.facts(facts)]
    if tensors and record.get("tensors"):
        rows = [
            (t["name"], " x ".join(str(extent) for extent in t.get("shape") or ()), t.get("type"),
             wording.size(t.get("bytes")))
            for t in record["tensors"]
        ]  # fmt: skip
        parts.append(layout.table(("tensor", "shape", "type", "size"), rows, left=(0, 2)))
    elif record.get("kinds"):
        kinds = [
            (kind["kind"], _types(kind.get("types") or {}), wording.count(kind.get("tensors")),
             wording.parameters(kind.get("parameters")), wording.size(kind.get("bytes")),
             wording.significant(kind.get("bits_per_weight")))
            for kind in record["kinds"]
        ]  # fmt: skip
        parts.append(
            layout.table(("kind", "types", "tensors", "parameters", "size", "bits"), kinds, left=(0, 1))
        )
    if record.get("memory"):
        parts.append(_memory_estimate(record["memory"]))
    traps = [
        f"{trap['text']}" + (f" (try: {trap['hint']})" if trap.get("hint") else "")
        for trap in record.get("traps") or ()
    ]
    if not record.get("labels"):
        parts.append(layout.bullets("traps", traps) if traps else "traps: none found")
    return "\n\n".join(parts)


def quality_text(record: Record) -> str:
    """Perplexity, KL divergence and top-1 agreement, or a classifier's metrics, each with its interval."""
    if record.get("classes"):
        return task_quality_text(record)
    artifact, reference = record.get("artifact") or {}, record.get("reference")
    text, protocol = record.get("text") or {}, record.get("protocol") or {}
    facts = [
        ("artifact", f"{wording.text(artifact.get('name'))} ({_digest(artifact.get('digest'))})"),
        ("reference", wording.text(reference.get("name")) if reference else "none: perplexity only"),
        ("text", f"{', '.join(map(str, text.get('sources') or ())) or wording.NOT_AVAILABLE}"
                 f" ({wording.count(text.get('tokens'), 'token')})"),
        ("protocol", f"{wording.count(protocol.get('scored_tokens'), 'token')} scored in "
                     f"{wording.count(protocol.get('windows'), 'window')} of {wording.text(protocol.get('context'))}"),
    ]  # fmt: skip
    kl = record.get("kl_nats") or {}
    rows = [
        ("perplexity", wording.interval(record.get("perplexity"))),
        ("  of the reference", wording.interval(record.get("reference_perplexity"))),
        ("  ratio", wording.interval(record.get("perplexity_ratio"))),
        ("KL divergence, mean", wording.interval(kl.get("mean"))),
        ("  median", wording.interval(kl.get("median"))),
        ("  99th percentile", wording.interval(kl.get("p99"))),
        ("  largest", wording.interval(kl.get("max"))),
        ("top-1 agreement", wording.interval(record.get("top1_agreement"), as_percent=True)),
    ]
    return "\n\n".join(
        (layout.facts(facts), layout.table(("", f"value [{level(record)}]"), rows, left=(0, 1)))
    )


def bench_text(record: Record) -> str:
    """Speed per run with its spread and ceiling, memory, and each invalid run with the reason."""
    artifact, machine = record.get("artifact") or {}, record.get("machine") or {}
    facts = [
        ("artifact", f"{wording.text(artifact.get('name'))}, {wording.size(artifact.get('file_bytes'))}, "
                     f"{wording.significant(artifact.get('bits_per_weight'))} bits per weight"),
        ("machine", _machine(machine)),
        ("bandwidth", _bandwidth(record.get("memory_bandwidth_bytes_per_s"))),
        ("load", wording.duration(record.get("load_s"))),
        ("peak RSS", _memory(record.get("memory") or {})),
        *console_power.facts(record),
    ]  # fmt: skip
    runs = record.get("runs") or ()
    parts = [layout.facts(facts)]
    for kind, columns in wording.RUN_COLUMNS.items():
        rows = [[show(run) for _, show in columns] for run in runs if run.get("kind") == kind]
        if rows:
            keep = [i for i in range(len(columns)) if any(row[i] for row in rows)]
            header = (kind, *(name for name, _ in columns[1:]))
            parts.append(layout.table([header[i] for i in keep], [[row[i] for i in keep] for row in rows]))
    parts += console_power.tables(record)
    reasons = wording.invalid_reasons(record)
    if reasons:
        parts.append(layout.bullets("INVALID: do not quote these numbers", reasons))
    return "\n\n".join(parts)


def doctor_text(record: Record) -> str:
    """This machine, the engines with [ok] or what is wrong, and what to do about it."""
    machine = record.get("machine") or {}
    memory = (
        f"{wording.size(machine.get('memory_bytes'))}, {wording.size(machine.get('memory_available_bytes'))}"
    )
    facts = [
        ("processor", wording.text(machine.get("cpu_model"))),
        ("cores", wording.cores(machine)),
        ("instructions", " ".join(machine.get("instruction_sets") or ()) or wording.NOT_AVAILABLE),
        ("memory", f"{memory} available"),
        ("system", ", ".join(filter(None, (machine.get("os"), machine.get("kernel"))))),
        ("Python", wording.text(machine.get("python"))),
        ("clock", f"{wording.frequency(machine.get('frequency_hz'))}, "
                  f"governor {machine.get('governor') or wording.NOT_AVAILABLE}"),
    ]  # fmt: skip
    if machine.get("emulated"):
        facts.append(("emulated", "yes: use this machine for correctness, not for timing"))
    engines = [
        (_mark(engine), engine["name"], engine.get("version") or "not installed", engine.get("detail") or "")
        for engine in record.get("engines") or ()
    ]
    parts = [layout.facts(facts)]
    if engines:
        parts.append(layout.table(("", "engine", "version", ""), engines, left=(0, 1, 2, 3)))
    if record.get("advice"):
        parts.append(layout.bullets("advice", record["advice"]))
    return "\n\n".join(parts)


def devices_text(record: Record) -> str:
    """All profiles in a table, or one profile with the source of every value."""
    devices = record.get("devices") or []
    if len(devices) == 1:
        return layout.facts(_profile(devices[0]))
    rows: list[tuple[str, ...]] = []
    for device in devices:
        first, *more = layout.wrap(device["description"], layout.WIDTH - 42)
        bandwidth = wording.bandwidth(device.get("memory_bandwidth_bytes_per_s"))
        rows.append(
            (device["name"], str(device["cores"]), wording.size(device["memory_bytes"]), bandwidth, first)
        )
        rows += [("", "", "", "", line) for line in more]
    return layout.table(("device", "cores", "memory", "bandwidth", ""), rows, left=(0, 4))


def _profile(device: Record) -> list[tuple[str, str]]:
    sources, power = device.get("sources") or {}, device.get("max_power_w")
    operations = device.get("prefill_ops_per_s")
    values = {
        "cpu": f"{device['cpu_model']}, {device['architecture']}, {wording.count(device['cores'], 'core')} at "
        f"{wording.frequency(device['frequency_hz'])}, {' '.join(device['instruction_sets'])}",
        "memory": wording.size(device["memory_bytes"]),
        "bandwidth": wording.bandwidth(device.get("memory_bandwidth_bytes_per_s")),
        "prefill": wording.NOT_AVAILABLE
        if operations is None
        else f"{wording.significant(operations / 1e9)} GOP/s",
        "storage": wording.bandwidth(device.get("storage_bytes_per_s")),
        "power": wording.NOT_AVAILABLE if power is None else f"{power:g} W at most",
    }
    facts = [("device", f"{device['name']}: {device['description']}")]
    for name, value in values.items():
        facts.append((name, value))
        if sources.get(name):
            facts.append(("", f"source: {sources[name]}"))
    return facts


def paths_text(record: Record) -> str:
    """The files that a command wrote, one a line."""
    return layout.facts([(key, str(record[key])) for key in ("html", "markdown", "json") if record.get(key)])


def _quality_summary(quality: Record) -> list[tuple[str, str]]:
    if not quality:
        return [("quality", "not measured")]
    protocol, reference = quality.get("protocol") or {}, quality.get("reference")
    measured = f"{wording.count(protocol.get('scored_tokens'), 'token')} of held-out text"
    measured += f", against {wording.text(reference.get('name'))}" if reference else ", no reference"
    perplexity = wording.interval(quality.get("perplexity"))
    if quality.get("reference_perplexity"):
        perplexity += f", reference {wording.interval(quality['reference_perplexity'])}"
    if quality.get("perplexity_ratio"):
        perplexity += f", ratio {wording.interval(quality['perplexity_ratio'])}"
    kl = quality.get("kl_nats") or {}
    return [
        ("measured on", f"{measured}, {level(quality)}s"),
        ("KL divergence", f"{wording.interval(kl.get('mean'))} nats" if kl else wording.NOT_AVAILABLE),
        ("perplexity", perplexity),
    ]


def _speed_summary(bench: Record) -> list[tuple[str, str]]:
    runs = bench.get("runs") or ()
    predict, call = wording.headline(runs, "predict"), wording.fastest_call(runs)
    if predict is not None or call is not None:
        return [("latency", _latency(call)), ("throughput", _speed(predict))]
    prefill, decode = wording.headline(runs, "prefill"), wording.headline(runs, "decode")
    return [("prefill", _speed(prefill)), ("decode", _speed(decode)), ("TTFT", _ttft(prefill))]


def _speed(run: Record | None) -> str:
    if run is None:
        return wording.NOT_AVAILABLE
    speed = wording.speed_of(run)
    said = wording.item_rate(speed) if run.get("kind") == "predict" else wording.rate(speed)
    return _with_validity(f"{said} ({wording.conditions(run)})", run)


def _latency(run: Record | None) -> str:
    if run is None:
        return wording.NOT_AVAILABLE
    times = run.get("latency_s") or {}
    parts = [f"{wording.duration(times.get(share))} {share}" for share in ("p50", "p99")]
    return _with_validity(f"{', '.join(parts)} ({wording.conditions(run)})", run)


def _with_validity(text: str, run: Record) -> str:
    return text if run.get("valid", True) else f"{text} INVALID: {'; '.join(run.get('reasons') or ())}"


def _ttft(run: Record | None) -> str:
    if run is None or not run.get("ttft_s"):
        return wording.NOT_AVAILABLE
    text = f"{wording.duration(run['ttft_s'].get('p50'))} (prompt of {wording.conditions(run)})"
    return text if run.get("valid", True) else f"{text} INVALID: see prefill"


def _gate(gate: Record | None) -> str:
    if gate is None:
        return "no bounds set"
    if gate.get("passed"):
        return "passed"
    return "\n".join(("MISSED", *map(wording.gate_miss, gate.get("misses") or ())))


def _memory(memory: Record) -> str:
    text = wording.size(memory.get("peak_rss_bytes"))
    shares = [
        f"{wording.size(memory[key])} {name}"
        for key, name in (("file_backed_bytes", "file-backed"), ("anonymous_bytes", "anonymous"))
        if memory.get(key) is not None
    ]
    return f"{text} ({', '.join(shares)})" if shares else text


def _memory_estimate(memory: Record) -> str:
    rows = [
        (name, wording.size(memory.get(key)))
        for name, key in (("weights", "weights_bytes"), (f"KV cache, {memory.get('kv_type')}", "kv_cache_bytes"),
                          ("compute buffer", "compute_bytes"), ("total", "total_bytes"))
    ]  # fmt: skip
    return layout.table((f"memory at {wording.count(memory.get('context'), 'token')} of context", ""), rows)


def _bandwidth(bytes_per_s: float | None) -> str:
    return (
        wording.NOT_AVAILABLE
        if bytes_per_s is None
        else f"{wording.bandwidth(bytes_per_s)} read, measured here"
    )


def _machine(machine: Record) -> str:
    parts = [
        wording.text(machine.get("cpu_model")),
        wording.count(machine.get("usable_cores"), "usable core"),
        wording.size(machine.get("memory_bytes")),
    ]
    if machine.get("governor"):
        parts.append(f"governor {machine['governor']}")
    return ", ".join(parts)


def _architecture(record: Record) -> str:
    parts = [wording.text(record.get("architecture"))]
    for key, name in (("layers", "layers"), ("hidden_size", "wide"), ("heads", "heads"),
                      ("kv_heads", "KV heads"), ("head_dim", "per head")):  # fmt: skip
        if record.get(key) is not None:
            parts.append(f"{record[key]} {name}")
    if record.get("tied_embeddings") is not None:
        parts.append("tied embeddings" if record["tied_embeddings"] else "untied head")
    return ", ".join(parts)


def _tokenizer(tokenizer: Record) -> str:
    if not tokenizer:
        return wording.NOT_AVAILABLE
    name = "/".join(str(tokenizer[key]) for key in ("model", "pre") if tokenizer.get(key))
    specials = [f"{key.upper()} {tokenizer[key]}" for key in ("bos", "eos") if tokenizer.get(key) is not None]
    if "chat_template" in tokenizer:
        specials.append("chat template" if tokenizer["chat_template"] else "no chat template")
    return ", ".join((name, wording.count(tokenizer.get("vocab_size"), "token"), *specials))


def _types(types: Record) -> str:
    if len(types) == 1:
        return str(next(iter(types)))
    return ", ".join(f"{name} x {number}" for name, number in sorted(types.items()))


def _digest(digest: str | None) -> str:
    return digest[:12] if digest else "no digest"


def _mark(engine: Record) -> str:
    if engine.get("imports"):
        return "[ok]"
    return "[!!]" if engine.get("version") else "[--]"
