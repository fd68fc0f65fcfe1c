"""The F16 file against the one that llama.cpp's own converter writes: tensors, and every key of the metadata."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeslm.gguf_file import read_gguf
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import export_gguf
from edgeslm.stages.checkpoint import resolve
from tests.models import FAMILIES, write_hf_model
from tests.stages.test_export_gguf import ROPE_LLAMA3, ROPE_LONG, ROPE_YARN, assert_same_tensors

pytestmark = [pytest.mark.slow, pytest.mark.workstation]

ROOT = Path(__file__).resolve().parents[2]
# The converter knows published vocabularies only; a trained one is given the name of its family's.
PRE = {"llama": "llama-bpe", "smollm3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "granite": "refact",
       "olmo2": "dbrx"}  # fmt: skip
UNTIED = {"tied": False, "dtype": "bfloat16", "hidden": 96}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES if family not in ("olmo2", "smollm3")),
    *((family, UNTIED) for family in FAMILIES if family not in ("gemma2", "smollm3")),
    ("smollm3", {"no_rope_layer_interval": 4, "layers": 5}),
    ("llama", {"rope_scaling": ROPE_LLAMA3, "dtype": "float16"}),
    (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": True, "mlp_bias": True},
    ),
    ("qwen2", {"rope_scaling": ROPE_YARN}),
    ("phi3", {"rope_scaling": ROPE_LONG, "context": 2048}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layers": 8}),
    ("llama", {"tokenizer": "mistral", "head_dim": 32}),
    ("llama", {"hidden": 576, "heads": 9, "kv_heads": 3, "intermediate": 256}),
]
CONVERT = """
import json, sys
sources, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [sources, sources + "/gguf-py"]
from pathlib import Path
import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from conversion.base import TextModel
for directory, out, pre in jobs:
    if pre:
        TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
    hparams = ModelBase.load_hparams(Path(directory), False)
    model = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    model(Path(directory), gguf.LlamaFileType.MOSTLY_F16, Path(out)).write()
"""


@pytest.fixture(scope="module")
def converter() -> Path:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import peer

        return Path(peer.fetch_sources())
    except SystemExit as error:
        pytest.skip(f"llama.cpp's sources can't be fetched: {error}")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_tensors_and_metadata_are_the_converters(converter: Path, tmp_path: Path) -> None:
    jobs = []
    for number, (family, settings) in enumerate(CASES):
        source = write_hf_model(tmp_path / str(number) / "tiny-model", family, **settings)
        jobs.append((str(source), str(tmp_path / str(number) / "theirs.gguf"), PRE.get(family)))
    subprocess.run(
        [sys.executable, "-c", CONVERT, str(converter), json.dumps(jobs)], check=True, capture_output=True
    )
    for (family, settings), (source, theirs, _) in zip(CASES, jobs, strict=True):
        ours = Path(theirs).with_name("ours.gguf")
        export_gguf.run(resolve(source), QuantizeSpec(scheme="F16"), ours)
        assert_same_tensors(ours, Path(theirs))
        assert read_gguf(ours).fields == read_gguf(theirs).fields, (family, settings)
