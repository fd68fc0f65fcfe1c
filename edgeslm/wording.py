"""Quantities and findings in words, the same on the terminal and in a report.

Records hold SI values (seconds, bytes, nats, fractions); prefixes, percent and rounding happen here
only.  Every function takes None for "could not be read" and says NOT_AVAILABLE.  The text is ASCII.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

NOT_AVAILABLE = "n/a"

BOUNDS = {
    "max_kl_nats": "mean KL divergence",
    "min_top1_agreement": "top-1 agreement",
    "max_perplexity_ratio": "perplexity ratio",
    "min_accuracy": "accuracy",
    "min_macro_f1": "macro F1",
    "min_level_agreement": "agreement with accuracy level 0",
    "max_file_bytes": "file size",
    "min_decode_tokens_per_s": "decode speed",
    "max_peak_rss_bytes": "peak RSS",
}
"""The bounds of a gate, by the quantity that each one limits."""


def text(value: object) -> str:
    """A name, path or count as it is."""
    return NOT_AVAILABLE if value in (None, "") else str(value)


_HUGE = 1e9
"""From here on digits say less than their number."""


def significant(value: float | None, digits: int = 3) -> str:
    """1234.5 as '1,234', 366.1 as '366', 89.04 as '89.0', 0.05403 as '0.0540'."""
    if value is None:
        return NOT_AVAILABLE
    if abs(value) >= _HUGE:
        return f"{value:.{digits - 1}e}"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    decimals = max(0, digits - 1 - magnitude)
    if round(abs(value), decimals) >= 10 ** (magnitude + 1):  # 9.996 gains a digit by rounding
        decimals = max(0, decimals - 1)
    return f"{value:,.{decimals}f}"


def count(value: float | None, noun: str = "") -> str:
    """1 and 'run' as '1 run', 12288 and 'token' as '12,288 tokens'."""
    if value is None:
        return NOT_AVAILABLE
    return f"{value:,.0f} {noun}{'' if value == 1 else 's'}" if noun else f"{value:,.0f}"


def parameters(value: float | None) -> str:
    """134515008 as '134.5 M'."""
    if value is None:
        return NOT_AVAILABLE
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{significant(value / scale, 4)} {prefix}"
    return f"{value:,.0f}"


def size(value_bytes: float | None) -> str:
    """Bytes with a binary prefix: 103703552 as '98.9 MiB'."""
    if value_bytes is None:
        return NOT_AVAILABLE
    for scale, prefix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value_bytes) >= scale:
            return f"{significant(value_bytes / scale)} {prefix}"
    return f"{value_bytes:,.0f} B"


def rate(tokens_per_s: float | None) -> str:
    """Tokens a second: '89.0 tokens/s', '12.3 k tokens/s'."""
    if tokens_per_s is None:
        return NOT_AVAILABLE
    return f"{rate_number(tokens_per_s)} tokens/s"


def item_rate(items_per_s: float | None) -> str:
    """Examples a second: '89.0 examples/s'."""
    return NOT_AVAILABLE if items_per_s is None else f"{rate_number(items_per_s)} examples/s"


def rate_number(tokens_per_s: float | None) -> str:
    """A rate without its unit, for the cells of a table."""
    if tokens_per_s is None:
        return NOT_AVAILABLE
    return f"{significant(tokens_per_s / 1e3)} k" if tokens_per_s >= 1e4 else significant(tokens_per_s)


def bandwidth(bytes_per_s: float | None) -> str:
    """Decimal gigabytes a second, as memory is sold."""
    return NOT_AVAILABLE if bytes_per_s is None else f"{significant(bytes_per_s / 1e9)} GB/s"


def frequency(hertz: float | None) -> str:
    return NOT_AVAILABLE if hertz is None else f"{significant(hertz / 1e9)} GHz"


def celsius(degrees: float | None) -> str:
    return NOT_AVAILABLE if degrees is None else f"{degrees:.0f} C"


def duration(seconds: float | None) -> str:
    """'11.2 ms', '1.40 s', '2 min 05 s'."""
    if seconds is None:
        return NOT_AVAILABLE
    if seconds >= 99.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def stage_names(ancestry: Mapping[str, Any] | None) -> list[str]:
    """The stages that made a model's weights, the first one first; ancestry: the note that the last one left."""
    names: list[str] = []
    while ancestry:
        names.insert(0, str(ancestry.get("stage")))
        ancestry = ancestry.get("before")
    return names


def accuracy_level(plan: Mapping[str, Any]) -> str:
    """What activations become in the products of an ONNX model, and what that changed on calibration text."""
    level, audit = plan["accuracy_level"], plan.get("accuracy_audit")
    if not audit:
        return f"{level}{', not audited: --calibration TEXT does' if level else ''}"
    kept = next((of["top1_agreement"] for of in audit["levels"] if of["level"] == level), None)
    return f"{level}, level 0's likeliest token in {percent(kept)} of {count(audit['tokens'], 'position')}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    return NOT_AVAILABLE if fraction is None else f"{fraction * 100:.{decimals}f} %"


def interval(estimate: Mapping[str, float | None] | None, *, as_percent: bool = False) -> str:
    """{value, low, high} as '0.0540 [0.0498, 0.0583]'; without bounds the value alone.

    At least three significant digits of the value, at least four decimals below 10; percent have two.
    """
    if estimate is None or estimate.get("value") is None:
        return NOT_AVAILABLE
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    assert value is not None
    scale, unit, decimals = (100.0, " %", 2) if as_percent else (1.0, "", _decimals(value))
    form = f",.{decimals}f" if abs(value) < _HUGE else ".3e"  # the perplexity of a destroyed model
    said = f"{value * scale:{form}}"
    if low is not None and high is not None:
        said += f" [{low * scale:{form}}, {high * scale:{form}}]"
    return said + unit


def _decimals(value: float) -> int:
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return min(9, max(4, 2 - magnitude)) if magnitude < 1 else max(0, 4 - 1 - magnitude)


def stages(done: Iterable[Mapping[str, Any]]) -> str:
    """'calibrate skipped, quantize 3.40 s'."""
    return ", ".join(
        f"{text(stage.get('name'))} {'skipped' if stage.get('skipped') else duration(stage.get('seconds'))}"
        for stage in done
    )


def headline(runs: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The run of a kind to quote first: valid before invalid, then the longest, then the fastest."""
    known = [run for run in runs if run.get("kind") == kind and speed_of(run) is not None]
    order = ("valid", "tokens", "tokens_per_s", "items_per_s")
    return max(known, key=lambda run: [run.get(key) or 0 for key in order], default=None)


def fastest_call(runs: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of a classifier's runs the one whose latency to quote: valid before invalid, then the smallest batch."""
    known = [run for run in runs if run.get("kind") == "predict" and run.get("latency_s")]
    return min(known, key=lambda run: (not run.get("valid", True), run.get("batch") or 0), default=None)


def speed_of(run: Mapping[str, Any]) -> float | None:
    """Tokens or examples a second."""
    value: float | None = run.get("tokens_per_s" if run.get("kind") != "predict" else "items_per_s")
    return value


def conditions(run: Mapping[str, Any]) -> str:
    """'512 tokens, 2 threads'; of a classifier 'batch of 8, 128 tokens, 2 threads'."""
    if run.get("kind") == "predict":
        sizes = [
            count(run[key], noun) for key, noun in (("tokens", "token"), ("rows", "row")) if run.get(key)
        ]
        return ", ".join((f"batch of {count(run.get('batch'))}", *sizes, count(run.get("threads"), "thread")))
    if run.get("tokens") is None:
        return NOT_AVAILABLE
    return f"{count(run.get('tokens'), 'token')}, {count(run.get('threads'), 'thread')}"


def invalid_reasons(bench: Mapping[str, Any]) -> list[str]:
    """Why a benchmark record or some of its runs are not valid: [] where all are."""
    spoiled = [run for run in bench.get("runs") or () if run.get("valid") is False]
    if bench.get("valid", True) and not spoiled:
        return []
    by_run = [
        f"{text(run.get('kind'))} of {conditions(run)}: {reason}"
        for run in spoiled
        for reason in run.get("reasons") or ()
    ]
    return list(bench.get("reasons") or by_run or ("no reason given",))


def cores(machine: Mapping[str, Any]) -> str:
    """'2 usable of 4 physical, 8 logical'."""
    usable, physical, logical = (machine.get(f"{kind}_cores") for kind in ("usable", "physical", "logical"))
    if usable is None:
        return NOT_AVAILABLE
    return f"{count(usable)} usable of {count(physical)} physical, {count(logical)} logical"


def spread(run: Mapping[str, Any]) -> str:
    """Standard deviation of a benchmark run's repetitions, as percent of its rate."""
    unit = "items_per_s" if run.get("kind") == "predict" else "tokens_per_s"
    speed, deviation = run.get(unit), run.get(f"{unit}_stdev")
    return percent(deviation / speed) if speed and deviation is not None else NOT_AVAILABLE


def bits(group: Mapping[str, Any]) -> str:
    """True bits per weight of {parameters, bytes}."""
    nbytes, weights = group.get("bytes"), group.get("parameters")
    return significant(8 * nbytes / weights) if nbytes is not None and weights else NOT_AVAILABLE


def bound_value(bound: str, value: float | None, digits: int = 3) -> str:
    """A value in the unit that the name of its bound ends with."""
    if value is None:
        return "not measured"
    if bound.endswith("_bytes"):
        return f"{significant(value / 2**20, digits)} MiB"
    if bound.endswith("_tokens_per_s"):
        return f"{significant(value, digits)} tokens/s"
    if bound.endswith(("_agreement", "_accuracy")):
        return f"{significant(value * 100, digits)} %"
    return significant(value, digits) + (" nats" if bound.endswith("_nats") else "")


def gate_miss(miss: Mapping[str, Any]) -> str:
    """'mean KL divergence 0.0817 nats is 0.0317 nats over max_kl_nats = 0.0500 nats'.

    miss: {bound, limit, value} with value None where it could not be measured; variant: whose miss it is.
    """
    bound, limit, value = text(miss.get("bound")), miss.get("limit"), miss.get("value")
    quantity = BOUNDS.get(bound, bound)
    if miss.get("variant"):
        quantity = f"{miss['variant']}: {quantity}"
    if value is None or limit is None:
        return f"{quantity} not measured: no verdict on {bound} = {bound_value(bound, limit)}"
    digits = 3
    while bound_value(bound, value, digits) == bound_value(bound, limit, digits) and digits < 12:
        digits += 1  # a near miss must not look like a hit
    measured, allowed = bound_value(bound, value, digits), bound_value(bound, limit, digits)
    by = f"{bound_value(bound, abs(value - limit))} {'under' if bound.startswith('min_') else 'over'}"
    return f"{quantity} {measured} is {by} {bound} = {allowed}"


def fallback_lines(fallbacks: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for all tensors that fell back for the same reason, the most frequent first.

    '150 tensors: 576-wide rows can't hold Q4_K (256-blocks) -> Q5_0, 5.50 bits instead of 4.50'
    """
    keys = ("wanted", "got", "wanted_bits", "got_bits", "reason")
    groups = Counter(tuple(fallback.get(key) for key in keys) for fallback in fallbacks)
    lines = []
    for (wanted, got, wanted_bits, got_bits, reason), tensors in groups.most_common():
        line = f"{count(tensors, 'tensor')}: {reason or f'{text(wanted)} not possible'} -> {text(got)}"
        if wanted_bits is not None and got_bits is not None:
            line += f", {got_bits:.2f} bits instead of {wanted_bits:.2f}"
        lines.append(line)
    return lines


def _time(times: str, key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda run: duration((run.get(times) or {}).get(key))


_COMMON: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("tokens", lambda run: count(run.get("tokens"))),
    ("threads", lambda run: count(run.get("threads"))),
    ("tokens/s", lambda run: rate_number(run.get("tokens_per_s"))),
    ("spread", spread),
)
RUN_COLUMNS = {
    "prefill": (
        *_COMMON,
        ("TTFT p50", _time("ttft_s", "p50")),
        ("TTFT min", _time("ttft_s", "min")),
        ("TTFT max", _time("ttft_s", "max")),
        ("validity", lambda run: "INVALID" if run.get("valid") is False else ""),
    ),
    "decode": (
        *_COMMON,
        ("per token p50", _time("tpot_s", "p50")),
        ("p95", _time("tpot_s", "p95")),
        ("p99", _time("tpot_s", "p99")),
        ("ceiling", lambda run: rate_number(run.get("ceiling_tokens_per_s"))),
        ("reached", lambda run: percent(run.get("ceiling_fraction"), 0)),
        ("validity", lambda run: "INVALID" if run.get("valid") is False else ""),
    ),
    "predict": (
        ("batch", lambda run: count(run.get("batch"))),
        ("tokens", lambda run: count(run["tokens"]) if run.get("tokens") else ""),
        ("rows", lambda run: count(run["rows"]) if run.get("rows") else ""),
        ("threads", lambda run: count(run.get("threads"))),
        ("examples/s", lambda run: rate_number(run.get("items_per_s"))),
        ("spread", spread),
        ("latency p50", _time("latency_s", "p50")),
        ("p95", _time("latency_s", "p95")),
        ("p99", _time("latency_s", "p99")),
        ("validity", lambda run: "INVALID" if run.get("valid") is False else ""),
    ),
}
"""Tables of benchmark runs: for each kind the columns' names and how each shows a run."""
