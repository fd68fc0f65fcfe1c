"""A model without the parts that matter least on a text: layers, MLP channels, heads, hidden size, tokens.

    settings -> shape -> importance measured -> proven on a tiny copy -> cut -> Hugging Face directory

The result is homogeneous (all layers alike), so it loads with from_pretrained and exports like any other
model.  OUT/prune.json says what was cut; nothing is trained here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import atomic_write, replacing
from edgeslm.errors import RecipeError
from edgeslm.progress import Progress, Quiet
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import influence, target, vocabulary
from edgeslm.stages.architectures import architecture_of
from edgeslm.stages.calibrate import begin_token, choose_windows, token_stream
from edgeslm.stages.proof import build_model, metadata_bytes, prove_export, tiny_config
from edgeslm.stages.saving import save_model
from edgeslm.stages.sizes import artifact_bytes
from edgeslm.stages.widths import (
    Cut,
    Shape,
    count_parameters,
    cut_config,
    cut_state,
    layers_kept,
    required_kinds,
    rounded,
    shape_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.specs import PruneSpec
    from edgeslm.stages.chats import Chat
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.data import Document
    from edgeslm.stages.rope import Config

SCHEMA = "edgeslm.prune/1"
PLAIN = QuantizeSpec(scheme="F16")
"""What becomes of a pruned model when nobody says."""


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """The model as it was, and what it is measured on."""

    model: Any
    config: Config
    state: dict[str, Any]
    windows: NDArray[np.int64]
    """[W, C] token ids."""


def run(
    checkpoint: Checkpoint,
    spec: PruneSpec,
    out: Path,
    *,
    documents: Callable[[], Iterable[Document]],
    chat: Chat,
    context: int = 512,
    tokens: int = 16384,
    artifacts: Sequence[QuantizeSpec] = (PLAIN,),
    tokens_before: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Checkpoint:
    """Write the pruned model into the directory `out`.

    documents: the domain's text, read anew at each call.  chat: renders messages, given template, messages,
    BOS, EOS and whether an answer is asked for.  context, tokens: of a window of text, and of all of them,
    that importance is measured on.  artifacts: what will be made of it: spec.target_bytes holds for the
    largest.  tokens_before: of the model that an earlier pruning took tokens from: spec.target below 1 is of
    that one.  seed: of the tiny copy's weights.
    Raises RecipeError for settings that do not fit the model, ModelError for an architecture that is not
    supported and for a shape that llama.cpp can't hold, DataError for too little text.
    """
    progress = progress or Quiet()
    notes: list[str] = []
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer()
    config = text_config(model)
    shape = wanted_shape(spec, config, notes)
    windows = _windows(documents(), tokenizer, chat, context, tokens)
    whole = _Whole(model=model, config=config, state=text_state(model), windows=windows)
    left = vocabulary.Choice(None, None, None)
    if spec.vocabulary:
        left = vocabulary.choose(
            tokenizer, model, windows, configs=(config, _generation(model)), documents=documents, chat=chat,
            progress=progress,
        )  # fmt: skip
    goal = None
    if target.asked(spec):
        goal = _goal(
            spec, tuple(whole.state), config, checkpoint=checkpoint, artifacts=artifacts,
            tokens_before=tokens_before, tokenizer=left.tokenizer,
        )  # fmt: skip
    cut, shape, scores = _choose(whole, spec, shape, notes, tokens=left.kept, goal=goal, progress=progress)
    new_config = _new_config(config, cut, shape)
    prove_export(new_config, checkpoint, left.tokenizer, seed=seed, progress=progress)
    for note in notes:
        progress.note(note)
    pruned = _build(whole, new_config, cut)
    result = save_model(pruned, left.tokenizer, out, parent=checkpoint, stage="prune", spec=spec)
    record = {
        **_record(whole, cut, new_config),
        "layers_by": spec.layers_by,
        "influence": None if scores is None else [round(float(score), 6) for score in scores],
        "used_tokens": left.used,
        "notes": notes,
    }
    _write_record(record, left.kept, out)
    return result


def _write_record(record: dict[str, Any], kept: NDArray[np.int64] | None, out: Path) -> None:
    """prune.json, and which tokens were kept."""
    if kept is not None:
        with replacing(out / vocabulary.KEPT_FILE) as beside, beside.open("wb") as file:
            np.save(file, kept)
    atomic_write(out / "prune.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _record(whole: _Whole, cut: Cut, config: Config) -> dict[str, Any]:
    """What was cut, as prune.json keeps it; config: of the pruned model."""
    both = {"before": whole.config, "after": config}
    return {
        "schema": SCHEMA,
        "dropped_layers": sorted(set(range(whole.config["num_hidden_layers"])) - set(cut.layers)),
        "widths": {when: asdict(shape_of(one)) for when, one in both.items()},
        "tokens": {when: one["vocab_size"] for when, one in both.items()},
        "parameters": {when: count_parameters(list(whole.state), one) for when, one in both.items()},
    }


def prove(
    checkpoint: Checkpoint,
    spec: PruneSpec,
    *,
    artifacts: Sequence[QuantizeSpec] = (PLAIN,),
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Raise what `run` would for these settings, before anything is trained or measured.

    The conversion is proven with the whole vocabulary, and with the layers that cost nothing to name.
    """
    config = read_config(checkpoint)
    shape = wanted_shape(spec, config, [])
    if target.asked(spec):
        names = tuple(text_state(build_model(tiny_config(config))))
        goal = _goal(spec, names, config, checkpoint=checkpoint, artifacts=artifacts)
        if not spec.vocabulary:  # what it leaves is not known yet
            target.candidates(_unmeasured(config, goal), spec, shape)
    layers = layers_kept(
        [0.0] * config["num_hidden_layers"],
        config["num_hidden_layers"] - shape.layers,
        required_kinds(config),
    )
    prove_export(cut_config(config, layers, shape), checkpoint, seed=seed, progress=progress)


def _goal(
    spec: PruneSpec,
    names: tuple[str, ...],
    config: Config,
    *,
    checkpoint: Checkpoint,
    artifacts: Sequence[QuantizeSpec],
    tokens_before: int | None = None,
    tokenizer: Any | None = None,
) -> target.Goal:
    """The target as a number of parameters or bytes.  tokenizer: of the pruned model; None: the checkpoint's."""
    metadata = 0
    if spec.target_bytes is not None and any(one.format == "gguf" for one in artifacts):
        rows = config if tokenizer is None else config | {"vocab_size": len(tokenizer)}
        metadata = metadata_bytes(rows, checkpoint, tokenizer)

    def file_bytes(one: Config) -> int:
        return max(artifact_bytes(names, one, artifact, metadata) for artifact in artifacts)

    return target.goal(spec, names, config, file_bytes=file_bytes, tokens_before=tokens_before)


def _unmeasured(config: Config, goal: target.Goal) -> target.Subject:
    """A model of which only the shape is known."""
    layers, mlp = config["num_hidden_layers"], config["intermediate_size"]
    return target.Subject(
        model=None, config=config, goal=goal, windows=np.zeros((0, 0), np.int64), scores=np.zeros(layers),
        mlp=np.zeros((layers, mlp)), tokens=config["vocab_size"],
    )  # fmt: skip


# --- the model as a configuration and tensors ---


def text_config(model: Any) -> Config:
    """The configuration of a decoder, or of the text part of a multimodal model, with `architectures`.

    Raises ModelError for an architecture that is not supported.
    """
    config: Config = model.config.get_text_config().to_dict()
    name = type(model).__name__.replace("ForConditionalGeneration", "ForCausalLM")
    config["architectures"] = [name]
    architecture_of(config)
    return config


def read_config(checkpoint: Checkpoint) -> Config:
    """`text_config` without loading the weights of a Hugging Face directory."""
    if checkpoint.kind == "gguf":
        return text_config(checkpoint.load())
    from transformers import AutoConfig

    stored = checkpoint.config()
    architecture_of(stored)
    config: Config = (
        AutoConfig.from_pretrained(checkpoint.path, local_files_only=True).get_text_config().to_dict()
    )
    name = stored["architectures"][0].replace("ForConditionalGeneration", "ForCausalLM")
    return config | {"architectures": [name]}


def text_state(model: Any) -> dict[str, Any]:
    """The decoder's tensors by the names of a causal language model; the head only where it is not tied."""
    state = {f"model.{name}": tensor for name, tensor in model.get_decoder().state_dict().items()}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return state if head is embedding else state | {"lm_head.weight": head.detach()}


def _build(whole: _Whole, config: Config, cut: Cut) -> Any:
    """The pruned model in torch."""
    from transformers import GenerationConfig

    pruned = build_model(config)
    state = cut_state(whole.state, whole.config, cut)
    missing, unexpected = pruned.load_state_dict(state, strict=False, assign=True)
    pruned.tie_weights()
    left = set(missing) - {"lm_head.weight"}
    if unexpected or left or ("lm_head.weight" in missing and not config["tie_word_embeddings"]):
        raise AssertionError(f"tensors and configuration disagree: {missing}, {unexpected}")
    for name, buffer in whole.model.get_decoder().named_buffers():
        if "rotary_emb" in name:  # a GGUF file may hold rotary factors of its own
            pruned.get_decoder().get_buffer(name).copy_(buffer)
    generation = _generation(whole.model)
    if cut.tokens is not None:
        generation = vocabulary.renumber(generation, cut.tokens)
    pruned.generation_config = GenerationConfig.from_dict(generation)
    return pruned


def _generation(model: Any) -> dict[str, Any]:
    return dict(model.generation_config.to_dict()) if model.generation_config is not None else {}


def _new_config(config: Config, cut: Cut, shape: Shape) -> Config:
    new = cut_config(config, cut.layers, shape)
    if cut.tokens is not None:
        new = vocabulary.renumber(new, cut.tokens) | {"vocab_size": len(cut.tokens)}
    return new


def _windows(
    found: Iterable[Document], tokenizer: Any, chat: Chat, context: int, tokens: int
) -> NDArray[np.int64]:
    """[W, C] windows of the text, BOS first where the model begins with one."""
    stream = token_stream(
        found, tokenizer, lambda template, turns, bos, eos: chat(template, turns, bos, eos, False)
    )
    windows = choose_windows(stream, context=context, tokens=tokens)
    bos = begin_token(tokenizer)
    if bos is not None:
        windows[:, 0] = bos
    return windows


# --- what is cut ---


def wanted_shape(spec: PruneSpec, config: Config, notes: list[str]) -> Shape:
    """The shape that the settings ask for, the target aside.

    Raises RecipeError for what does not fit the model, ModelError for what does not fit its family.
    """
    now = shape_of(config)
    wishes = (spec.drop_layers, spec.mlp_width, spec.kv_heads, spec.hidden_size)
    if not spec.vocabulary and not target.asked(spec) and all(wish is None for wish in wishes):
        raise RecipeError(
            "[prune] asks for nothing",
            hint="set drop_layers, mlp_width, kv_heads, hidden_size, vocabulary, target or target_bytes",
        )
    drop = spec.drop_layers or 0
    if drop >= now.layers:
        raise RecipeError(f"drop_layers = {drop} of {now.layers} layers", hint="keep at least one layer")
    if spec.kv_heads is not None and spec.kv_heads > now.kv_heads:
        raise RecipeError(f"kv_heads = {spec.kv_heads} is more than the model's {now.kv_heads}")
    mlp, hidden = (
        whole if wanted is None else rounded(wanted, whole, spec.multiple, name, notes)
        for name, wanted, whole in (
            ("mlp_width", spec.mlp_width, now.mlp),
            ("hidden_size", spec.hidden_size, now.hidden),
        )
    )
    shape = Shape(layers=now.layers - drop, mlp=mlp, kv_heads=spec.kv_heads or now.kv_heads, hidden=hidden)
    cut_config(config, range(shape.layers), shape)  # raises for a shape that the family can't have
    return shape


def _choose(
    whole: _Whole,
    spec: PruneSpec,
    shape: Shape,
    notes: list[str],
    *,
    tokens: NDArray[np.int64] | None,
    goal: target.Goal | None,
    progress: Progress,
) -> tuple[Cut, Shape, NDArray[np.float64] | None]:
    """(what remains, its shape, each layer's score), by importance on the text where more than tokens go."""
    if goal is None and shape == shape_of(whole.config):
        return Cut(layers=tuple(range(shape.layers)), tokens=tokens), shape, None
    importance = influence.measure_importance(whole.model, whole.windows, progress)
    few, scores = target.few(whole.windows), importance.layers
    if spec.layers_by == "perplexity":
        scores = influence.layer_losses(whole.model, few, progress)
    if goal is not None:
        subject = target.Subject(
            model=whole.model, config=whole.config, goal=goal, windows=few, scores=scores,
            mlp=importance.mlp, tokens=whole.config["vocab_size"] if tokens is None else len(tokens),
        )  # fmt: skip
        shape, note = target.fit(subject, spec, shape, progress)
        notes.append(note)
    now, kinds = shape_of(whole.config), required_kinds(whole.config)
    drop = now.layers - shape.layers
    layers = layers_kept(scores, drop, kinds)
    if spec.layers_by == "perplexity" and goal is None and kinds is None:
        gone = influence.dropped_in_turn(whole.model, few[::2], scores, drop, progress)
        layers = tuple(layer for layer in range(now.layers) if layer not in gone)
    cut = Cut(
        layers=layers,
        mlp=influence.narrowed(importance.mlp, shape.mlp, layers),
        kv_heads=influence.narrowed(importance.kv_heads, shape.kv_heads, layers),
        hidden=None if shape.hidden == now.hidden else influence.largest(importance.hidden, shape.hidden),
        tokens=tokens,
    )
    return cut, shape, scores
