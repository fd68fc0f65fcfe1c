"""Rules of the families, held against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.stages.architectures import ARCHITECTURES, check_carried, complete, module_names
from edgeslm.stages.rope import llama3_rope_factors, rope, rotary_row_order
from tests.models import FAMILIES, write_hf_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation


def config(**changes: Any) -> dict[str, Any]:
    return complete(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 300,
            **changes,
        }
    )


def test_llama3_factors_are_transformers_frequencies() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    model = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=8, rope_theta=500000.0, rope_scaling=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model, "cpu")
    plain = 1.0 / 500000.0 ** (np.arange(0, 64, 2, dtype=np.float32) / 64)
    factors = llama3_rope_factors({**scaling, "rope_theta": 500000.0}, 64)
    np.testing.assert_allclose(plain / factors, scaled.numpy(), rtol=1e-5)


def test_rotary_order_interleaves_the_halves_of_each_head() -> None:
    # Two heads of four: halves (0 1 | 2 3) and (4 5 | 6 7).
    assert rotary_row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rope_parameters_of_both_generations() -> None:
    old = config(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    new = config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6})
    assert {key: rope(old)[key] for key in ("rope_type", "factor", "rope_theta")} == {
        key: rope(new)[key] for key in ("rope_type", "factor", "rope_theta")
    }
    split = config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})  # fmt: skip
    assert (rope(split)["rope_theta"], rope(split)["local_rope_theta"]) == (1e6, 1e4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_model_has_a_gguf_name(family: str, tmp_path: Path) -> None:
    import json

    import torch
    import transformers

    source = write_hf_model(tmp_path / "model", family, tied=False)
    names = module_names(json.loads((source / "config.json").read_text()))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear == set(names)
    assert names["lm_head"] == "output.weight"


def test_a_tied_head_is_weighed_as_the_embedding() -> None:
    assert module_names(config(tie_word_embeddings=True))["lm_head"] == "token_embd.weight"


def test_what_llama_cpp_computes_differently_is_an_error() -> None:
    errors, _ = check_carried(
        config(architectures=["SmolLM3ForCausalLM"], num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])
    )
    assert "every fourth layer" in errors[0]
    errors, _ = check_carried(config(architectures=["Gemma2ForCausalLM"], head_dim=16))
    assert "query_pre_attn_scalar 256" in errors[0]
    errors, warnings = check_carried(config(architectures=["MistralForCausalLM"], sliding_window=4096))
    assert not errors
    assert "beyond 4096 tokens" in warnings[0]
    assert check_carried(config()) == ([], [])


def test_an_unknown_architecture_names_the_known_and_the_way_out() -> None:
    with pytest.raises(ModelError) as caught:
        config(architectures=["RwkvForCausalLM"])
    assert all(name in caught.value.message for name in ARCHITECTURES)
    assert "convert_hf_to_gguf.py" in caught.value.hint
