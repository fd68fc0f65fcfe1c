"""Networks to distil into: a recurrent classifier over the teacher's tokens, and fewer of the teacher's layers.

B batch, S sequence, V vocabulary, E embedding, U units of one direction, L classes.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgeslm.atomic import atomic_write
from edgeslm.errors import ModelError
from edgeslm.stages.checkpoint import read_json
from edgeslm.stages.widths import PER_LAYER, layers_kept

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgeslm.specs import StudentSpec

    Kinds = tuple[Sequence[int], int]

MODEL_TYPE = "edgeslm-recurrent"
NETWORKS = {"gru": nn.GRU, "lstm": nn.LSTM}
DROPOUT = 0.3
"""Of token vectors and of the pooled features: a small domain data set is soon known by heart."""


class RecurrentClassifier(nn.Module):
    """Embedding, bidirectional GRU or LSTM layers, mean and maximum over the text, one linear layer.

    Padding on the right changes nothing: the forward direction has not seen it yet, and the backward
    direction reads the text through reversed indices that leave the padding where it is.  Only matrix
    products, GRU or LSTM of one direction and gathers, which ONNX has as they are.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        embedding: int,
        units: int,
        layers: int,
        labels: Sequence[str],
        network: str = "gru",
    ) -> None:
        super().__init__()
        self.network, self.units, self.labels = network, units, tuple(labels)
        self.embed = nn.Embedding(vocabulary, embedding)
        sizes = [embedding, *[2 * units] * (layers - 1)]
        self.ahead = nn.ModuleList(NETWORKS[network](size, units, batch_first=True) for size in sizes)
        self.behind = nn.ModuleList(NETWORKS[network](size, units, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(4 * units, len(self.labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S] token ids and [B, S] mask, 1 = text, padding on the right; returns [B, L] logits."""
        lengths = attention_mask.sum(1, keepdim=True)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        turned = torch.where(positions < lengths, lengths - 1 - positions, positions)
        states = self.dropout(self.embed(input_ids))
        for ahead, behind in zip(self.ahead, self.behind, strict=True):
            backwards = self._run(behind, _take(states, turned))
            states = torch.cat([self._run(ahead, states), _take(backwards, turned)], -1)
        inside = attention_mask[..., None].to(states.dtype)
        mean = (states * inside).sum(1) / inside.sum(1).clamp(min=1)
        highest = states.masked_fill(inside == 0, -1.0).amax(1)  # states lie between -1 and 1
        return self.head(self.dropout(torch.cat([mean, highest], -1)))  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def _run(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """[B, S, U] states of one direction, from zero."""
        zero = inputs.new_zeros(1, inputs.shape[0], self.units)
        states, _last = layer(inputs, zero if self.network == "gru" else (zero, zero))
        return states  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """What config.json says of it, with its number of parameters."""
        return {
            "model_type": MODEL_TYPE,
            "architectures": [type(self).__name__],
            "network": self.network,
            "vocab_size": self.embed.num_embeddings,
            "embedding": self.embed.embedding_dim,
            "units": self.units,
            "layers": len(self.ahead),
            "labels": list(self.labels),
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
        }


def _take(states: Tensor, indices: Tensor) -> Tensor:
    """[B, S, E] states in the order of [B, S] indices."""
    return states.gather(1, indices[..., None].expand(-1, -1, states.shape[-1]))


def recurrent(spec: StudentSpec, *, vectors: Tensor, labels: Sequence[str], seed: int) -> RecurrentClassifier:
    """A student whose token vectors are the teacher's, projected to its width.

    vectors: [V, H] the teacher's token embedding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = RecurrentClassifier(
            vocabulary=len(vectors), embedding=spec.embedding, units=spec.units, layers=spec.layers,
            labels=labels, network=spec.kind,
        )  # fmt: skip
    with torch.no_grad():
        student.embed.weight.copy_(narrow_vectors(vectors, student.embed.weight))
    return student


def narrow_vectors(vectors: Tensor, drawn: Tensor) -> Tensor:
    """[V, E] principal components of [V, H] token vectors, scaled to a deviation of 1.

    drawn: [V, E] random vectors, which fill the columns beyond H.  The covariance is [H, H], so the
    vocabulary's size costs one product.
    """
    centred = vectors.detach().double() - vectors.detach().double().mean(0)
    width = min(drawn.shape[1], centred.shape[1])
    _variances, directions = torch.linalg.eigh(centred.T @ centred)
    narrow = centred @ directions[:, -width:].flip(1)
    narrow = narrow / narrow.std().clamp(min=torch.finfo(narrow.dtype).tiny)
    return torch.cat([narrow.to(drawn.dtype), drawn.detach()[:, width:]], 1)


def save(student: RecurrentClassifier, out: Path, **facts: Any) -> None:
    """Write config.json and model.safetensors into `out`.  facts: more fields of config.json.

    Raises EdgeslmError for a full disk.
    """
    write_tensors(out / "model.safetensors", student.state_dict())
    settings = {**student.settings(), **facts}
    atomic_write(out / "config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A small safetensors file, whole or not at all."""
    from safetensors.torch import save

    apart = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(apart, metadata={"format": "pt"}))


def load(path: Path) -> RecurrentClassifier:
    """The student in a directory, in evaluation mode.  Raises ModelError for one that does not fit its config."""
    from safetensors.torch import load_file

    config = read_json(path / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ModelError(f"{path.name}: model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
    try:
        student = RecurrentClassifier(
            vocabulary=config["vocab_size"], embedding=config["embedding"], units=config["units"],
            layers=config["layers"], labels=config["labels"], network=config["network"],
        )  # fmt: skip
        student.load_state_dict(load_file(path / "model.safetensors"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path.name}: config.json and model.safetensors do not fit: {str(error).splitlines()[0]}",
            hint="get the model again",
        ) from error
    return student.eval()


def spread(layers: int, kept: int) -> list[int]:
    """`kept` of `layers` indices, evenly, the first and the last among them.

    Raises ModelError when there are no more layers than are to be kept.
    """
    if not 0 < kept < layers:
        raise ModelError(
            f"{kept} of {layers} layers is no smaller model", hint=f"student layers: 1 to {layers - 1}"
        )
    if kept == 1:
        return [0]
    return [round(index * (layers - 1) / (kept - 1)) for index in range(kept)]


def smaller(model: Any, layers: int, kinds: Kinds | None = None) -> tuple[Any, list[int]]:
    """A model of the same family with evenly spread layers of `model` (Sanh et al. 2019, arXiv:1910.01108).

    Returns it and the layers it has.  Everything but the layers is as it is in `model`, copied.  kinds: of
    edgeslm.stages.widths.required_kinds; the layers are then those nearest to the even ones that keep the
    pattern.  Raises RecipeError where none do.
    """
    count = model.config.get_text_config().num_hidden_layers
    kept = spread(count, layers)
    if kinds is not None:
        nearness = [-float(min(abs(layer - even) for even in kept)) for layer in range(count)]
        kept = list(layers_kept(nearness, count - layers, kinds))
    return take_layers(model, kept), kept


def take_layers(model: Any, kept: Sequence[int]) -> Any:
    """A copy of a transformers model with the layers `kept`, in that order."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    stacks = [path for path in stacks if not any(path.startswith(f"{outer}.") for outer in stacks)]
    if len(stacks) != 1:
        raise ModelError(f"{type(model).__name__}: {len(stacks)} lists of {count} layers, one was expected")
    text.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        values = getattr(text, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(text, name, [values[index] for index in kept])
    fewer = type(model)(config).to(next(model.parameters()).dtype)
    fewer.load_state_dict(_renumbered(model.state_dict(), stacks[0], kept))
    return fewer.eval()


def _renumbered(tensors: dict[str, Tensor], stack: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a model with only some of a stack's layers, numbered anew."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(kept):
        places.setdefault(index, []).append(place)
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{stack}."):
            found[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        for place in places.get(int(number), ()):
            found[f"{stack}.{place}.{rest}"] = tensor
    return found


class Projected(nn.Module):
    """A language model whose hidden states are projected to its teacher's width, all layers alike.

    One projection serves every layer, since all of them write into one residual stream.
    """

    def __init__(self, model: Any, width: int, teacher_width: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = nn.Linear(width, teacher_width, bias=False)
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """transformers' output, with hidden states of [B, S, teacher_width]."""
        found = self.model(**inputs)
        if found.hidden_states is not None:
            found.hidden_states = tuple(self.projection(states) for states in found.hidden_states)
        return found

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        self.model.gradient_checkpointing_enable(**settings)

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing_disable()
