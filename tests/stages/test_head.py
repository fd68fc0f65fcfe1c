"""Head-only classifiers: features against sentence-transformers' definition, the head against its solver."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, ModelError
from edgeslm.specs import FinetuneSpec
from edgeslm.stages.checkpoint import Checkpoint, resolve
from tests.encoders import TOPICS, examples, write_encoder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

LABELS = tuple(TOPICS)
SPEC = FinetuneSpec(method="head-only")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("transformers")
    return resolve(str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert")))


def build(encoder: Checkpoint, out: Path, classes: tuple[str, ...] = LABELS) -> tuple[Checkpoint, Any]:
    from edgeslm.stages import head

    tokenizer = encoder.tokenizer()
    train = examples(out / "train", tokenizer, 120, classes=classes)
    heldout = examples(out / "heldout", tokenizer, 45, classes=classes, seed=1)
    made = head.run(encoder, SPEC, out / "m", train=train, heldout=heldout, labels=classes, seed=0)
    return made, heldout


def test_features_are_sentence_transformers(encoder: Checkpoint) -> None:
    """The reference: one text at a time without padding, mean over its states, length 1, in NumPy."""
    import torch

    from edgeslm.stages.classifier import load_encoder
    from edgeslm.stages.networks import PooledClassifier

    model = load_encoder(encoder)
    tokenizer = encoder.tokenizer()
    ids = [tokenizer.encode(text) for text in ("the ship", "flour and yeast and dough", "wind")]
    wanted = []
    for row in ids:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row])).last_hidden_state[0].numpy()
        mean = states.mean(0)
        wanted.append(mean / np.sqrt((mean**2).sum()))
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        found = PooledClassifier(model, 3).features(padded, mask)
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-6)


@pytest.mark.parametrize("classes", [LABELS, LABELS[:2]])
def test_the_head_is_the_solvers(encoder: Checkpoint, tmp_path: Path, classes: tuple[str, ...]) -> None:
    """Probabilities of the saved module against scikit-learn's own predict_proba, two classes or more."""
    import torch
    from sklearn.linear_model import LogisticRegression

    from edgeslm.progress import Quiet
    from edgeslm.stages.classifier import load_classifier
    from edgeslm.stages.head import encode
    from edgeslm.stages.labelled import TextExamples, collate_texts

    made, heldout = build(encoder, tmp_path, classes)
    module, labels, _ = load_classifier(resolve(str(made.path)))
    assert labels == classes
    collate, train = collate_texts(0), TextExamples.open(tmp_path / "train")
    chosen = json.loads((made.path / "training.json").read_text())["C"]
    features = encode(module, train, collate, Quiet())
    reference = LogisticRegression(C=chosen, max_iter=1000).fit(features, train.labels)
    batch = collate([heldout[index] for index in range(len(heldout))])
    with torch.no_grad():
        found = module(batch["input_ids"], batch["attention_mask"]).softmax(-1)
        wanted = reference.predict_proba(module.features(batch["input_ids"], batch["attention_mask"]))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_it_learns_and_says_how_well(encoder: Checkpoint, tmp_path: Path) -> None:
    made, heldout = build(encoder, tmp_path)
    record = json.loads((made.path / "training.json").read_text())
    assert record["heldout"]["examples"] == len(heldout)
    assert record["heldout"]["accuracy"] > 0.9
    assert record["heldout"]["log_loss"] < 0.4
    assert (record["method"], record["trained_parameters"], record["examples"]) == ("head-only", 99, 120)
    note = json.loads((made.path / "edgeslm.json").read_text())
    assert (note["kind"], note["stage"]) == ("pooled", "finetune")
    assert made.config()["id2label"] == {"0": "bread", "1": "sea", "2": "sky"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made.path / name).read_bytes() == (encoder.path / name).read_bytes()


def test_a_decoder_gives_features_too(tmp_path: Path) -> None:
    from edgeslm.stages.classifier import load_classifier
    from tests.models import write_hf_model

    decoder = resolve(str(write_hf_model(tmp_path / "tiny-llama", "llama")))
    made, _ = build(decoder, tmp_path)
    module, labels, _ = load_classifier(resolve(str(made.path)))
    assert labels == LABELS
    assert module.head.weight.shape == (3, 64)


def test_two_examples_of_a_class_and_one_are_enough() -> None:
    from edgeslm.stages.head import fit_head

    features = np.eye(5, dtype=np.float32)
    for labels, chosen in (([0, 0, 1, 1, 1], None), ([0, 1, 1, 1, 1], 1.0)):
        weight, bias, facts = fit_head(features, np.array(labels), 2, seed=0)
        assert weight.shape == (2, 5)
        assert ((features @ weight.T + bias).argmax(1) == labels).all() or chosen == 1.0
        assert chosen in (None, facts["C"])


def test_a_class_without_examples_is_refused() -> None:
    from edgeslm.stages.head import fit_head

    with pytest.raises(DataError, match="1 of 3 classes have no training example"):
        fit_head(np.eye(4, dtype=np.float32), np.array([0, 0, 2, 2]), 3, seed=0)


def test_a_head_that_is_gone_or_does_not_fit_is_named(encoder: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages.classifier import load_classifier

    made, _ = build(encoder, tmp_path)
    config = json.loads((made.path / "config.json").read_text())
    changed = {**config, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (made.path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"head\.safetensors does not fit"):
        load_classifier(resolve(str(made.path)))
    (made.path / "head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"head\.safetensors is missing"):
        load_classifier(resolve(str(made.path)))
