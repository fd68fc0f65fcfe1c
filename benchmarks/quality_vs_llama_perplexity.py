"""KL divergence, perplexity and agreement: edgeslm against llama-perplexity, same files, same text, one run.

    python benchmarks/quality_vs_llama_perplexity.py MODEL.gguf --base BASE.gguf --text FILE

MODEL is the quantized file, BASE the one it was made of.  llama-perplexity writes the base's
log-probabilities to a temporary file: two bytes times vocabulary for each scored token.  The text
must fill two windows, as llama-perplexity wants.  Exits with 1 if mean KL or perplexity are more than 2 % apart.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peer

from edgeslm.bench.quality import measure_quality
from edgeslm.bundle import open_bundle
from edgeslm.runtime.engine import load_engine
from edgeslm.runtime.runner import RunnerOptions, open_runner

if TYPE_CHECKING:
    from collections.abc import Sequence

TOLERANCE = 0.02
PATTERNS = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "reference perplexity": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "perplexity ratio": r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+)",
    "mean KL": r"Mean\s+KLD:\s*(-?[\d.]+)",
    "median KL": r"Median\s+KLD:\s*(-?[\d.]+)",
    "p99 KL": r"99\.0%\s+KLD:\s*(-?[\d.]+)",
    "maximum KL": r"Maximum KLD:\s*(-?[\d.]+)",
    "top-1 agreement": r"Same top p:\s*([\d.]+)",
}
"""Where llama-perplexity's output has each quantity."""
GATED = ("mean KL", "perplexity", "perplexity ratio")


def main() -> int:
    arguments = parse(sys.argv[1:])
    tools = arguments.tools or peer.build_tools(["llama-perplexity"], cache=arguments.cache)
    start = time.perf_counter()
    theirs = llama_perplexity(tools, arguments)
    middle = time.perf_counter()
    ours = edgeslm_quality(arguments)
    seconds = {"edgeslm": time.perf_counter() - middle, "llama-perplexity": middle - start}
    rows = [
        {
            "quantity": name,
            "edgeslm": ours[name],
            "llama-perplexity": theirs[name],
            "ratio": ours[name] / theirs[name],
        }
        for name in PATTERNS
    ]
    missed = [
        row["quantity"] for row in rows if row["quantity"] in GATED and abs(row["ratio"] - 1) > TOLERANCE
    ]
    print(f"{'':22}{'edgeslm':>12}{'llama-perpl.':>14}{'ratio':>9}")
    for row in rows:
        print(f"{row['quantity']:22}{row['edgeslm']:12.6f}{row['llama-perplexity']:14.6f}{row['ratio']:9.4f}")
    print(f"{'wall time, s':22}{seconds['edgeslm']:12.1f}{seconds['llama-perplexity']:14.1f}")
    print("missed: " + ", ".join(missed) if missed else f"{', '.join(GATED)}: all within {TOLERANCE:.0%}")
    print(json.dumps({"model": str(arguments.model), "rows": rows, "wall_s": seconds, "missed": missed}))
    return 1 if missed else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the quantized .gguf file")
    parser.add_argument("--base", type=Path, required=True, help="the .gguf file that it was made of")
    parser.add_argument("--text", type=Path, required=True, help="a text file of at least two windows")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, help="threads of both; default: the usable cores")
    peer.add_options(parser)
    return parser.parse_args(arguments)


def llama_perplexity(tools: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """What llama-perplexity says of the model, after a first pass over the base."""
    common = ["--ctx-size", str(arguments.context)]
    if arguments.threads:
        common += ["--threads", str(arguments.threads)]
    if load_engine().has_amx:  # as the runner does: these kernels crash when GCC has built them
        common.append("--no-repack")
    with tempfile.TemporaryDirectory() as scratch:
        stored = ["--kl-divergence-base", str(Path(scratch) / "base.logits")]
        run(tools, ["--model", str(arguments.base), "--file", str(arguments.text), *stored, *common])
        said = run(tools, ["--model", str(arguments.model), "--kl-divergence", *stored, *common])
    found = {name: re.search(pattern, said) for name, pattern in PATTERNS.items()}
    if not all(found.values()):
        sys.exit(f"llama-perplexity gave no result; is the text long enough?\n{said[-2000:]}")
    values = {name: float(match[1]) for name, match in found.items() if match}
    return values | {"top-1 agreement": values["top-1 agreement"] / 100}


def run(tools: Path, arguments: list[str]) -> str:
    done = subprocess.run(
        [tools / "llama-perplexity", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(
            f"llama-perplexity {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout[-2000:]}"
        )
    return done.stdout


def edgeslm_quality(arguments: argparse.Namespace) -> dict[str, float]:
    options = RunnerOptions(
        context=arguments.context,
        batch=arguments.context,
        ubatch=min(512, arguments.context),
        threads=arguments.threads,
    )
    # llama-perplexity drops one newline at the end of a file.
    text = arguments.text.read_bytes().decode("utf-8", errors="replace").removesuffix("\n")
    candidate, reference = (
        open_runner(open_bundle(path), options) for path in (arguments.model, arguments.base)
    )
    record: dict[str, Any] = measure_quality(candidate, reference, [text], context=arguments.context)
    values = {
        "perplexity": record["perplexity"],
        "reference perplexity": record["reference_perplexity"],
        "perplexity ratio": record["perplexity_ratio"],
        **{f"{name} KL": record["kl_nats"][name] for name in ("mean", "median", "p99")},
        "maximum KL": record["kl_nats"]["max"],
        "top-1 agreement": record["top1_agreement"],
    }
    return {name: estimate["value"] for name, estimate in values.items()}


if __name__ == "__main__":
    sys.exit(main())
