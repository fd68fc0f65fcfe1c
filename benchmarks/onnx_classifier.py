"""A classifier in 8 bits against itself in float32: bytes, accuracy and latency of single texts, in one run.

    edgeslm build recipes/variants-email.toml --out build/variants-email
    python benchmarks/onnx_classifier.py build/variants-email/float build/variants-email/int8-dynamic

The first bundle is what the others are held against.  Accuracy is what the build measured on the rows that it held
out, through each file; latency that of `edgeslm bench` with one text in a call, tokenizing counted, the programs in
turn, `--pairs` times (see pairs.py).
Exits with 1 where a bundle loses more than 0.5 points of accuracy, has more than a quarter of the bytes of weights
or is less than 1.5 times as fast at any of the lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairs import Ratio, in_turn, output_of, ratio

from edgeslm.bundle import open_bundle
from edgeslm.runtime.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

POINTS, SMALLER, FASTER = 0.5, 4.0, 1.5
"""Most points of accuracy lost, least ratios of bytes and of speed."""


def main() -> int:
    arguments = parse(sys.argv[1:])
    bundles = [arguments.float32, *arguments.others]
    programs = {str(bundle): partial(measure_latency_s, bundle, arguments) for bundle in bundles}
    rounds = in_turn(programs, arguments.pairs)
    rows = [row(bundle, str(arguments.float32), rounds) for bundle in bundles]
    if not arguments.as_json:
        show(rows)
    print(json.dumps({"threads": arguments.threads, "bundles": rows}))
    return int(any(missed(each, rows[0]) for each in rows[1:]))


def measure_latency_s(bundle: Path, arguments: argparse.Namespace) -> dict[int, float]:
    """Seconds of a call with one text, by its length in tokens: the fastest repetition's."""
    command = [
        sys.executable, "-m", "edgeslm", "bench", str(bundle), "-p", arguments.lengths, "--batch-sizes", "1",
        "-t", str(arguments.threads), "-r", str(arguments.repetitions), "--json",
    ]  # fmt: skip
    record = json.loads(output_of(command).splitlines()[-1])
    return {run["tokens"]: min(run["samples_s"]) / run["calls"] for run in record["runs"]}


def row(bundle: Path, float32: str, rounds: Sequence[dict[str, dict[int, float]]]) -> dict[str, Any]:
    opened = open_bundle(bundle)
    quality = opened.manifest["quality"]
    lengths = rounds[0][str(bundle)]
    return {
        "bundle": str(bundle),
        "bytes": quality["artifact"]["weight_bytes"],
        "accuracy": quality["accuracy"]["value"],
        "latency_ms": {length: 1e3 * min(each[str(bundle)][length] for each in rounds) for length in lengths},
        "speed_ratio": {
            length: asdict(
                ratio(
                    [each[float32][length] for each in rounds], [each[str(bundle)][length] for each in rounds]
                )
            )
            for length in lengths
        },
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':32}{'MB':>8}{'accuracy':>10}   one text in a call: latency, speed against the first")
    for each in rows:
        print(f"{Path(each['bundle']).name:32}{each['bytes'] / 1e6:8.2f}{each['accuracy']:10.4f}")
        for length, latency in each["latency_ms"].items():
            print(f"{length:>44} tokens {latency:8.2f} ms  {Ratio(**each['speed_ratio'][length])}")


def missed(one: dict[str, Any], reference: dict[str, Any]) -> bool:
    return (
        one["accuracy"] < reference["accuracy"] - POINTS / 100
        or one["bytes"] * SMALLER > reference["bytes"]
        or any(found["median"] < FASTER for found in one["speed_ratio"].values())
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("float32", type=Path, help="the bundle that the others are held against")
    parser.add_argument("others", type=Path, nargs="+", help="bundles of the same classifier")
    parser.add_argument("--lengths", default="16,64,256", help="of the timed texts, in tokens, as a list")
    parser.add_argument("-t", "--threads", type=int, default=usable_cores(), help="default: the usable cores")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="in each run, after a warm-up")
    parser.add_argument("--pairs", type=int, default=6, help="how often each runs")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the JSON document only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
