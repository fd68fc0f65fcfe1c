"""From a model directory to a quantized file: edgeslm against convert_hf_to_gguf.py and llama-quantize, one run.

    python benchmarks/quantize_vs_llama_cpp.py MODEL_DIR --scheme Q4_K_M [--importance FILE]

MODEL_DIR holds a Hugging Face model; a .gguf file works too and is then compared with llama-quantize
alone.  Both ways run in turn, whole processes; the ratio is of the medians, the peak that of the larger
process.  The intermediate file has the source's own float type, so that nothing is lost on the way and
the quantized tensors must be equal byte by byte.  Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import peer

from edgeslm.gguf_file import read_gguf, tensor_bytes
from edgeslm.safetensors_file import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

WALL_TARGET, MEMORY_TARGET = 0.6, 0.5


@dataclass(frozen=True, kw_only=True)
class Run:
    """Whole processes: wall seconds of all, peak memory of the largest."""

    wall_s: float
    peak_rss_bytes: int


def main() -> int:
    arguments = parse(sys.argv[1:])
    tools, sources = peer.locate(arguments)
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as folder:
        ours_file, theirs_file = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        ours, theirs = [], []
        for _ in range(arguments.repetitions):
            ours.append(total([edgeslm_command(arguments, ours_file)]))
            theirs.append(
                total(peer_commands(arguments, tools, sources, Path(folder) / "float.gguf", theirs_file))
            )
        different = differing_tensors(ours_file, theirs_file)
    result = {
        "model": str(arguments.model),
        "scheme": arguments.scheme,
        "edgeslm": summary(ours),
        "llama.cpp": summary(theirs),
        "wall_ratio": summary(ours)["wall_s"] / summary(theirs)["wall_s"],
        "peak_rss_ratio": summary(ours)["peak_rss_bytes"] / summary(theirs)["peak_rss_bytes"],
        "different_tensors": different,
    }
    print(f"{'':12}{'wall s':>10}{'peak MiB':>12}")
    for name in ("edgeslm", "llama.cpp"):
        print(f"{name:12}{result[name]['wall_s']:10.2f}{result[name]['peak_rss_bytes'] / 2**20:12.0f}")
    print(f"{'ratio':12}{result['wall_ratio']:10.2f}{result['peak_rss_ratio']:12.2f}")
    print(f"tensors that differ: {len(different)}")
    print(json.dumps(result))
    missed = result["wall_ratio"] > WALL_TARGET or result["peak_rss_ratio"] > MEMORY_TARGET or bool(different)
    return int(missed)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", default="Q4_K_M")
    parser.add_argument("--importance", type=Path, help="an importance matrix, given to both")
    parser.add_argument("--repetitions", type=int, default=3)
    peer.add_options(parser)
    return parser.parse_args(arguments)


def edgeslm_command(arguments: argparse.Namespace, out: Path) -> list[str]:
    calibration = ["--calibration", str(arguments.importance)] if arguments.importance else []
    return [
        sys.executable, "-m", "edgeslm", "quantize", str(arguments.model), "--scheme", arguments.scheme,
        "--out", str(out), "--json", *calibration,
    ]  # fmt: skip


def peer_commands(
    arguments: argparse.Namespace, tools: Path, sources: Path, middle: Path, out: Path
) -> list[list[str]]:
    matrix = ["--imatrix", str(arguments.importance)] if arguments.importance else []
    if arguments.model.suffix == ".gguf":
        return [[str(tools / "llama-quantize"), *matrix, str(arguments.model), str(out), arguments.scheme]]
    convert = [
        sys.executable, str(sources / "convert_hf_to_gguf.py"), str(arguments.model),
        "--outtype", float_type(arguments.model), "--outfile", str(middle),
    ]  # fmt: skip
    return [convert, [str(tools / "llama-quantize"), *matrix, str(middle), str(out), arguments.scheme]]


def float_type(model: Path) -> str:
    """The outtype that keeps the weights as they are."""
    kinds = {tensor.dtype for tensor in read_checkpoint(model).values()}
    return {"BF16": "bf16", "F16": "f16"}.get(kinds.pop(), "f32") if len(kinds) == 1 else "f32"


def total(commands: Sequence[Sequence[str]]) -> Run:
    """Run commands one after the other.  Raises SystemExit with the output of one that fails."""
    start, peak = time.perf_counter(), 0
    for command in commands:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            if status:
                output.seek(0)
                raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')}")
    return Run(wall_s=time.perf_counter() - start, peak_rss_bytes=peak)


def summary(runs: Sequence[Run]) -> dict[str, float]:
    return {
        "wall_s": statistics.median(run.wall_s for run in runs),
        "peak_rss_bytes": statistics.median(run.peak_rss_bytes for run in runs),
    }


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not the same in both files, type and bytes."""
    ours, theirs = read_gguf(one), read_gguf(other)
    different = sorted(set(ours.tensors) ^ set(theirs.tensors))
    for name in sorted(set(ours.tensors) & set(theirs.tensors)):
        mine, yours = ours.tensors[name], theirs.tensors[name]
        same = (mine.type, mine.shape) == (yours.type, yours.shape)
        if not same or not np.array_equal(tensor_bytes(ours, mine), tensor_bytes(theirs, yours)):
            different.append(name)
    return different


if __name__ == "__main__":
    sys.exit(main())
