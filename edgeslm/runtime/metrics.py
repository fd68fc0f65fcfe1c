"""Counters and durations of the server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "edgeslm_"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
METRICS = {
    "requests_total": ("counter", "Requests answered, by path and status."),
    "rejected_total": ("counter", "Requests refused because the queue was full."),
    "cancelled_total": ("counter", "Requests whose client left before the end."),
    "prompt_tokens_total": ("counter", "Prompt tokens of all requests."),
    "reused_tokens_total": ("counter", "Prompt tokens that were in the cache already."),
    "generated_tokens_total": ("counter", "Tokens generated."),
    "examples_total": ("counter", "Texts or windows classified."),
    "time_to_first_token_seconds": ("histogram", "From the start of the computation to the first token."),
    "request_seconds": ("histogram", "From the request to the end of its answer, by path."),
    "queue_waiting": ("gauge", "Requests in the queue."),
    "running": ("gauge", "Requests being computed."),
    "resident_bytes": ("gauge", "Resident memory of this process."),
    "model_info": ("gauge", "The model that is served."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Numbers since the start; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = defaultdict(float)
        self._durations: dict[tuple[str, Labels], list[int]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """One duration more in a histogram."""
        key = name, tuple(sorted(labels.items()))
        with self._lock:
            counts = self._durations.setdefault(key, [0] * (len(BUCKETS_S) + 1))
            counts[bisect_left(BUCKETS_S, seconds)] += 1
            self._counts[f"{name}_sum", key[1]] += seconds

    def text(self, gauges: Mapping[str, float], **info: str) -> str:
        """All of it, with what `gauges` says of the moment and model_info labelled with `info`."""
        with self._lock:
            counts = dict(self._counts)
            durations = {key: list(values) for key, values in self._durations.items()}
        counts |= {(name, ()): value for name, value in gauges.items()}
        counts["model_info", tuple(sorted(info.items()))] = 1
        lines = []
        for name, (kind, text) in METRICS.items():
            lines += [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
            if kind == "histogram":
                for (which, labels), values in durations.items():
                    if which == name:
                        lines += _histogram(name, labels, values, counts[f"{name}_sum", labels])
            else:
                found = [(labels, value) for (which, labels), value in counts.items() if which == name]
                if not found and kind == "counter" and name != "requests_total":
                    found = [((), 0)]
                lines += [_line(name, labels, value) for labels, value in found]
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, values: list[int], total: float) -> list[str]:
    lines, reached = [], 0
    for bound, value in zip([*map(str, BUCKETS_S), "+Inf"], values, strict=True):
        reached += value
        lines.append(_line(f"{name}_bucket", (*labels, ("le", bound)), reached))
    return [*lines, _line(f"{name}_sum", labels, total), _line(f"{name}_count", labels, reached)]


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{PREFIX}{name}{f'{{{inside}}}' if inside else ''} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
