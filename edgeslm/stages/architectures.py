"""What differs between model families when a Hugging Face decoder becomes a GGUF file: a table and a few rules.

Tensor names come from the gguf library's own map; what is here is which family a checkpoint is, the
metadata that llama.cpp reads for it, and the few tensors that are stored differently.
Reference: llama.cpp conversion/{base,llama,qwen,gemma,phi,granite,olmo}.py at the sources of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError
from edgeslm.stages.rope import Config, head_dim, llama3_rope_factors, rope, rotary_row_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row: how a Hugging Face class is written as GGUF."""

    gguf: str
    """llama.cpp's name of the architecture."""
    defaults: Config
    """What the family's configuration class assumes where config.json is silent (transformers 4.57)."""
    permutes_qk: bool = False
    """Rows of the query and key projections are stored in llama.cpp's interleaved rotary order."""
    norm_offset: float = 0.0
    """Added to every norm weight (Gemma's RMSNorm multiplies by 1 + weight)."""
    vocab: str = "bpe"
    """Which tokenizer is looked for first: see edgeslm.stages.vocab."""
    states_vocab: bool = False
    """Whether vocabulary size and rotary dimensions are written."""
    needs_head: bool = False
    """llama.cpp loads the family with a head only: a tied model's embedding is written twice."""
    states_rope: bool = True
    """Whether rotary base and scaling are written."""


_LLAMA: Config = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                  "tie_word_embeddings": False}  # fmt: skip
_GEMMA: Config = {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
                  "tie_word_embeddings": True}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        gguf="llama", defaults=_LLAMA, permutes_qk=True, vocab="llama", states_vocab=True
    ),
    "MistralForCausalLM": Architecture(
        gguf="llama", defaults=_LLAMA | {"max_position_embeddings": 131072, "num_key_value_heads": 8},
        permutes_qk=True, vocab="llama", states_vocab=True,
    ),
    "SmolLM3ForCausalLM": Architecture(
        gguf="smollm3", permutes_qk=True, vocab="llama", states_vocab=True,
        defaults=_LLAMA | {"max_position_embeddings": 32768, "rope_theta": 2000000.0, "num_key_value_heads": 4,
                          "tie_word_embeddings": True},
    ),
    "GraniteForCausalLM": Architecture(
        gguf="granite", defaults=_LLAMA, permutes_qk=True, vocab="llama", states_vocab=True
    ),
    "Qwen2ForCausalLM": Architecture(
        gguf="qwen2", defaults=_LLAMA | {"max_position_embeddings": 32768}, vocab="sentencepiece"
    ),
    "Qwen3ForCausalLM": Architecture(
        gguf="qwen3", defaults=_LLAMA | {"max_position_embeddings": 32768, "head_dim": 128}, vocab="sentencepiece"
    ),
    "Gemma2ForCausalLM": Architecture(
        gguf="gemma2", norm_offset=1.0, vocab="gemma", states_rope=False,
        defaults=_GEMMA | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                           "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
    ),
    "Gemma3ForCausalLM": Architecture(
        gguf="gemma3", norm_offset=1.0, vocab="gemma",
        defaults=_GEMMA | {"max_position_embeddings": 131072, "rope_theta": 1000000.0,
                           "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 256},
    ),
    "Phi3ForCausalLM": Architecture(
        gguf="phi3", vocab="phi3", states_rope=False,
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                  "rope_theta": 10000.0, "tie_word_embeddings": False},
    ),
    "Olmo2ForCausalLM": Architecture(
        gguf="olmo2", defaults=_LLAMA | {"rms_norm_eps": 1e-5}, needs_head=True
    ),
}  # fmt: skip
ARCHITECTURES["Gemma3ForConditionalGeneration"] = ARCHITECTURES["Gemma3ForCausalLM"]

# A multimodal checkpoint's tensors that a text model doesn't have.
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def architecture_of(config: Config) -> Architecture:
    """The row for a config.json.  Raises ModelError that lists what is supported and names the way out."""
    names = config.get("architectures") or ["(no architectures in config.json)"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"architecture {names[0]} is not supported; supported are {', '.join(ARCHITECTURES)}",
            hint="convert it with llama.cpp's convert_hf_to_gguf.py --outtype f32, then `edgeslm quantize file.gguf`",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"the checkpoint is already quantized ({method})", hint="start from the unquantized checkpoint"
        )
    return ARCHITECTURES[names[0]]


def complete(config: Config) -> Config:
    """config.json with the text part on top and the family's defaults filled in."""
    architecture = architecture_of(config)
    text = {**config, **config.get("text_config", {}), "architectures": config["architectures"]}
    full = {**architecture.defaults, **{key: value for key, value in text.items() if value is not None}}
    missing = [key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                               "vocab_size") if not isinstance(full.get(key), int) or full[key] < 1]  # fmt: skip
    if missing:
        raise ModelError(f"config.json lacks a whole number above 0 for {', '.join(missing)}")
    full.setdefault("num_key_value_heads", full["num_attention_heads"])
    if full["hidden_size"] % full["num_attention_heads"] and "head_dim" not in full:
        raise ModelError(
            f"hidden_size {full['hidden_size']} is not divisible by {full['num_attention_heads']} attention heads"
        )
    return full


def check_carried(config: Config) -> tuple[list[str], list[str]]:
    """(errors, warnings): what the checkpoint means and llama.cpp's architecture of that name does not do.

    An error changes the logits everywhere; a warning only beyond some context length.
    """
    errors, warnings = [], []
    family = architecture_of(config).gguf
    layers = config["num_hidden_layers"]
    kind = rope(config)["rope_type"]
    known = {"default", "linear", "yarn", "llama3"} | ({"longrope", "su"} if family == "phi3" else set())
    if kind not in known:
        errors.append(f"rotary scaling of type {kind!r} has no counterpart in llama.cpp's {family}")
    if family == "smollm3" and (layout := config.get("no_rope_layers")):
        wanted = [int((i + 1) % 4 != 0) for i in range(layers)]
        if [int(bool(value)) for value in layout] != wanted:
            errors.append(
                "llama.cpp's smollm3 skips rotary positions in every fourth layer only; this model differs"
            )
    if family in ("gemma2", "gemma3") and config["query_pre_attn_scalar"] != head_dim(config):
        large = {"gemma2": 46, "gemma3": 62}[family]
        if layers != large:
            errors.append(
                f"llama.cpp scales attention by head_dim {head_dim(config)}, "
                f"the model by query_pre_attn_scalar {config['query_pre_attn_scalar']}"
            )
    if family == "gemma3" and config.get("attn_logit_softcapping"):
        errors.append("llama.cpp's gemma3 has no attention soft cap; this model has one")
    if family == "gemma2" and not config["tie_word_embeddings"]:
        errors.append("llama.cpp's gemma2 has no head of its own; this model's is not tied to the embedding")
    window = config.get("sliding_window")
    if window and family in ("llama", "qwen2", "qwen3", "phi3", "smollm3"):
        used = config.get("use_sliding_window", family in ("llama", "phi3"))
        if used and window < config["max_position_embeddings"]:
            warnings.append(
                f"sliding window of {window} tokens: llama.cpp's {family} attends to everything, "
                f"so results differ beyond {window} tokens"
            )
    return errors, warnings


def add_metadata(writer: Any, config: Config) -> None:
    """Write the keys that llama.cpp reads for this family into a gguf.GGUFWriter.  config: completed."""
    architecture = architecture_of(config)
    family = architecture.gguf
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if (head := _stated_head_dim(config, family)) is not None:
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture.states_rope:
        _add_rope(writer, config)
    elif family == "gemma2" and rope(config)["rope_theta"] != 10000.0:
        writer.add_rope_freq_base(rope(config)["rope_theta"])
    if architecture.states_vocab:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim(config) if family != "granite" else _equal_head_dim(config))
    if family in EXTRA_METADATA:
        EXTRA_METADATA[family](writer, config)


def _stated_head_dim(config: Config, family: str) -> int | None:
    if family in ("granite", "phi3"):
        return None
    if config["architectures"][0] == "LlamaForCausalLM":
        return head_dim(config)
    stated = config.get("head_dim")
    return int(stated) if stated else None


def _equal_head_dim(config: Config) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _add_rope(writer: Any, config: Config) -> None:
    import gguf

    parameters = rope(config)
    kind, factor = parameters["rope_type"], parameters.get("factor")
    if kind in ("linear", "yarn") and factor is not None:
        scaling = gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(factor)
    if kind == "yarn" and factor is not None:
        original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))
        optional: tuple[tuple[str, Callable[[float], None]], ...] = (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        )
        for key, add in optional:
            if parameters.get(key) is not None:
                add(parameters[key])
    if parameters["rope_theta"] is not None:
        writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["local_rope_theta"] is not None:
        writer.add_rope_freq_base_swa(parameters["local_rope_theta"])


def _add_gemma2(writer: Any, config: Config) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    _add_window_pattern(writer, config, every=2)


def _add_gemma3(writer: Any, config: Config) -> None:
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("sliding_window_pattern") != 1:
        writer.add_sliding_window(config["sliding_window"])
        _add_window_pattern(writer, config, every=6)


def _add_window_pattern(writer: Any, config: Config, every: int) -> None:
    """State which layers slide, where it is not llama.cpp's own assumption of all but each `every`th."""
    slides = [kind == "sliding_attention" for kind in config.get("layer_types") or []]
    if slides and slides != [(i + 1) % every != 0 for i in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def _add_granite(writer: Any, config: Config) -> None:
    scales: tuple[tuple[str, Callable[[float], None]], ...] = (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    )
    for key, add in scales:
        if config.get(key):
            add(config[key])


def _add_phi3(writer: Any, config: Config) -> None:
    parameters = rope(config)
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    writer.add_rope_dimension_count(_phi3_rope_dims(config))
    writer.add_rope_freq_base(parameters["rope_theta"])
    # A window of 0 marks Phi-4, which has none.
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if parameters.get("long_factor"):
        scale = config["max_position_embeddings"] / parameters["original_max_position_embeddings"]
        original = parameters["original_max_position_embeddings"]
        if parameters["rope_type"] == "yarn":
            factor = 0.1 * math.log(scale) + 1.0 if scale > 1.0 else 1.0
        else:
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
        writer.add_rope_scaling_attn_factors(factor)


def _phi3_rope_dims(config: Config) -> int:
    share = rope(config).get("partial_rotary_factor") or 1.0
    return int(share * config["hidden_size"]) // int(config["num_attention_heads"])


EXTRA_METADATA: dict[str, Callable[[Any, Config], None]] = {
    "gemma2": _add_gemma2,
    "gemma3": _add_gemma3,
    "granite": _add_granite,
    "phi3": _add_phi3,
}


def extra_tensors(config: Config) -> list[tuple[str, NDArray[np.float32]]]:
    """Tensors that the configuration implies: rotary factors of Llama 3 ([head_dim / 2]) and Phi-3."""
    parameters, family = rope(config), architecture_of(config).gguf
    if family == "phi3" and parameters.get("long_factor"):
        pairs = ("rope_factors_long.weight", "long_factor"), ("rope_factors_short.weight", "short_factor")
        half = _phi3_rope_dims(config) // 2
        for _, key in pairs:
            if len(parameters.get(key) or ()) != half:
                raise ModelError(
                    f"rope_scaling.{key} has {len(parameters.get(key) or ())} factors, not {half}"
                )
        return [(name, np.asarray(parameters[key], dtype=np.float32)) for name, key in pairs]
    if parameters["rope_type"] == "llama3" and architecture_of(config).vocab == "llama":
        return [("rope_freqs.weight", llama3_rope_factors(parameters, head_dim(config)))]
    return []


def row_order(hf_name: str, rows: int, config: Config) -> NDArray[np.intp] | None:
    """Order in which a tensor's rows are written, None for as they are."""
    if not architecture_of(config).permutes_qk:
        return None
    if hf_name.endswith(("q_proj.weight", "q_proj.bias")):
        return rotary_row_order(rows, config["num_attention_heads"])
    if hf_name.endswith(("k_proj.weight", "k_proj.bias")):
        return rotary_row_order(rows, config["num_key_value_heads"])
    return None


def tensor_names(names: Iterable[str], config: Config) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name, for the tensors that are written.

    Raises ModelError for a tensor that the architecture doesn't have.
    """
    import gguf

    architecture = architecture_of(config)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.gguf)
    names_map = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    result = {}
    for name in names:
        if name.startswith(_NOT_TEXT) or name.endswith(
            (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")
        ):
            continue
        if name.endswith("lm_head.weight") and architecture.gguf == "gemma2":
            continue
        text_name = name.replace("language_model.", "")
        mapped = names_map.get_name(text_name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ModelError(
                f"tensor {name} has no place in the {architecture.gguf} architecture",
                hint="a layer beyond num_hidden_layers, or a checkpoint with extra modules: save it without them",
            )
        result[name] = mapped
    return result


def module_names(config: Config) -> dict[str, str]:
    """torch module path of every linear layer (and the head) -> name of the GGUF weight that it multiplies with."""
    config = complete(config)
    attention = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.qkv_proj",
    )
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_up_proj")
    fused = architecture_of(config).gguf == "phi3"
    parts = [part for part in (*attention, *mlp) if _belongs(part, fused)]
    modules = [f"model.layers.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in parts]
    mapped = tensor_names((f"{module}.weight" for module in modules), config)
    result = {name.removesuffix(".weight"): target for name, target in mapped.items()}
    tied = config.get("tie_word_embeddings", False) and not architecture_of(config).needs_head
    result["lm_head"] = "token_embd.weight" if tied else "output.weight"
    return result


def _belongs(part: str, fused: bool) -> bool:
    only_fused, only_split = (
        ("qkv_proj", "gate_up_proj"),
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    )
    name = part.rsplit(".", 1)[-1]
    return name not in (only_split if fused else only_fused)
