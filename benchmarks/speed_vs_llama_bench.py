"""Prefill and decode speed: `edgeslm bench` against llama-bench on the same file, threads and sizes, one run.

    python benchmarks/speed_vs_llama_bench.py FILE.gguf -p 128,512 -n 32,128 -t 2

Both run whole, in turn, `--pairs` times, the order swapped each time, so that a slower minute of the
machine hits both.  Each pair gives the ratio of its fastest repetitions, as other work on the machine only
ever adds time; printed is the median of the pairs, with the 95 % interval of a bootstrap over them, and beside
it the same of the pairs' medians: where the two differ much, the machine was not quiet, and more pairs help.
Where malloc happens to place a context's buffers is worth 6 % of a short prefill, in both programs alike
(llama-bench -p 128,128,128 shows it), so both run with one threshold for mapped blocks, which puts every
buffer at the start of a page; --placement natural leaves it to chance.
Exits with 1 if a ratio of the fastest is outside 0.97 to 1.03.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peer
from pairs import in_turn, output_of, ratio

from edgeslm.runtime.engine import load_engine
from edgeslm.runtime.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    Speeds = dict[tuple[str, int], list[float]]
    """Tokens per second of every repetition, by kind (prefill, decode) and number of tokens."""

LOW, HIGH = 0.97, 1.03
FIXED_PLACEMENT = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Larger blocks are mapped, each on pages of its own; setting it also ends glibc's adjusting of the threshold."""


def main() -> int:
    arguments = parse(sys.argv[1:])
    tools = arguments.tools or peer.build_tools(["llama-bench"], cache=arguments.cache)
    commands = {
        "edgeslm": lambda: edgeslm_speeds(arguments),
        "llama-bench": lambda: llama_bench_speeds(arguments, tools),
    }
    pairs = in_turn(commands, arguments.pairs)
    rows = [compare(pairs, kind, tokens) for kind, tokens in pairs[0]["edgeslm"]]
    if not arguments.as_json:
        print(
            f"{'tokens/s':>18}{'edgeslm':>12}{'llama-bench':>13}{'ratio':>9}{'95 % interval':>18}{'of medians':>13}"
        )
        for row in rows:
            print(
                f"{row['kind']:>9} {row['tokens']:8}{row['edgeslm_tokens_per_s']:12.1f}"
                f"{row['llama_bench_tokens_per_s']:13.1f}{row['ratio']:9.3f}"
                f"{row['ratio_low']:10.3f} - {row['ratio_high']:.3f}{row['ratio_of_medians']:13.3f}"
            )
    print(json.dumps({"model": str(arguments.model), "threads": arguments.threads, "rows": rows}))
    return int(any(not LOW <= row["ratio"] <= HIGH for row in rows))


def compare(pairs: Sequence[dict[str, Speeds]], kind: str, tokens: int) -> dict[str, Any]:
    """One size: both fastest repetitions, and the ratio over the pairs with its interval."""
    names = ("edgeslm", "llama-bench")
    ours, theirs = ([max(pair[name][kind, tokens]) for pair in pairs] for name in names)
    middle = [[statistics.median(pair[name][kind, tokens]) for pair in pairs] for name in names]
    found = ratio(ours, theirs)
    return {
        "kind": kind,
        "tokens": tokens,
        "edgeslm_tokens_per_s": statistics.median(ours),
        "llama_bench_tokens_per_s": statistics.median(theirs),
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "ratio_of_medians": statistics.median(one / other for one, other in zip(*middle, strict=True)),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("-p", "--prompt-tokens", default="128", help="prefill lengths, as a list")
    parser.add_argument("-n", "--decode-tokens", default="32", help="decode lengths, as a list")
    parser.add_argument("-t", "--threads", type=int, default=usable_cores(), help="default: the usable cores")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="of each size in each run")
    parser.add_argument("--pairs", type=int, default=8, help="how often both run")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the JSON document only")
    parser.add_argument(
        "--placement", choices=("fixed", "natural"), default="fixed", help="of buffers, by glibc's malloc"
    )
    peer.add_options(parser)
    return parser.parse_args(arguments)


def edgeslm_speeds(arguments: argparse.Namespace) -> Speeds:
    command = [
        sys.executable, "-m", "edgeslm", "bench", str(arguments.model), "-p", arguments.prompt_tokens,
        "-n", arguments.decode_tokens, "-t", str(arguments.threads), "-r", str(arguments.repetitions), "--json",
    ]  # fmt: skip
    record = json.loads(output_of(command, environment(arguments)).splitlines()[-1])
    return {
        (run["kind"], run["tokens"]): [run["tokens"] / sample for sample in run["samples_s"]]
        for run in record["runs"]
    }


def llama_bench_speeds(arguments: argparse.Namespace, tools: Path) -> Speeds:
    command = [
        str(tools / "llama-bench"), "-m", str(arguments.model), "-p", arguments.prompt_tokens,
        "-n", arguments.decode_tokens, "-t", str(arguments.threads), "-r", str(arguments.repetitions), "-o", "json",
    ]  # fmt: skip
    if load_engine().has_amx:  # then the runner has the weights as they are, see runtime/llama.py
        command += ["--repack", "0"]
    speeds: Speeds = {}
    for test in json.loads(output_of(command, environment(arguments))):
        kind, tokens = ("prefill", test["n_prompt"]) if test["n_prompt"] else ("decode", test["n_gen"])
        speeds[kind, tokens] = [tokens / (sample / 1e9) for sample in test["samples_ns"]]
    return speeds


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    return FIXED_PLACEMENT if arguments.placement == "fixed" else {}


if __name__ == "__main__":
    sys.exit(main())
