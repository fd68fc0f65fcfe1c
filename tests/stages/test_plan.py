"""Plans: sizes, fallbacks and overrides.  Their types are held against llama.cpp in test_export_gguf."""

from __future__ import annotations

import pytest

from edgeslm.errors import RecipeError
from edgeslm.stages.plan import PRESETS, Weight, make_plan, preset, quantizable, type_bits, use_more_bits


def model(hidden: int, layers: int = 4, *, tied: bool = True) -> list[Weight]:
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    weights = [Weight(name="token_embd.weight", shape=(1000, hidden), source_type="F32")]
    weights += [Weight(name="output_norm.weight", shape=(hidden,), source_type="F32")]
    if not tied:
        weights.append(Weight(name="output.weight", shape=(1000, hidden), source_type="F32"))
    for i in range(layers):
        weights.append(Weight(name=f"blk.{i}.attn_norm.weight", shape=(hidden,), source_type="F32"))
        weights += [
            Weight(name=f"blk.{i}.{part}.weight", shape=(hidden, hidden), source_type="F32")
            for part in matrices
        ]
    return weights


def types(hidden: int, scheme: str, **settings: object) -> dict[str, str]:
    plan = make_plan(model(hidden), scheme, layers=4, heads_per_kv_head=3, **settings)  # type: ignore[arg-type]
    return {placed.weight.name: placed.type for placed in plan.tensors}


def test_bits_per_weight_count_every_byte() -> None:
    plan = make_plan(model(256), "Q8_0", layers=4, heads_per_kv_head=1)
    matrices, norms = 1000 * 256 + 28 * 256 * 256, 5 * 256
    assert plan.bits_per_weight == pytest.approx((8.5 * matrices + 32 * norms) / (matrices + norms))


def test_rows_that_a_block_cannot_hold_are_told_with_their_cost() -> None:
    plan = make_plan(model(576), "Q4_K_S", layers=4, heads_per_kv_head=3)
    fallbacks = plan.record()["fallbacks"]
    assert len(fallbacks) == 29
    query = next(f for f in fallbacks if f["tensor"] == "blk.2.attn_q.weight")
    assert (query["wanted"], query["got"], query["wanted_bits"], query["got_bits"]) == (
        "Q4_K",
        "Q5_0",
        4.5,
        5.5,
    )
    assert "576" in query["reason"]
    assert "256" in query["reason"]
    head = next(f for f in fallbacks if f["tensor"] == "token_embd.weight")
    assert (head["wanted"], head["got"]) == ("Q6_K", "Q8_0")


def test_rows_of_256_fall_back_nowhere() -> None:
    plan = make_plan(model(512), "Q4_K_M", layers=4, heads_per_kv_head=3)
    assert plan.record()["fallbacks"] == []


def test_an_odd_row_becomes_f16() -> None:
    assert types(48, "Q4_0")["blk.0.attn_q.weight"] == "F16"


def test_the_first_override_that_matches_counts() -> None:
    found = types(256, "Q4_0", overrides=[(r"blk\.1\.ffn", "Q8_0"), ("ffn_down", "F16")])
    assert found["blk.1.ffn_down.weight"] == "Q8_0"
    assert found["blk.2.ffn_down.weight"] == "F16"
    assert found["blk.2.ffn_up.weight"] == "Q4_0"


def test_norms_and_routers_are_never_quantized() -> None:
    assert not quantizable(Weight(name="blk.0.attn_norm.weight", shape=(64,), source_type="F32"))
    assert not quantizable(Weight(name="blk.0.ffn_gate_inp.weight", shape=(8, 64), source_type="F32"))
    assert not quantizable(Weight(name="blk.0.attn_q.bias", shape=(64, 64), source_type="F32"))
    assert quantizable(Weight(name="blk.0.ffn_down_exps.weight", shape=(8, 64, 64), source_type="F32"))


def test_more_bits_at_both_ends_and_every_third() -> None:
    chosen = [index for index in range(32) if use_more_bits(index, 32)]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


@pytest.mark.parametrize(("scheme", "name"), [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("iq4_nl", "IQ4_NL")])
def test_schemes_have_aliases(scheme: str, name: str) -> None:
    assert preset(scheme)[0] == name


def test_unknown_schemes_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"'Q4_KM'.*Q4_K_M") as caught:
        preset("Q4_KM")
    assert "IQ4_XS" in caught.value.hint


def test_every_override_must_match_something() -> None:
    with pytest.raises(RecipeError, match="matches none"):
        types(256, "Q4_0", overrides={"attn_norm": "F16"})


def test_type_bits_include_the_scales() -> None:
    assert [type_bits(kind) for kind in ("Q4_K", "Q4_0", "Q5_0", "Q8_0", "F16")] == [4.5, 4.5, 5.5, 8.5, 16.0]
    assert set(PRESETS) >= {"Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "F16", "BF16"}
