"""What layers, channels and heads do to a model's output, measured on text.

Layers by block influence (ShortGPT, arXiv:2403.03853, section 3.1) or by what leaving them out does to
the loss (Kim et al. 2024, arXiv:2402.02834, section 3.1); channels and heads by their activations
(Minitron, arXiv:2407.14679, section 2.2).

W windows of C tokens, L layers, H hidden, I MLP channels, K key-value heads.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError
from edgeslm.progress import Progress, Quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray


CANDIDATES = 0.5
"""Share of the layers that are tried in turn: the others cost too much by themselves."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Measured on the whole model; larger is more important."""

    layers: NDArray[np.float64]
    """[L] block influence: 1 - mean cosine of a layer's input and output."""
    mlp: NDArray[np.float64]
    """[L, I] mean absolute input of the down projection."""
    kv_heads: NDArray[np.float64]
    """[L, K] mean length of the outputs of a group's query heads, summed over the group."""
    hidden: NDArray[np.float64]
    """[H] mean absolute output of the norms, summed over the norms."""


def measure_importance(
    model: Any, windows: NDArray[np.int64], progress: Progress | None = None
) -> Importance:
    """Importance of all that can be cut, in one pass over [W, C] token ids.

    model: a decoder of transformers, in evaluation mode.  Raises ModelError when an activation is not finite.
    """
    import torch

    decoder = model.get_decoder()
    sums = _Sums(decoder.config)
    with ExitStack() as hooks, torch.inference_mode():
        for place, layer in enumerate(decoder.layers):
            for handle in (
                layer.register_forward_hook(sums.on_layer(place), with_kwargs=True),
                layer.mlp.down_proj.register_forward_pre_hook(sums.on_mlp(place)),
                layer.self_attn.o_proj.register_forward_pre_hook(sums.on_heads(place)),
            ):
                hooks.callback(handle.remove)
        for name, module in decoder.named_modules():
            if name.endswith("norm") and "self_attn" not in name:
                hooks.callback(module.register_forward_hook(sums.on_norm).remove)
        with (progress or Quiet()).task("importance", windows.size, "tokens") as advance:
            for window in torch.from_numpy(windows):
                decoder(input_ids=window[None], use_cache=False)
                advance(len(window))
    layers, mlp, kv_heads, hidden = (
        (part / windows.size).numpy() for part in (sums.layers, sums.mlp, sums.kv_heads, sums.hidden)
    )
    if not all(np.isfinite(part).all() for part in (layers, mlp, kv_heads, hidden)):
        raise ModelError(
            "activations of the model are not finite",
            hint="the weights hold NaN or overflow: check the model",
        )
    return Importance(layers=layers, mlp=mlp, kv_heads=kv_heads, hidden=hidden)


class _Sums:
    """Sums over tokens, in double precision, and the hooks that add to them."""

    def __init__(self, config: Any) -> None:
        import torch

        def zeros(*shape: int) -> Any:
            return torch.zeros(shape, dtype=torch.float64)

        count = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.layers, self.mlp = zeros(count), zeros(count, config.intermediate_size)
        self.kv_heads, self.hidden = zeros(count, config.num_key_value_heads), zeros(config.hidden_size)

    def on_layer(self, place: int) -> Any:
        import torch

        def add(_module: Any, inputs: Any, keywords: Any, output: Any) -> None:
            before = inputs[0] if inputs else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(_flat(before), _flat(after), dim=-1)
            self.layers[place] += (1 - cosine).sum()

        return add

    def on_mlp(self, place: int) -> Any:
        def add(_module: Any, inputs: Any) -> None:
            self.mlp[place] += _flat(inputs[0]).abs().sum(0)

        return add

    def on_heads(self, place: int) -> Any:
        def add(_module: Any, inputs: Any) -> None:
            outputs = _flat(inputs[0])
            lengths = outputs.reshape(len(outputs), self.heads, -1).norm(dim=-1).sum(0)
            self.kv_heads[place] += lengths.reshape(self.kv_heads.shape[1], -1).sum(1)

        return add

    def on_norm(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden += _flat(output).abs().sum(0)


def _flat(values: Any) -> Any:
    """[..., channels] as [tokens, channels] in double precision."""
    return values.detach().reshape(-1, values.shape[-1]).double()


def mean_loss(model: Any, windows: NDArray[np.int64]) -> float:
    """Nats per token of [W, C] token ids, of all but the first of each window."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for window in torch.from_numpy(windows):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (windows.size - len(windows))


def layer_losses(
    model: Any, windows: NDArray[np.int64], progress: Progress | None = None
) -> NDArray[np.float64]:
    """[L] nats per token that leaving out each layer alone costs on [W, C] token ids."""
    count = len(model.get_decoder().layers)
    whole = mean_loss(model, windows)
    losses = []
    with (progress or Quiet()).task("leaving out layers", count, "layers") as advance:
        for layer in range(count):
            with without(model, [layer]):
                losses.append(mean_loss(model, windows) - whole)
            advance(1)
    return np.array(losses)


def dropped_in_turn(
    model: Any,
    windows: NDArray[np.int64],
    alone: NDArray[np.float64],
    drop: int,
    progress: Progress | None = None,
) -> list[int]:
    """`drop` layers, each the one that costs least on [W, C] token ids once those before it are gone.

    alone: [L] what each costs by itself; after the first, only the CANDIDATES of least cost are tried.  Layers
    that stand in for each other cost little one by one and much together: six of SmolLM2-135M's thirty by their
    own costs raise the perplexity of the Python reference from 12.3 to 32.2, in turn to 30.5, and those of least
    cosine influence to 29.5; three to 18.9, 17.9 and 18.6.
    """
    order: list[int] = np.argsort(alone, kind="stable").tolist()
    candidates = order[: max(drop, round(CANDIDATES * len(order)))]
    gone = order[: min(drop, 1)]
    turns = range(len(gone), drop)
    total = sum(len(candidates) - turn for turn in turns)
    with (progress or Quiet()).task("leaving out layers in turn", total, "models") as advance:
        for _turn in turns:
            losses = {}
            for layer in candidates:
                if layer not in gone:
                    with without(model, [*gone, layer]):
                        losses[layer] = mean_loss(model, windows)
                    advance(1)
            gone.append(min(losses, key=lambda layer: losses[layer]))
    return gone


@contextmanager
def without(
    model: Any, layers: Sequence[int] = (), mlp: Mapping[int, NDArray[np.int64]] | None = None
) -> Iterator[None]:
    """The model without these layers, and with only these MLP channels of each layer, for the time of the block.

    mlp: layer -> [I'] channels that remain.
    """
    import torch

    decoder = model.get_decoder()
    whole = decoder.layers

    def only(channels: NDArray[np.int64]) -> Any:
        kept = torch.zeros(decoder.config.intermediate_size)
        kept[torch.from_numpy(channels)] = 1
        return lambda _module, inputs: (inputs[0] * kept,)

    with ExitStack() as undo:
        for place, channels in (mlp or {}).items():
            handle = whole[place].mlp.down_proj.register_forward_pre_hook(only(channels))
            undo.callback(handle.remove)
        undo.callback(setattr, decoder, "layers", whole)
        gone = set(layers)
        decoder.layers = torch.nn.ModuleList(layer for place, layer in enumerate(whole) if place not in gone)
        yield


def largest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The places of the `count` largest of [N] scores, ascending; the first of equal ones."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def narrowed(
    scores: NDArray[np.float64], width: int, layers: Sequence[int]
) -> Mapping[int, NDArray[np.int64]] | None:
    """Layer -> its `width` most important channels, out of [L, channels] scores; None where all remain."""
    if width == scores.shape[1]:
        return None
    return {layer: largest(scores[layer], width) for layer in layers}
