"""A GGUF file as a torch model: the export backwards.

transformers' own GGUF loader knows fewer families, forgets rotary scaling and reads a vocabulary that
nobody asked for; here the names, row orders and offsets are the very ones that the export uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError
from edgeslm.stages.architectures import architecture_of, complete, row_order, tensor_names
from edgeslm.stages.tensors import gguf_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeslm.gguf_file import GgufFile
    from edgeslm.stages.rope import Config
    from edgeslm.stages.tensors import Tensor

FAMILIES = {
    "llama": "Llama", "smollm3": "SmolLM3", "granite": "Granite", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gemma2": "Gemma2", "gemma3": "Gemma3", "phi3": "Phi3", "olmo2": "Olmo2",
}  # fmt: skip
"""llama.cpp's architecture to the prefix of transformers' classes."""

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Metadata after the architecture's name to the key of config.json."""

YARN_KEYS = {
    "yarn_ext_factor": "extrapolation_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
LARGE_GEMMAS = {("gemma2", 46), ("gemma3", 62)}
"""The sizes that scale attention by hidden_size / heads instead of the head's size."""


def load_gguf_model(file: GgufFile) -> Any:
    """The model in torch, float32, with every weight of the file.

    Raises ModelError for an architecture that is not known here, and for weights that are missing or of
    another shape than the metadata say.
    """
    import torch
    import transformers
    from transformers.modeling_utils import no_init_weights

    prefix = FAMILIES.get(file.architecture)
    if prefix is None:
        raise ModelError(
            f"{file.path.name}: no way to run {file.architecture!r} in torch; known are {', '.join(FAMILIES)}",
            hint="give an importance matrix made with llama-imatrix instead of text",
        )
    stored = {tensor.name: tensor for tensor in gguf_tensors(file)}
    settings = _config(file, stored)
    name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    with no_init_weights():
        model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, name)(**settings))
    model.tie_weights()
    config = complete({**model.config.to_dict(), "architectures": [f"{prefix}ForCausalLM"]})
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for hf_name, gguf_name in tensor_names(parameters, config).items():
            values = _values(file, stored, gguf_name, hf_name, config)
            if values.shape != tuple(parameters[hf_name].shape):
                raise ModelError(
                    f"{file.path.name}: {gguf_name} has the shape {values.shape}, its metadata want "
                    f"{tuple(parameters[hf_name].shape)}"
                )
            parameters[hf_name].copy_(torch.from_numpy(values))
        if factors := stored.get("rope_freqs.weight"):
            rotary = model.get_decoder().rotary_emb
            rotary.inv_freq /= torch.from_numpy(factors.read(0, 1)[0])
    return model


def _config(file: GgufFile, stored: dict[str, Tensor]) -> Config:
    """config.json as far as the file tells it."""
    family = file.architecture
    config = {key: file.get(f"{family}.{name}") for name, key in KEYS.items()}
    config = {key: value for key, value in config.items() if value is not None}
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    if not heads or not layers or "token_embd.weight" not in stored:
        raise ModelError(f"{file.path.name}: has no heads, blocks or embedding")
    if any(isinstance(value, list) for value in config.values()):
        raise ModelError(f"{file.path.name}: its blocks differ in shape, which no transformers model has")
    config["vocab_size"] = stored["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in stored
    config["attention_bias"] = "blk.0.attn_q.bias" in stored
    config["mlp_bias"] = "blk.0.ffn_up.bias" in stored
    config["pad_token_id"] = None
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    if family in ("gemma2", "gemma3"):
        large = (family, layers) in LARGE_GEMMAS
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // heads if large else config.get("head_dim", 256)
        )
        slides = file.get(f"{family}.attention.sliding_window_pattern")
        if isinstance(slides, list):
            config["layer_types"] = [f"{'sliding' if slide else 'full'}_attention" for slide in slides]
    if scaling := _rope_scaling(file, stored, config):
        config["rope_scaling"] = scaling
    if family == "phi3":
        head = config["hidden_size"] // heads
        config["partial_rotary_factor"] = file.get("phi3.rope.dimension_count", head) / head
    return config


def _rope_scaling(file: GgufFile, stored: dict[str, Tensor], config: Config) -> Config | None:
    """config.json's rope_scaling; Llama 3's is in a tensor of factors and applied to the model itself."""
    prefix = f"{file.architecture}.rope.scaling"
    kind, factor = file.get(f"{prefix}.type"), file.get(f"{prefix}.factor")
    if "rope_factors_long.weight" in stored:
        pairs = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
        factors = {key: stored[name].read(0, 1)[0].tolist() for key, name in pairs.items() if name in stored}
        return {"type": "longrope", **factors}
    if kind not in ("linear", "yarn") or not factor:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {"rope_type": "yarn", "factor": factor}
    if original := config.get("original_max_position_embeddings"):
        scaling["original_max_position_embeddings"] = original
    for name, key in YARN_KEYS.items():
        value = file.get(f"{prefix}.{name}")
        if value is not None:
            scaling[key] = value
    return scaling


def _values(
    file: GgufFile, stored: dict[str, Tensor], gguf_name: str, hf_name: str, config: Config
) -> NDArray[np.float32]:
    """A tensor as transformers has it: rows in their own order, norms without the export's offset."""
    tensor = stored.get(gguf_name)
    if tensor is None:
        raise ModelError(f"{file.path.name}: the tensor {gguf_name} is missing")
    values = tensor.read(0, tensor.rows).reshape(tensor.shape)
    order = row_order(hf_name, tensor.shape[0], config)
    if order is not None:
        restored = np.empty_like(values)
        restored[order] = values
        values = restored
    offset = architecture_of(config).norm_offset
    return values - np.float32(offset) if offset and hf_name.endswith("norm.weight") else values
