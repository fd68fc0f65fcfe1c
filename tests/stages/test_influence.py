"""Influence on networks whose figures are known by hand, and against numpy on a tiny model."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.stages import influence
from edgeslm.stages.influence import (
    dropped_in_turn,
    largest,
    layer_losses,
    mean_loss,
    measure_importance,
    narrowed,
    without,
)
from tests.models import write_hf_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

TURNS = (0.0, 90.0, 180.0, 60.0)
"""By how many degrees each layer of the hand-made network turns its input."""


def hand_made() -> Any:
    """Layers that turn a plane; the MLP's channels are x and -2x, the two heads' outputs x and 3x."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self, degrees: float) -> None:
            super().__init__()
            angle = torch.deg2rad(torch.tensor(degrees))
            self.turn = torch.stack(
                [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
            )
            self.mlp, self.self_attn = nn.Module(), nn.Module()
            self.mlp.down_proj = nn.Linear(4, 2, bias=False)
            self.self_attn.o_proj = nn.Linear(4, 2, bias=False)
            self.input_layernorm = nn.Identity()

        def forward(self, hidden_states: Any) -> Any:
            x = self.input_layernorm(hidden_states)
            self.mlp.down_proj(torch.cat([x, -2 * x], -1))
            self.self_attn.o_proj(torch.cat([x, 3 * x], -1))
            return 5 * x @ self.turn.T  # a cosine does not see the factor

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(
                num_hidden_layers=4, intermediate_size=4, num_key_value_heads=2, num_attention_heads=2,
                hidden_size=2,
            )  # fmt: skip
            self.layers = nn.ModuleList(Layer(turn) for turn in TURNS)

        def forward(self, input_ids: Any, use_cache: bool) -> Any:
            hidden = torch.stack([3.0 + 0 * input_ids, 4.0 + 0 * input_ids], -1)
            for layer in self.layers:
                hidden = layer(hidden_states=hidden)
            return hidden

        def get_decoder(self) -> Any:
            return self

    return Network()


def test_a_hand_made_network() -> None:
    found = measure_importance(hand_made(), np.zeros((2, 5), np.int64))
    np.testing.assert_allclose(found.layers, [1 - np.cos(np.deg2rad(turn)) for turn in TURNS], atol=1e-6)
    # The first layer sees (3, 4), the second 5 times that, the third it turned to (-4, 3) and again 5 times.
    np.testing.assert_allclose(found.mlp[0], [3, 4, 6, 8], rtol=1e-6)
    np.testing.assert_allclose(found.mlp[2], [100, 75, 200, 150], rtol=1e-5)
    np.testing.assert_allclose(found.kv_heads[0], [5, 15], rtol=1e-6)
    np.testing.assert_allclose(found.kv_heads[1], [25, 75], rtol=1e-6)
    np.testing.assert_allclose(found.hidden, [3 + 15 + 100 + 500, 4 + 20 + 75 + 375], rtol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from edgeslm.stages.checkpoint import resolve

    path = write_hf_model(tmp_path_factory.mktemp("model"), "llama", layers=3, kv_heads=2)
    return resolve(str(path)).load()


def windows(count: int = 3, context: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 300, (count, context))


def test_block_influence_against_hidden_states(tiny: Any) -> None:
    import torch

    with torch.inference_mode():
        states = tiny.model(torch.from_numpy(windows()), output_hidden_states=True).hidden_states
        # The last of the hidden states is behind the final norm: that layer is compared by hooks alone.
        states = [state.double().numpy().reshape(-1, state.shape[-1]) for state in states[:-1]]
    found = measure_importance(tiny, windows())
    for layer, (before, after) in enumerate(pairwise(states)):
        cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        assert found.layers[layer] == pytest.approx(1 - cosine.mean(), rel=1e-6)


def test_windows_are_weighed_alike_and_hooks_are_gone(tiny: Any) -> None:
    both = measure_importance(tiny, windows(2))
    one, other = (measure_importance(tiny, windows(2)[[index]]) for index in (0, 1))
    for name in ("layers", "mlp", "kv_heads", "hidden"):
        mean = (getattr(one, name) + getattr(other, name)) / 2
        np.testing.assert_allclose(getattr(both, name), mean, rtol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_loss_against_numpy(tiny: Any) -> None:
    import torch

    with torch.inference_mode():
        logits = tiny(torch.from_numpy(windows())).logits.double().numpy()[:, :-1]
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(shares, windows()[:, 1:, None], -1).mean()
    assert mean_loss(tiny, windows()) == pytest.approx(wanted, rel=1e-5)


def test_leaving_out_a_layer_that_does_nothing_costs_nothing(tmp_path: Path) -> None:
    import torch

    from edgeslm.stages.checkpoint import resolve

    model = resolve(str(write_hf_model(tmp_path, "qwen2", layers=3))).load()
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
    losses = layer_losses(model, windows())
    assert losses[1] == pytest.approx(0, abs=1e-6)
    assert min(abs(losses[0]), abs(losses[2])) > 1e-3
    assert len(model.model.layers) == 3


def test_layers_that_stand_in_for_each_other_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and 2 do the same: each costs little, both cost most; by their own costs both would go."""
    import torch

    costs = {
        (0,): 5.0,
        (1,): 0.1,
        (2,): 0.11,
        (3,): 0.3,
        (1, 2): 9.0,
        (1, 3): 0.4,
        (1, 2, 3): 9.5,
        (0, 1, 3): 7.0,
    }
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    decoder = SimpleNamespace(layers=layers, config=None)
    model, tried = SimpleNamespace(get_decoder=lambda: decoder), []

    def loss(_model: Any, _windows: Any) -> float:
        gone = tuple(
            place for place, layer in enumerate(layers) if not any(layer is one for one in decoder.layers)
        )
        tried.append(gone)
        return costs[gone]

    monkeypatch.setattr(influence, "mean_loss", loss)
    monkeypatch.setattr(influence, "CANDIDATES", 1.0)
    alone = np.array([costs[(layer,)] for layer in range(4)])
    costs[0, 1] = 6.0
    assert dropped_in_turn(model, windows(), alone, 0) == []
    assert dropped_in_turn(model, windows(), alone, 1) == [1]
    assert not tried
    assert dropped_in_turn(model, windows(), alone, 2) == [1, 3]
    assert dropped_in_turn(model, windows(), alone, 3) == [1, 3, 0]
    assert decoder.layers is layers


def test_layers_in_turn_by_brute_force(tmp_path: Path) -> None:
    from edgeslm.stages.checkpoint import resolve

    model = resolve(str(write_hf_model(tmp_path, "llama", layers=6))).load()
    alone = layer_losses(model, windows())
    gone: list[int] = []
    candidates = np.argsort(alone)[:3].tolist()
    for _ in range(3):
        left = [layer for layer in candidates if layer not in gone]
        losses = []
        for layer in left:
            with without(model, [*gone, layer]):
                losses.append(mean_loss(model, windows()))
        gone.append(left[int(np.argmin(losses))])
    assert dropped_in_turn(model, windows(), alone, 3) == gone


def test_without_layers_and_channels_for_a_while(tiny: Any) -> None:
    import torch

    before = mean_loss(tiny, windows())
    kept = {0: np.array([0, 5, 127]), 2: np.arange(64)}
    with without(tiny, [1], kept):
        inside = mean_loss(tiny, windows())
        assert len(tiny.model.layers) == 2
    assert mean_loss(tiny, windows()) == before
    layers, weights = tiny.model.layers, {}
    with torch.no_grad():
        for place, channels in kept.items():
            weight = layers[place].mlp.down_proj.weight
            weights[place] = weight.clone()
            weight[:, np.setdiff1d(np.arange(128), channels)] = 0
        with without(tiny, [1]):
            assert mean_loss(tiny, windows()) == pytest.approx(inside, rel=1e-6)
        for place, weight in weights.items():
            layers[place].mlp.down_proj.weight.copy_(weight)


def test_activations_that_are_not_finite(tiny: Any) -> None:
    import torch

    weight = tiny.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        saved = weight[0, 0].item()
        weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match="not finite"):
            measure_importance(tiny, windows())
        weight[0, 0] = saved


def test_the_largest_in_their_order() -> None:
    assert largest(np.array([3.0, 1.0, 3.0, 9.0]), 2).tolist() == [0, 3]
    scores = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    assert narrowed(scores, 3, (0, 2)) is None
    found = narrowed(scores, 2, (0, 1))
    assert found is not None
    assert {layer: kept.tolist() for layer, kept in found.items()} == {0: [1, 2], 1: [0, 1]}
