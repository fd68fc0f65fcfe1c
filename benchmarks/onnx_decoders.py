"""Which ONNX graph of a decoder is the fastest: edgeslm's, onnxruntime-genai's model builder's, or optimum's.

    python benchmarks/onnx_decoders.py MODEL -p 128 -n 64 -t 2

MODEL is a Hugging Face directory.  All three export it in float32 (optimum and genai into --cache, once); then
these run in turn, `--pairs` times (see pairs.py):

    edgeslm, builder, optimum   the graph in the same loop: buffers of the cache shared by past and present where
                                the graph can, handed on without a copy where it can't; logits of all positions
                                unless the graph can leave them out
    genai                       onnxruntime-genai's own generate loop on the builder's graph
    ORTModelForCausalLM         optimum's own generate on optimum's graph
    edgeslm int4                edgeslm's graph with 4-bit weights (with --int4), in the same loop

Ratios are to ORTModelForCausalLM.
Exits with 1 if edgeslm's graph decodes or prefills slower than 0.97 of the builder's or of optimum's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peer
from pairs import GENAI, TOLD, Ratio, in_turn, output_of, ratio

from edgeslm.runtime.host import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    Run = dict[str, Any]
    """{"prefill": [tokens/s of each repetition], "decode": [...], "tokens": [...], "peak_rss_bytes": int}."""

LOW = 0.97
BASE = "ORTModelForCausalLM"

EXPORTS = {
    "edgeslm": """
import sys
from pathlib import Path
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import export_decoder
from edgeslm.stages.checkpoint import resolve
spec = QuantizeSpec(format="onnx", scheme="F32")
export_decoder.run(resolve(sys.argv[1]), spec, Path(sys.argv[2], "model.onnx"))
""",
    "edgeslm int4": """
import sys
from pathlib import Path
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import export_decoder
from edgeslm.stages.checkpoint import resolve
spec = QuantizeSpec(format="onnx", scheme="int4")
export_decoder.run(resolve(sys.argv[1]), spec, Path(sys.argv[2], "model.onnx"))
""",
    "builder": """
import subprocess, sys
command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", sys.argv[1], "-o", sys.argv[2],
           "-p", "fp32", "-e", "cpu", "-c", sys.argv[2] + ".cache"]
sys.exit(subprocess.run(command, stdout=subprocess.DEVNULL).returncode)
""",
    "optimum": """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", device="cpu", do_validation=False)
""",
}
LOOPS = {
    "graph": """
import json, sys, time
import numpy as np, onnxruntime
folder, prompt, decode, threads, repetitions, head_dim = sys.argv[1], *map(int, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
value = onnxruntime.OrtValue
inputs = {each.name: each for each in session.get_inputs()}
optional = {each.name for each in session.get_overridable_initializers()}
pasts = {name: name.replace("past_key_values", "present") for name in inputs if name.startswith("past_key")}
heads, _, width = inputs[next(iter(pasts))].shape[1:]
width = width if isinstance(width, int) else head_dim
shares = b"GroupQueryAttention" in open(folder + "/model.onnx", "rb").read()
room = prompt + decode + 1 if shares else 0
def call(cache, tokens, total):
    binding = session.io_binding()
    feeds = {"input_ids": tokens[None], "attention_mask": np.ones((1, total), np.int64)}
    if "position_ids" in inputs:
        feeds["position_ids"] = np.arange(total - len(tokens), total)[None]
    if "first_logit" in optional:
        feeds["first_logit"] = np.array([len(tokens) - 1])
    kept = {name: value.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, held in (kept | cache).items():
        binding.bind_ortvalue_input(name, held)
    binding.bind_output("logits")
    for name, present in pasts.items():
        binding.bind_ortvalue_output(present, cache[name]) if shares else binding.bind_output(present)
    session.run_with_iobinding(binding)
    logits, *presents = binding.get_outputs()
    token = int(logits.numpy()[0, -1].argmax())
    return token, cache if shares else dict(zip(pasts, presents))
tokens = np.random.default_rng(0).integers(100, 30000, prompt)
prefill, steps = [], []
for repetition in range(repetitions + 1):
    cache = {name: value.ortvalue_from_numpy(np.zeros((1, heads, room, width), np.float32)) for name in pasts}
    start = time.perf_counter()
    token, cache = call(cache, tokens, prompt)
    filled = time.perf_counter()
    found = [token]
    for number in range(decode):
        token, cache = call(cache, np.array([token]), prompt + number + 1)
        found.append(token)
    end = time.perf_counter()
    if repetition:
        prefill.append(prompt / (filled - start))
        steps.append(decode / (end - filled))
""",
    "genai": GENAI,
    "ortmodel": """
import json, sys, time
import numpy as np, onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, prompt, decode, threads, repetitions = sys.argv[1], *map(int, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
torch.set_num_threads(threads)
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=True)
tokens = torch.from_numpy(np.random.default_rng(0).integers(100, 30000, prompt))[None]
def generate(count):
    start = time.perf_counter()
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count,
                           min_new_tokens=count, pad_token_id=0, eos_token_id=None)
    return time.perf_counter() - start, found[0, prompt:].tolist()
prefill, steps = [], []
for repetition in range(repetitions + 1):
    first, _ = generate(1)
    whole, found = generate(decode + 1)
    if repetition:
        prefill.append(prompt / first)
        steps.append(decode / (whole - first))
""",
}
CONTENDERS = {
    "edgeslm": ("graph", "edgeslm"),
    "builder": ("graph", "builder"),
    "optimum": ("graph", "optimum"),
    "genai": ("genai", "builder"),
    BASE: ("ortmodel", "optimum"),
    "edgeslm int4": ("graph", "edgeslm int4"),
}
"""Name to (loop, export)."""


def main() -> int:
    arguments = parse(sys.argv[1:])
    names = [name for name in CONTENDERS if arguments.int4 or "int4" not in name]
    exports = {name: export(name, arguments) for name in EXPORTS if arguments.int4 or "int4" not in name}
    rounds = in_turn({name: partial(measure, name, exports, arguments) for name in names}, arguments.pairs)
    rows = [row(rounds, name) for name in names]
    if not arguments.as_json:
        print(
            f"{'':>20}{'prefill':>10}{'decode':>10}{'peak MiB':>10}{'prefill ratio':>25}{'decode ratio':>25}"
        )
        for each in rows:
            print(
                f"{each['name']:>20}{each['prefill_tokens_per_s']:10.1f}{each['decode_tokens_per_s']:10.1f}"
                f"{each['peak_rss_bytes'] / 2**20:10.0f}{Ratio(**each['prefill_ratio'])!s:>25}"
                f"{Ratio(**each['decode_ratio'])!s:>25}"
            )
    same = {tuple(rounds[0][name]["tokens"]) for name in names if "int4" not in name}
    ours = {what: against(rounds, "edgeslm", ("builder", "optimum"), what) for what in ("prefill", "decode")}
    print(json.dumps({"model": str(arguments.model), "rows": rows, "same_tokens": len(same) == 1, **ours}))
    return int(len(same) > 1 or any(ratio < LOW for of in ours.values() for ratio in of.values()))


def export(name: str, arguments: argparse.Namespace) -> Path:
    """The directory with one exporter's files, made unless it is in the cache."""
    place = arguments.cache / f"onnx-decoders-{arguments.model.resolve().name}"
    folder = place / name.replace(" ", "-")
    again = name.startswith("edgeslm") and not arguments.keep
    if again or not (folder / "model.onnx").exists():
        output_of([sys.executable, "-c", EXPORTS[name], str(arguments.model.resolve()), str(folder)])
    return folder


def measure(name: str, exports: dict[str, Path], arguments: argparse.Namespace) -> Run:
    loop, made = CONTENDERS[name]
    sizes = [arguments.prompt_tokens, arguments.decode_tokens, arguments.threads, arguments.repetitions]
    if loop == "graph":
        sizes.append(head_dim(arguments.model))  # the builder's graphs don't say
    command = [sys.executable, "-c", LOOPS[loop] + TOLD, str(exports[made]), *map(str, sizes)]
    run: Run = json.loads(output_of(command).splitlines()[-1])
    return run


def head_dim(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def row(rounds: Sequence[dict[str, Run]], name: str) -> dict[str, Any]:
    """One contender: its fastest repetitions, its largest peak, and the ratios to ORTModelForCausalLM."""
    return {
        "name": name,
        "prefill_tokens_per_s": statistics.median(max(each[name]["prefill"]) for each in rounds),
        "decode_tokens_per_s": statistics.median(max(each[name]["decode"]) for each in rounds),
        "peak_rss_bytes": max(each[name]["peak_rss_bytes"] for each in rounds),
        "prefill_ratio": asdict(compare(rounds, name, BASE, "prefill")),
        "decode_ratio": asdict(compare(rounds, name, BASE, "decode")),
    }


def compare(rounds: Sequence[dict[str, Run]], name: str, other: str, what: str) -> Ratio:
    """Of both fastest repetitions in each round."""
    ours, theirs = ([max(each[one][what]) for each in rounds] for one in (name, other))
    return ratio(ours, theirs)


def against(
    rounds: Sequence[dict[str, Run]], name: str, others: Sequence[str], what: str
) -> dict[str, float]:
    return {f"{what} / {other}": compare(rounds, name, other, what).median for other in others}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128)
    parser.add_argument("-n", "--decode-tokens", type=int, default=64)
    parser.add_argument("-t", "--threads", type=int, default=usable_cores(), help="default: the usable cores")
    parser.add_argument("-r", "--repetitions", type=int, default=3, help="in each run, after a warm-up")
    parser.add_argument("--pairs", type=int, default=5, help="how often each runs")
    parser.add_argument("--int4", action="store_true", help="also edgeslm's int4")
    parser.add_argument("--keep", action="store_true", help="take edgeslm's exports from the cache too")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the JSON document only")
    parser.add_argument("--cache", type=Path, default=peer.CACHE, help="where exports are kept")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
