"""Programs timed in turn in one run, and the ratio of their figures with its interval.

Each program runs whole in a process of its own, the order turned each time, so that a slower minute of the
machine hits all.  A round's figure is that of a program's fastest repetition, as other work on the machine only
ever adds time; printed is the median of the rounds' ratios with the 95 % interval of a bootstrap over them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Result = TypeVar("Result")

GENAI = """
import json, sys, time
import numpy as np, onnxruntime_genai as genai
folder, prompt, decode, threads, repetitions = sys.argv[1], *map(int, sys.argv[2:])
config = genai.Config(folder)
config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
model = genai.Model(config)
tokenizer = genai.Tokenizer(model)
tokens = np.random.default_rng(0).integers(100, 30000, prompt).astype(np.int32)
prefill, steps = [], []
for repetition in range(repetitions + 1):
    parameters = genai.GeneratorParams(model)
    length = prompt + decode + 1
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(tokens[None])
    generator.generate_next_token()
    filled = time.perf_counter()
    found = [int(generator.get_next_tokens()[0])]
    for _ in range(decode):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    end = time.perf_counter()
    if repetition:
        prefill.append(prompt / (filled - start))
        steps.append(decode / (end - filled))
"""
"""onnxruntime-genai's own greedy loop on the model in the directory argv[1]: prompt, decode, threads, repetitions."""

TOLD = """
status = open("/proc/self/status").read()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(json.dumps({"prefill": prefill, "decode": steps, "tokens": found, "peak_rss_bytes": peak}))
"""
"""The end of such a program: its tokens/s by repetition, its tokens and the peak of its memory."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median over the rounds, and the ends of its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} - {self.high:.3f})"


def in_turn(programs: Mapping[str, Callable[[], Result]], rounds: int) -> list[dict[str, Result]]:
    """What each program gave in each round; every round begins with the next program."""
    names = list(programs)
    found = []
    for number in range(rounds):
        at = number % len(names)
        found.append({name: programs[name]() for name in names[at:] + names[:at]})
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of each round's figures."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    random = Random(0)
    resampled = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(1000))
    return Ratio(median=statistics.median(ratios), low=resampled[25], high=resampled[974])


def output_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a command.  Raises SystemExit with its errors when it fails."""
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        shortened = [part if len(part) < 200 else "..." for part in command]
        raise SystemExit(f"{' '.join(shortened)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout
