"""Prefill, decode and memory: `edgeslm bench` on an ONNX bundle against onnxruntime-genai's own generate loop.

    python benchmarks/speed_vs_genai.py BUNDLE GENAI_DIRECTORY -p 128 -n 64 -t 2

GENAI_DIRECTORY is what onnxruntime_genai's model builder wrote (genai_config.json, model.onnx); with --same
its graph also runs in edgeslm's runner, so that runner and graph can be told apart.  Both run in turn, `--pairs`
times (see pairs.py).
genai's prefill is append_tokens and the choice of the first token; its decode is greedy, generate_next_token
and get_next_tokens per token.  Memory is the peak of the whole process with its tokenizer loaded.
Exits with 1 if decode is slower than genai's, prefill than 0.95 of it, or the peak above 1.1 of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairs import GENAI, TOLD, in_turn, output_of, ratio

from edgeslm.bundle import write_bundle
from edgeslm.runtime.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Run = dict[str, Any]
    """{"prefill": [tokens/s of each repetition], "decode": [...], "tokens": [...], "peak_rss_bytes": int}."""

DECODE, PREFILL, MEMORY = 1.0, 0.95, 1.1
"""Least ratio of decode and prefill, most of the peak."""
EDGESLM = """
import json, sys, time
import numpy as np
from edgeslm.bundle import open_bundle
from edgeslm.runtime.runner import RunnerOptions, open_runner
path, prompt, decode, threads, repetitions = sys.argv[1], *map(int, sys.argv[2:])
runner = open_runner(open_bundle(path), RunnerOptions(threads=threads, context=prompt + decode + 1))
tokens = np.random.default_rng(0).integers(100, 30000, prompt).tolist()
prefill, steps = [], []
for repetition in range(repetitions + 1):
    runner.reset()
    start = time.perf_counter()
    runner.prefill(tokens)
    token = int(runner.last_logits().argmax())
    filled = time.perf_counter()
    found = [token]
    for _ in range(decode):
        runner.step(token)
        token = int(runner.last_logits().argmax())
        found.append(token)
    end = time.perf_counter()
    if repetition:
        prefill.append(prompt / (filled - start))
        steps.append(decode / (end - filled))
"""


def main() -> int:
    arguments = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[], Run]] = {
            "edgeslm": lambda: run(EDGESLM, arguments.bundle, arguments),
            "genai": lambda: run(GENAI, arguments.genai, arguments),
        }
        if arguments.same:
            same = bundle_of_builder(arguments.bundle, arguments.genai, Path(folder) / "same")
            runs["same graph"] = lambda: run(EDGESLM, same, arguments)
        rounds = in_turn(runs, arguments.pairs)
    rows = [
        compare(rounds, name, what)
        for name in runs
        if name != "genai"
        for what in ("prefill", "decode", "memory")
    ]
    for row in rows if not arguments.as_json else ():
        print(
            f"{row['name']:>12} {row['what']:8}{row['edgeslm']:10.1f} against genai's {row['genai']:8.1f} "
            f"{row['unit']:9}ratio {row['ratio']:.3f}  ({row['ratio_low']:.3f} - {row['ratio_high']:.3f})"
        )
    print(json.dumps({"bundle": str(arguments.bundle), "genai": str(arguments.genai), "rows": rows}))
    bounds = {"prefill": (PREFILL, float("inf")), "decode": (DECODE, float("inf")), "memory": (0.0, MEMORY)}
    return int(any(not bounds[row["what"]][0] <= row["ratio"] <= bounds[row["what"]][1] for row in rows))


def compare(rounds: Sequence[dict[str, Run]], name: str, what: str) -> dict[str, Any]:
    """Both programs' figure, and the ratio over the rounds with its interval."""

    def figure(one: Run) -> float:
        return one["peak_rss_bytes"] / 2**20 if what == "memory" else float(max(one[what]))

    ours, theirs = ([figure(each[program]) for each in rounds] for program in (name, "genai"))
    found = ratio(ours, theirs)
    return {
        "name": name,
        "what": what,
        "unit": "MiB" if what == "memory" else "tokens/s",
        "edgeslm": statistics.median(ours),
        "genai": statistics.median(theirs),
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
    }


def run(program: str, path: Path, arguments: argparse.Namespace) -> Run:
    sizes = (arguments.prompt_tokens, arguments.decode_tokens, arguments.threads, arguments.repetitions)
    output = output_of([sys.executable, "-c", program + TOLD, str(path), *map(str, sizes)])
    found: Run = json.loads(output.splitlines()[-1])
    return found


def bundle_of_builder(bundle: Path, genai: Path, out: Path) -> Path:
    """The builder's graph under the bundle's manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    files = {
        path.name: path
        for path in sorted(genai.iterdir())
        if re.fullmatch(r"model\.onnx(\.data)?", path.name)
    }
    files["tokenizer.json"] = bundle / "tokenizer.json"
    kept = {key: manifest[key] for key in ("name", "task", "format", "weights", "model", "quantization")}
    return write_bundle(out, files=files, manifest=kept).path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle of a language model in the format onnx")
    parser.add_argument("genai", type=Path, help="a directory that onnxruntime_genai's builder wrote")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128)
    parser.add_argument("-n", "--decode-tokens", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=usable_cores(), help="default: the usable cores")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="in each process, behind a warm-up")
    parser.add_argument("--pairs", type=int, default=6, help="how often each program runs")
    parser.add_argument(
        "--same", action="store_true", help="also run the builder's graph in edgeslm's runner"
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the JSON document only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
