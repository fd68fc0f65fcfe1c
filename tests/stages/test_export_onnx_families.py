"""Encoders of the common families as ONNX classifiers: logits against torch, at several lengths and padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.stages.export_onnx import run
from tests.stages.test_export_onnx import SMALL, checkpoint, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-3
"""Of the largest logit."""
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "mpnet": {"pad_token_id": 1},
    "albert": {"embedding_size": 16, "num_hidden_groups": 1},
    "electra": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
    },
    "modernbert": {
        "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 2, "bos_token_id": 2,
        "eos_token_id": 2, "reference_compile": False,
    },
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "ernie": {},
    "squeezebert": {"embedding_size": 32},
}  # fmt: skip


REFUSED: dict[str, dict[str, Any]] = {
    "convbert": {"embedding_size": 32, "conv_kernel_size": 3, "num_groups": 1, "head_ratio": 2},
    "mobilebert": ENCODERS["mobilebert"],
}
"""Families in which a token reads its neighbours, padding included, unless the padding's vector is zero."""


def random_classifier(path: Path, family: str, settings: dict[str, Any], *, zero_padding: bool) -> Any:
    """A model with random norms and biases too, in `path`; zero_padding: the padding's vector stays zero."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **settings})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
        for module in model.modules():
            if zero_padding and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    model.save_pretrained(path)
    tokenizer(config.pad_token_id).save_pretrained(path)
    return model


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_of_every_family(family: str, tmp_path: Path) -> None:
    model = random_classifier(tmp_path / "hf", family, ENCODERS[family], zero_padding=True)
    exported = run(checkpoint(tmp_path / "hf"), tmp_path / "out" / "model.onnx")
    assert exported.model["architecture"] == family
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    outputs = []
    for length in (1, 7, 30):
        ids = np.random.default_rng(length).integers(3, 60, (2, length))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        with torch.no_grad():
            expected = model(
                **{name: torch.from_numpy(array) for name, array in feeds.items()}
            ).logits.numpy()
        found = session.run(["logits"], feeds)[0]
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
        outputs.append(expected)
    assert np.ptp(np.concatenate(outputs), axis=0).max() > 0.01  # the model does tell texts apart


@pytest.mark.parametrize("family", REFUSED)
def test_an_encoder_that_reads_the_padding_is_refused(family: str, tmp_path: Path) -> None:
    """Its answer would depend on the other texts of a batch."""
    random_classifier(tmp_path / "hf", family, REFUSED[family], zero_padding=False)
    with pytest.raises(ModelError, match="computes something else than the model"):
        run(checkpoint(tmp_path / "hf"), tmp_path / "out" / "model.onnx")
