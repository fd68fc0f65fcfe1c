"""The ONNX runner on real graphs of tiny models, against torch: edgeslm's own, the model builder's and optimum's."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bundle import write_bundle
from edgeslm.runtime.runner import RunnerOptions, open_runner
from tests.models import write_hf_model
from tests.onnx_decoders import manifest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation


def own_graph(source: Path, out: Path) -> None:
    from edgeslm.stages import decoder_graph
    from edgeslm.stages.checkpoint import resolve

    decoder_graph.build(resolve(str(source)), out)


def builders_graph(source: Path, out: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out),
               "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]  # fmt: skip
    subprocess.run(command, capture_output=True, check=True)


def optimums_graph(source: Path, out: Path) -> None:
    pytest.importorskip("optimum.onnxruntime")
    from optimum.exporters.onnx import main_export

    main_export(str(source), out, task="text-generation-with-past", do_validation=False, no_post_process=True)


@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize(
    "graph",
    [own_graph, *(pytest.param(one, marks=pytest.mark.slow) for one in (builders_graph, optimums_graph))],
)
def test_logits_and_greedy_tokens_are_torchs(graph: Any, tmp_path: Path) -> None:
    import torch
    import transformers

    source = write_hf_model(tmp_path / "model", "llama")
    (tmp_path / "graph").mkdir()
    graph(source, tmp_path / "graph")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = model.config
    names = [path.name for path in (tmp_path / "graph").glob("model.onnx*")]
    files = {name: tmp_path / "graph" / name for name in names} | {
        "tokenizer.json": source / "tokenizer.json"
    }
    facts = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings, "stop_tokens": [],
        "kv_heads": config.num_key_value_heads, "head_dim": config.hidden_size // config.num_attention_heads,
    }  # fmt: skip
    bundle = write_bundle(tmp_path / "bundle", files=files, manifest=manifest(**facts))
    runner = open_runner(bundle, RunnerOptions(threads=1, context=128, ubatch=16))
    prompt = np.random.default_rng(0).integers(3, config.vocab_size, 40).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0].numpy()
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    np.testing.assert_allclose(runner.logits(prompt, 9), wanted[9:], atol=1e-3 * np.abs(wanted).max(), rtol=0)
    runner.prefill(prompt)
    for token in expected[0, len(prompt) :].tolist():
        assert int(runner.last_logits().argmax()) == token
        runner.step(token)
    runner.close()
