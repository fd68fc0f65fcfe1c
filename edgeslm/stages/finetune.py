"""Fine-tuning: a pre-trained model goes on learning on the domain's text, or learns to tell classes apart.

    full         every weight
    lora, dora   low-rank updates of all linear layers (Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024,
                 arXiv:2402.09353), merged at the end; the adapter itself is kept in OUT/adapter
    head-only    classification on frozen features: see edgeslm.stages.head

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import atomic_write, writing
from edgeslm.device import probe
from edgeslm.errors import ModelError, RecipeError, first_line
from edgeslm.progress import Progress, Quiet
from edgeslm.stages import saving
from edgeslm.stages.checkpoint import silent_transformers
from edgeslm.stages.classifier import (
    classification_loss,
    heldout_metrics,
    log_probabilities,
    new_classifier,
    pad_token,
)
from edgeslm.stages.team import is_main, processes, wait_for_all
from edgeslm.stages.train import train as fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgeslm.specs import FinetuneSpec, TrainSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.schedule import Batch, Examples

TRAINING_FILE, ADAPTER = "training.json", "adapter"
LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**29}
"""Elements of a micro-batch's logits where the recipe does not say: 256 MB and 2 GB, a few times over."""
TOKENS_EVALUATED, EXAMPLES_EVALUATED = 16384, 512
"""Of the held-out data, evenly spread, at each evaluation during training."""
EVALUATIONS, EVALUATION_SHARE = 10, 0.1
"""Evaluations at most, and what they may take of the time for steps unless patience needs them."""
FORWARD_SHARE = 0.4
"""What a forward pass costs of a whole step."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What differs between a language model and a classifier."""

    model: Any
    new_weights: Sequence[str]
    collate: Callable[[list[dict[str, Any]]], Batch]
    loss: Callable[[Any, Batch], Any]
    counted: Callable[[Batch], int]
    heldout_loss: Callable[[Any, Examples], float]
    peft_type: str
    evaluated: int


def run(
    checkpoint: Checkpoint,
    spec: FinetuneSpec,
    out: Path,
    *,
    train: Any,
    heldout: Any | None,
    work: Path,
    seed: int,
    progress: Progress | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Fine-tune `checkpoint` on `train` and write the new model into the directory `out`.

    train, heldout: token blocks, or labelled texts with `labels`, their classes in order.  work: keeps the
    training's checkpoints; a killed run goes on from there.  out: also training.json, the record of the
    training.  Every process of `accelerate launch` calls this together; only the main one writes.
    Raises RecipeError for settings that don't fit the model, DataError without examples, ModelError.
    """
    progress = progress or Quiet()
    if spec.method == "head-only":
        if labels is None:
            raise RecipeError('method = "head-only" is for classification', hint='choose "full" or "lora"')
        from edgeslm.stages import head

        return head.run(
            checkpoint, spec, out, train=train, heldout=heldout, labels=labels, seed=seed, progress=progress
        )
    task = _language(checkpoint, train) if labels is None else _texts(checkpoint, labels, seed)
    model = task.model if spec.method == "full" else adapted(task, spec, checkpoint, seed)
    check_memory(model, checkpoint.name)
    settings = spec.train if labels is not None else _micro(spec.train, task.model, train)
    some = _Some(heldout, task.evaluated) if heldout is not None and len(heldout) else None
    record = fit(
        model, train, task.collate, settings, work, loss=task.loss, counted=task.counted,
        evaluate=None if some is None else lambda bare: task.heldout_loss(bare, some),
        evaluations=affordable_evaluations(settings, len(train), 0 if some is None else len(some)),
        seed=seed, progress=progress, name="finetune",
    )  # fmt: skip
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    record |= {"method": spec.method, "trained_parameters": sum(trained)}
    if is_main():
        record["heldout"] = _metrics(model, task, record, heldout, labels)
        _write(checkpoint, model, spec, out, record)
    wait_for_all()
    return saving.saved(out, checkpoint, here=is_main())


def causal_loss(model: Any, batch: Batch) -> Any:
    """Negative log-likelihood summed over the labels that count, in nats.

    batch: input_ids and labels, [B, S] each; -100 = not counted.  The logits of a position are compared
    with the label of the next one.
    """
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")


def causal_counted(batch: Batch) -> int:
    """Labels of a batch that count: all but -100 and each row's first."""
    return int((batch["labels"][:, 1:] != -100).sum())


def causal_perplexity(model: Any, dataset: Examples) -> float:
    """exp of the mean loss over everything that the blocks of a data set count."""
    return math.exp(_mean_loss(model, dataset))


def adapted(task: _Task, spec: FinetuneSpec, checkpoint: Checkpoint, seed: int) -> Any:
    """The model with a LoRA or DoRA adapter on every linear layer but the head; new weights train whole."""
    import torch

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError(
            f'method = "{spec.method}" needs peft', hint="pip install 'edgeslm[workstation]'"
        ) from error
    whole = sorted({name.rpartition(".")[0] for name in task.new_weights})
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, use_dora=spec.method == "dora",
        target_modules="all-linear", exclude_modules=whole or None, modules_to_save=whole or None,
        task_type=task.peft_type,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = get_peft_model(task.model, config)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{checkpoint.name}: no adapter fits it: {first_line(error)}") from error
    model.peft_config["default"].base_model_name_or_path = checkpoint.source
    return model


def check_context(model: Any, context: int, name: str, stage: str) -> None:
    """Raise RecipeError for blocks longer than what a language model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise RecipeError(
            f"context = {context}, but {name} was made for {limit} tokens",
            hint=f"set [{stage}.train] context to {limit} or less",
        )


def check_memory(
    model: Any,
    name: str,
    free_bytes: int | None = None,
    *,
    hint: str = 'method = "lora" trains about a hundredth of them',
) -> None:
    """Raise ModelError when gradients and AdamW's two moments have no room beside the loaded weights.

    free_bytes: None for what the device has.  Activations come on top and are not counted.
    """
    import torch

    device = processes().device
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed = 12 * trained
    if device.type == "cuda":
        needed += 4 * sum(parameter.numel() for parameter in model.parameters())
        free_bytes = free_bytes or torch.cuda.mem_get_info(device)[0]
    free_bytes = free_bytes or probe()["memory_available_bytes"]
    if free_bytes is not None and needed > free_bytes:
        raise ModelError(
            f"{name}: training {trained / 1e6:,.0f} M weights needs {needed / 2**30:.1f} GiB, "
            f"{free_bytes / 2**30:.1f} GiB are free",
            hint=hint,
        )


# --- the two tasks ---


def _language(checkpoint: Checkpoint, blocks: Any) -> _Task:
    from edgeslm.stages.packing import collate_blocks

    model = checkpoint.load()
    check_context(model, blocks.context, checkpoint.name, "finetune")
    return _Task(
        model=model, new_weights=(), collate=collate_blocks, loss=causal_loss, counted=causal_counted,
        heldout_loss=_mean_loss, peft_type="CAUSAL_LM", evaluated=max(1, TOKENS_EVALUATED // blocks.context),
    )  # fmt: skip


def _texts(checkpoint: Checkpoint, labels: Sequence[str], seed: int) -> _Task:
    from edgeslm.stages.labelled import collate_texts

    model, new = new_classifier(checkpoint, labels, seed=seed)
    collate = collate_texts(pad_token(checkpoint.tokenizer()))

    def heldout_loss(model: Any, examples: Examples) -> float:
        scores = log_probabilities(model, examples, collate)
        found = [examples[index]["label"] for index in range(len(examples))]
        return float(-scores[np.arange(len(found)), found].mean())

    return _Task(
        model=model, new_weights=new, collate=collate, loss=classification_loss,
        counted=lambda batch: len(batch["labels"]), heldout_loss=heldout_loss, peft_type="SEQ_CLS",
        evaluated=EXAMPLES_EVALUATED,
    )  # fmt: skip


def _mean_loss(model: Any, blocks: Examples) -> float:
    """Mean loss over the counted positions of all blocks, one block at a time, in nats."""
    import torch

    from edgeslm.stages.packing import collate_blocks

    device = next(model.parameters()).device
    total, counted = 0.0, 0
    with torch.no_grad():
        for index in range(len(blocks)):
            batch = {key: value.to(device) for key, value in collate_blocks([blocks[index]]).items()}
            total += float(causal_loss(model, batch))
            counted += causal_counted(batch)
    return total / max(counted, 1)


# --- training ---


@dataclass(frozen=True)
class _Some:
    """Some examples of a data set, evenly spread."""

    examples: Any
    most: int

    def __len__(self) -> int:
        return min(self.most, len(self.examples))

    def __getitem__(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = self.examples[index * len(self.examples) // len(self)]
        return found


def affordable_evaluations(settings: TrainSpec, examples: int, heldout: int) -> int:
    """How often the held-out examples are gone through: all ten times where patience goes by them."""
    if settings.patience is not None or heldout == 0:
        return EVALUATIONS
    stepped = settings.max_steps * settings.batch_size if settings.max_steps else settings.epochs * examples
    return max(1, min(EVALUATIONS, int(EVALUATION_SHARE * stepped / (FORWARD_SHARE * heldout))))


def _micro(spec: TrainSpec, model: Any, blocks: Any) -> TrainSpec:
    """The spec with as many blocks at once as their logits allow, where it does not say."""
    if spec.micro_batch is not None:
        return spec
    room = LOGITS_AT_ONCE.get(processes().device.type, LOGITS_AT_ONCE["cpu"])
    fits = room // (blocks.context * model.config.get_text_config().vocab_size)
    return replace(spec, micro_batch=max(1, min(fits, spec.batch_size)))


def _metrics(
    model: Any, task: _Task, record: dict[str, Any], heldout: Any | None, labels: Sequence[str] | None
) -> dict[str, float] | None:
    """The held-out loss that the final weights have, and what it means for the task."""
    if heldout is None or not record["evaluations"]:
        return None
    if labels is not None:
        return heldout_metrics(model, heldout, task.collate)
    losses = {point["step"]: point["loss"] for point in record["evaluations"]}
    before, after = losses[0], losses[record["weights_of_step"]]
    return {
        "loss_before": before,
        "loss": after,
        "perplexity_before": math.exp(before),
        "perplexity": math.exp(after),
    }


def _write(checkpoint: Checkpoint, model: Any, spec: FinetuneSpec, out: Path, record: dict[str, Any]) -> None:
    """The model as an ordinary directory, its adapter and the record of the training beside."""
    model = model.cpu()
    if spec.method != "full":
        with writing(out), silent_transformers():
            model.save_pretrained(out / ADAPTER, safe_serialization=True, save_embedding_layers=False)
        model = model.merge_and_unload(safe_merge=True)
    saving.save_model(model, None, out, parent=checkpoint, stage="finetune", spec=spec)
    atomic_write(out / TRAINING_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
