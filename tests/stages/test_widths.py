"""Cutting against its oracles: the same network with the parts zeroed, and every choice of layers tried out."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.errors import ModelError, RecipeError
from edgeslm.stages.widths import (
    Cut,
    Shape,
    axes_of,
    count_parameters,
    cut_config,
    cut_state,
    layers_kept,
    required_kinds,
    rounded,
    shape_of,
)
from tests.models import FAMILIES, write_hf_model

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 100, "head_dim": 16,
    "eos_token_id": [1, 2, 3, 4],
}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    # OLMo 2 norms the small outputs of its layers, where epsilon counts.
    *((family, {"rms_norm_eps": 1e-8} if family == "olmo2" else {}) for family in FAMILIES),
    ("llama", {"tied": False, "head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    ("gemma3_text", {"tied": False}),
    ("qwen3", {"tied": False}),
    ("olmo2", {"kv_heads": 4, "rms_norm_eps": 1e-8}),
]


def load(path: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(model, configuration, tensors) of a model directory."""
    from edgeslm.stages.checkpoint import resolve
    from edgeslm.stages.prune import text_config, text_state

    model = resolve(str(path)).load()
    return model, text_config(model), text_state(model)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        values: np.ndarray = model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    return values


def cut_model(config: dict[str, Any], state: dict[str, Any], cut: Cut, shape: Shape) -> Any:
    """The pruned model; head dimensions are left to torch, which takes every shape."""
    from edgeslm.stages.proof import build_model

    new = cut_config(config | {"architectures": ["LlamaForCausalLM"]}, cut.layers, shape)
    new |= {"architectures": config["architectures"]}
    if cut.tokens is not None:
        new["vocab_size"] = len(cut.tokens)
        new |= {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    pruned = build_model(new)
    missing, unexpected = pruned.load_state_dict(cut_state(state, config, cut), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    assert count_parameters(list(state), new) == sum(p.numel() for p in pruned.parameters())
    return pruned


def gone(kept: np.ndarray, whole: int) -> list[int]:
    return sorted(set(range(whole)) - set(kept.tolist()))


@pytest.mark.workstation
@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=lambda value: str(value)[:30])
def test_what_remains_equals_the_whole_with_the_cut_parts_zeroed(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    settings = {"layers": 5} | overrides
    path = write_hf_model(tmp_path / "model", family, **settings)
    model, config, state = load(path)
    state = {name: tensor.clone() for name, tensor in state.items()}
    random = np.random.default_rng(0)
    now = shape_of(config)
    layers = (0, 2, 3)

    def some(whole: int, count: int) -> np.ndarray:
        return np.sort(random.permutation(whole)[:count]).astype(np.int64)

    cut = Cut(
        layers=layers,
        mlp={layer: some(now.mlp, 96) for layer in layers},
        kv_heads={layer: some(now.kv_heads, now.kv_heads - 1) for layer in layers},
        hidden=some(now.hidden, 48),
        tokens=some(config["vocab_size"], 200),
    )
    shape = Shape(layers=3, mlp=96, kv_heads=now.kv_heads - 1, hidden=48)
    pruned = cut_model(config, state, cut, shape)

    heads, ratio = config["num_attention_heads"], config["num_attention_heads"] // now.kv_heads
    offset = 1.0 if "gemma" in family else 0.0
    decoder = model.get_decoder()
    head = decoder.layers[0].self_attn.head_dim
    dropped = gone(cut.hidden, now.hidden)
    with torch.no_grad():
        if not config["tie_word_embeddings"]:
            assert model.lm_head.weight is not decoder.embed_tokens.weight
        decoder.embed_tokens.weight[:, dropped] = 0
        for place in layers:
            layer = decoder.layers[place]
            attention, mlp = layer.self_attn, layer.mlp
            mlp.down_proj.weight[:, gone(cut.mlp[place], now.mlp)] = 0
            groups = gone(cut.kv_heads[place], now.kv_heads)
            keys = [group * head + i for group in groups for i in range(head)]
            queries = [group * ratio * head + i for group in groups for i in range(ratio * head)]
            if family == "phi3":
                rows = heads * head
                attention.qkv_proj.weight[
                    [*queries, *(rows + k for k in keys), *(rows + now.kv_heads * head + k for k in keys)]
                ] = 0
            else:
                for projection, lines in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                    module = getattr(attention, projection)
                    module.weight[lines] = 0
                    if module.bias is not None:
                        module.bias[lines] = 0
            attention.o_proj.weight[:, queries] = 0
            for module in (attention.o_proj, mlp.down_proj):
                module.weight[dropped] = 0
                if module.bias is not None:
                    module.bias[dropped] = 0
            for name, module in layer.named_modules():
                if name.endswith("layernorm"):
                    module.weight[dropped] = -offset
    decoder.layers = torch.nn.ModuleList(decoder.layers[place] for place in layers)
    ids = random.integers(0, 200, 80)
    wanted = logits(model, cut.tokens[ids])[:, cut.tokens]
    np.testing.assert_allclose(logits(pruned, ids), wanted, atol=2e-4 * np.abs(wanted).max(), rtol=0)


@pytest.mark.workstation
def test_nothing_cut_changes_nothing(tmp_path: Path) -> None:
    model, config, state = load(write_hf_model(tmp_path / "model", "gemma2"))
    pruned = cut_model(config, state, Cut(layers=(0, 1)), shape_of(config))
    ids = np.arange(40)
    assert np.array_equal(logits(pruned, ids), logits(model, ids))


def test_unknown_tensors_and_lists_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no way to cut model\.layers\.0\.mlp\.experts"):
        axes_of("model.layers.0.mlp.experts.weight", LLAMA)
    shape = Shape(layers=3, mlp=128, kv_heads=2, hidden=64)
    with pytest.raises(ModelError, match="layer_scales has 4 items like the layers"):
        cut_config(LLAMA | {"layer_scales": [1, 2, 3, 4]}, (0, 1, 3), shape)
    new = cut_config(LLAMA | {"layer_types": ["a", "b", "c", "d"]}, (0, 1, 3), shape)
    assert new["layer_types"] == ["a", "b", "d"]
    assert (new["num_hidden_layers"], new["eos_token_id"]) == (3, [1, 2, 3, 4])


@pytest.mark.parametrize("architecture", ["Qwen2", "Phi3", "Olmo2", "Granite"])
def test_shapes_that_gguf_files_of_the_family_cannot_hold(architecture: str) -> None:
    config = LLAMA | {"architectures": [f"{architecture}ForCausalLM"]}
    with pytest.raises(ModelError, match="hidden_size of heads") as caught:
        cut_config(config, range(4), Shape(layers=4, mlp=128, kv_heads=1, hidden=64))
    assert "give hidden_size = 32 or kv_heads = 2 as well" in caught.value.hint
    both = cut_config(config, range(4), Shape(layers=4, mlp=128, kv_heads=1, hidden=32))
    assert (both["hidden_size"], both["num_attention_heads"], both["head_dim"]) == (32, 2, 16)
    llama = cut_config(LLAMA, range(4), Shape(layers=4, mlp=128, kv_heads=1, hidden=64))
    assert (llama["num_attention_heads"], llama["head_dim"]) == (2, 16)


@pytest.mark.parametrize(
    ("width", "whole", "multiple", "wanted"),
    [
        (1280, 1536, None, 1280),
        (1300, 1536, None, 1280),
        (1536, 1536, None, 1536),
        (1500, 1500, None, 1500),
        (448, 576, None, 448),
        (450, 576, None, 448),
        (576, 1536, None, 512),
        (700, 1536, None, 672),
        (1300, 1536, 100, 1300),
        (1300, 1536, 512, 1024),
    ],
)
def test_widths_are_rounded_down_and_it_is_said(
    width: int, whole: int, multiple: int | None, wanted: int
) -> None:
    notes: list[str] = []
    assert rounded(width, whole, multiple, "mlp_width", notes) == wanted
    assert len(notes) == (width != wanted)
    if notes:
        assert f"{width} rounded down to {wanted}" in notes[0]


def test_widths_beyond_the_model_are_refused() -> None:
    with pytest.raises(RecipeError, match="mlp_width = 2000 is more than the model's 1536"):
        rounded(2000, 1536, None, "mlp_width", [])
    with pytest.raises(RecipeError, match="less than one block of 32"):
        rounded(20, 1536, None, "mlp_width", [])


def test_the_least_influential_layers_go() -> None:
    assert layers_kept([0.5, 0.1, 0.3, 0.2], 2) == (0, 2)
    assert layers_kept([0.5, 0.1], 0) == (0, 1)
    assert layers_kept([0.1, 0.1, 0.1], 1) == (1, 2)
    with pytest.raises(RecipeError, match="drop_layers = 4 of 4"):
        layers_kept([0.5, 0.1, 0.3, 0.2], 4)


def fits(chosen: tuple[int, ...], kinds: list[int], period: int) -> bool:
    return all(kinds[layer] == kinds[place % period] for place, layer in enumerate(chosen))


@given(
    st.integers(2, 10).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 50), min_size=n, max_size=n), st.integers(0, n - 1), st.integers(1, 4)
        )
    )
)
@settings(max_examples=150, deadline=None)
def test_layers_that_keep_a_pattern_against_all_choices(case: tuple[list[int], int, int]) -> None:
    influence, drop, period = case
    kinds = [int((layer + 1) % period != 0) for layer in range(len(influence))]
    choices = [
        sum(influence[layer] for layer in chosen)
        for chosen in combinations(range(len(influence)), len(influence) - drop)
        if fits(chosen, kinds, period)
    ]
    if not choices:
        with pytest.raises(RecipeError, match="keep the pattern"):
            layers_kept(influence, drop, (kinds, period))
        return
    kept = layers_kept(influence, drop, (kinds, period))
    assert fits(kept, kinds, period)
    assert len(kept) == len(influence) - drop
    assert sum(influence[layer] for layer in kept) == max(choices)


def test_only_smollm3_has_a_pattern_that_llama_cpp_takes_from_places() -> None:
    layout = [1, 1, 1, 0, 1, 1, 1, 0]
    smollm3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": layout}
    assert required_kinds(smollm3) == (layout, 4)
    assert required_kinds(LLAMA | {"no_rope_layers": layout}) is None
    # Every fourth of those that remain has no positions: the fourth layer can't be the one that goes alone.
    assert layers_kept([5, 5, 5, 0, 5, 5, 5, 5], 1, (layout, 4)) == (0, 1, 2, 3, 4, 5, 6)
