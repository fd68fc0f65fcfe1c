"""Rotary positions: what a configuration says of them, and how llama.cpp wants them stored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Config = dict[str, Any]


def head_dim(config: Config) -> int:
    """Elements of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Config) -> Config:
    """The rotary parameters, from transformers 4's rope_theta and rope_scaling or 5's rope_parameters."""
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in stored:
        local = stored.get("sliding_attention", {})
        return {**stored["full_attention"], "local_rope_theta": local.get("rope_theta")}
    parameters = dict(stored)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", config.get("rope_theta"))
    parameters.setdefault("local_rope_theta", config.get("rope_local_base_freq"))
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        parameters.setdefault(key, config.get(key))
    return parameters


def llama3_rope_factors(parameters: Config, dimensions: int) -> NDArray[np.float32]:
    """[dimensions / 2] divisors of the rotary frequencies; Llama 3.1's scaling, arXiv:2407.21783 section 3.4.

    Reference: _compute_llama3_parameters of transformers' modeling_rope_utils.py.
    """
    factor = parameters.get("factor", 8.0)
    low, high = parameters.get("low_freq_factor", 1.0), parameters.get("high_freq_factor", 4.0)
    original = parameters.get("original_max_position_embeddings") or 8192
    exponents = np.arange(0, dimensions, 2, dtype=np.float32) / np.float32(dimensions)
    frequencies = (1.0 / np.float32(parameters.get("rope_theta") or 10000.0) ** exponents).astype(np.float32)
    wavelengths = (np.float32(2 * math.pi) / frequencies).astype(np.float32)
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    scaled = np.where(wavelengths > original / low, np.float32(factor), between)
    return np.where(wavelengths < original / high, np.float32(1), scaled).astype(np.float32)


def rotary_row_order(rows: int, heads: int) -> NDArray[np.intp]:
    """[rows] source row of each row of a query or key projection in llama.cpp's interleaved rotary order.

    The halves of a head that rotate together lie side by side (LlamaModel.permute of llama.cpp).
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
