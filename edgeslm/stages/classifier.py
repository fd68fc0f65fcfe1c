"""Text classifiers: started from any encoder or decoder, loaded from any directory that a stage here wrote.

Three kinds of directory: a sequence classifier of transformers; an encoder with head.safetensors
("pooled", see edgeslm.stages.networks); a recurrent student (see edgeslm.stages.students).

B batch, L classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError, first_line
from edgeslm.safetensors_file import read_safetensors
from edgeslm.stages.checkpoint import silent_transformers
from edgeslm.stages.libraries import need_transformers
from edgeslm.stages.saving import ancestry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.schedule import Batch, Examples

POOLED, HEAD_FILE = "pooled", "head.safetensors"
RECURRENT = "edgeslm-recurrent"
EXAMPLES_AT_ONCE = 32


def load_classifier(checkpoint: Checkpoint) -> tuple[Any, tuple[str, ...], Any]:
    """(module, labels, tokenizer) of a classifier directory, in evaluation mode and float32.

    The module maps input_ids and attention_mask, [B, S] each, to [B, L] logits.
    Raises ModelError for a directory that holds no classifier, or a damaged one.
    """
    config = checkpoint.config()
    tokenizer = checkpoint.tokenizer()
    if config.get("model_type") == RECURRENT:
        from edgeslm.stages import students

        student = students.load(checkpoint.path)
        return student, student.labels, tokenizer
    if ancestry(checkpoint.path).get("kind") == POOLED:
        return _load_pooled(checkpoint), _labels(config), tokenizer
    architectures = config.get("architectures") or ["a model without a name"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise ModelError(
            f"{checkpoint.name}: {architectures[0]} is no classifier", hint="fine-tune it on labelled texts"
        )
    from edgeslm.stages.networks import SequenceClassifier

    model, missing = _from_pretrained(checkpoint, {})
    if missing:
        raise ModelError(
            f"{checkpoint.name}: {len(missing)} weights are missing, first {missing[0]}",
            hint="get the model again",
        )
    return SequenceClassifier(model).eval(), _labels(config), tokenizer


def task_of(checkpoint: Checkpoint) -> str:
    """What a checkpoint is for, by its configuration: one of edgeslm.specs.TASKS."""
    if checkpoint.kind == "gguf":
        return "causal-lm"
    config = checkpoint.config()
    kind = config.get("model_type")
    if kind == "edgeslm-sensor":
        return "sensor-classification"
    named = (config.get("architectures") or [""])[0]
    is_text = kind == RECURRENT or ancestry(checkpoint.path).get("kind") == POOLED
    return "text-classification" if is_text or named.endswith("ForSequenceClassification") else "causal-lm"


def new_classifier(checkpoint: Checkpoint, labels: Sequence[str], *, seed: int) -> tuple[Any, list[str]]:
    """(a transformers sequence classifier on top of `checkpoint`, the weights that are new in it).

    New weights are drawn by `seed`.  Raises ModelError for a model that transformers can't classify with.
    """
    import torch

    names = dict(enumerate(labels))
    tokenizer = checkpoint.tokenizer()
    settings = {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {label: index for index, label in names.items()},
        "problem_type": "single_label_classification",
        "pad_token_id": pad_token(tokenizer),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if checkpoint.kind == "gguf":
            return _from_decoder(checkpoint, settings)
        return _from_pretrained(checkpoint, settings)


def pad_token(tokenizer: Any) -> int:
    """What fills a batch's shorter texts: the padding token, or EOS, which no text holds, or 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def load_encoder(checkpoint: Checkpoint) -> Any:
    """The model without any head: states of all tokens.  Raises ModelError."""
    if checkpoint.kind == "gguf":
        return checkpoint.load().base_model
    need_transformers(checkpoint.name)
    import torch
    from transformers import AutoModel

    try:
        with silent_transformers():
            model = AutoModel.from_pretrained(
                checkpoint.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
                use_safetensors=True,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"{checkpoint.name}: transformers can't load it: {first_line(error)}") from error
    return model.eval()


def classification_loss(model: Any, batch: Batch) -> Any:
    """Cross entropy summed over the batch, in nats; labels: [B] class indices."""
    from torch.nn.functional import cross_entropy

    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = getattr(output, "logits", output).float()
    return cross_entropy(logits, batch["labels"], reduction="sum")


def log_probabilities(
    model: Any, examples: Examples, collate: Callable[[list[dict[str, Any]]], Batch]
) -> NDArray[np.float64]:
    """[N, L] log-probabilities of all examples, in their order; computed in batches of like lengths."""
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))
    rows: dict[int, NDArray[np.float64]] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for at in range(0, len(order), EXAMPLES_AT_ONCE):
            chosen = order[at : at + EXAMPLES_AT_ONCE]
            batch = collate([examples[index] for index in chosen])
            ids, mask = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
            output = model(input_ids=ids, attention_mask=mask)
            scores = getattr(output, "logits", output).double().log_softmax(-1).cpu().numpy()
            rows.update(zip(chosen, scores, strict=True))
    model.train(was_training)
    return np.stack([rows[index] for index in range(len(examples))])


def heldout_metrics(
    model: Any, heldout: Examples, collate: Callable[[list[dict[str, Any]]], Batch]
) -> dict[str, float]:
    """{examples, log_loss in nats, accuracy} of a classifier on held-out examples."""
    scores = log_probabilities(model, heldout, collate)
    labels = np.array([heldout[index]["label"] for index in range(len(heldout))])
    return {
        "examples": len(labels),
        "log_loss": float(-scores[np.arange(len(labels)), labels].mean()),
        "accuracy": float((scores.argmax(1) == labels).mean()),
    }


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    names = {int(index): str(label) for index, label in (config.get("id2label") or {}).items()}
    return tuple(names[index] for index in sorted(names))


def _from_pretrained(checkpoint: Checkpoint, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    need_transformers(checkpoint.name)
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        with silent_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                checkpoint.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=bool(settings), **settings,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{checkpoint.name}: transformers can't classify with it: {first_line(error)}",
            hint="start from an encoder (BERT and its like) or a decoder that transformers knows",
        ) from error
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the fused kernels leave the soft cap out
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    new = sorted({*info["missing_keys"], *mismatched})
    body = f"{model.base_model_prefix}."
    if damaged := [name for name in new if name.startswith(body) and ".pooler." not in name]:
        raise ModelError(
            f"{checkpoint.name}: {len(damaged)} weights are missing or of another shape, first {damaged[0]}",
            hint="config.json asks for something else than the files hold: get the model again",
        )
    return model.eval(), new


def _from_decoder(checkpoint: Checkpoint, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """A GGUF file's decoder with a new head."""
    from transformers import AutoModelForSequenceClassification

    decoder = checkpoint.load()
    for name, value in settings.items():
        setattr(decoder.config, name, value)
    model = AutoModelForSequenceClassification.from_config(decoder.config).float()
    setattr(model, model.base_model_prefix, decoder.base_model)
    known = {f"{model.base_model_prefix}.{name}" for name, _ in decoder.base_model.named_parameters()}
    return model.eval(), sorted({name for name, _ in model.named_parameters()} - known)


def _load_pooled(checkpoint: Checkpoint) -> Any:
    from safetensors.torch import load_file

    from edgeslm.stages.networks import PooledClassifier

    file = checkpoint.path / HEAD_FILE
    if not file.is_file():
        raise ModelError(f"{checkpoint.name}: {HEAD_FILE} is missing", hint="get the model again")
    read_safetensors(file)
    encoder = load_encoder(checkpoint)
    classifier = PooledClassifier(encoder, len(_labels(checkpoint.config())))
    try:
        classifier.head.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ModelError(f"{checkpoint.name}: {HEAD_FILE} does not fit: {first_line(error)}") from error
    return classifier.eval()
