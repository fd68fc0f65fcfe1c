"""What fine-tuning on a large file needs in memory beyond what a small one does: peak RSS of `edgeslm finetune`.

    python benchmarks/training_memory.py [--megabytes 10 1000] [--model DIR] [--work DIR]

Each run reads, scrubs nothing, packs, holds out every hundredth text and makes three steps, in a process of its own;
its peak is what the kernel counted.  The default model is tiny and made on the spot.  The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ALLOWED_GROWTH_BYTES = 300_000_000
WORDS = 20_000
"""Different words of the synthetic text: too many for a list of all that was seen to stay small."""
TEXT_WORDS, ROW_WORDS = (20, 600), 1_000_000
"""A text is a piece of one long row of words."""


def write_text(path: Path, size_bytes: int, seed: int = 0) -> None:
    """JSONL of random words, the rarer the longer, in texts of many lengths; no two texts are alike."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = [
        "".join(draw.choices(letters, range(26, 0, -1), k=2 + rank.bit_length() // 2))
        for rank in range(1, WORDS + 1)
    ]
    row = draw.choices(words, [1 / rank for rank in range(1, WORDS + 1)], k=ROW_WORDS)
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size_bytes:
            length, number = draw.randint(*TEXT_WORDS), number + 1
            at = draw.randrange(ROW_WORDS - length)
            written += file.write(json.dumps({"text": f"{number} {' '.join(row[at : at + length])}"}) + "\n")


def peak_rss_bytes(command: list[str], environment: dict[str, str]) -> tuple[int, float]:
    """(peak of the resident set, seconds) of a command.  Exits with its errors when it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert process.stdout is not None
    output = process.stdout.read()
    _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(output.decode(errors="replace")[-3000:])
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, time.monotonic() - start


def run(model: Path, megabytes: int, work: Path) -> dict[str, Any]:
    data = work / f"{megabytes}.jsonl"
    write_text(data, megabytes * 1_000_000)
    command = [
        sys.executable, "-m", "edgeslm", "finetune", str(model), "--train", str(data), "--heldout-every", "100",
        "--max-steps", "3", "--batch-size", "2", "--context", "128", "--json",
        "--out", str(work / f"tuned-{megabytes}"),
    ]  # fmt: skip
    peak, seconds = peak_rss_bytes(command, {**os.environ, "PYTHONPATH": str(ROOT)})
    print(f"{megabytes:>7,} MB: peak RSS {peak / 1e6:,.0f} MB, {seconds:,.0f} s", flush=True)
    return {"file_bytes": data.stat().st_size, "peak_rss_bytes": peak, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs=2, default=[10, 1000], metavar=("SMALL", "LARGE"))
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face directory; a tiny one is made when left out"
    )
    parser.add_argument("--work", type=Path, help="where the files go: five times the large one's size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work, model = Path(folder), arguments.model
        if model is None:
            from tests.models import write_hf_model

            model = write_hf_model(work / "model", "llama", tokenizer="smollm")
        small, large = (run(model, megabytes, work) for megabytes in arguments.megabytes)
    growth = large["peak_rss_bytes"] - small["peak_rss_bytes"]
    fits = growth < ALLOWED_GROWTH_BYTES
    print(
        f"growth: {growth / 1e6:,.0f} MB, {'less' if fits else 'NOT less'} than {ALLOWED_GROWTH_BYTES / 1e6:,.0f} MB"
    )
    print(json.dumps({"small": small, "large": large, "growth_bytes": growth, "passed": fits}))
    sys.exit(not fits)


if __name__ == "__main__":
    main()
