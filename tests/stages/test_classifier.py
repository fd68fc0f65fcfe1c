"""Classifiers of every kind: what is saved comes back with the same scores, and padding changes none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.specs import FinetuneSpec
from edgeslm.stages.checkpoint import Checkpoint, resolve
from tests.encoders import TOPICS, examples, write_encoder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

LABELS = tuple(TOPICS)
TEXTS = ("the ship in the harbour", "yeast", "wind and rain and thunder with a moon and some clouds of stars")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("transformers")
    return resolve(str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert")))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    return resolve(str(write_hf_model(tmp_path_factory.mktemp("decoder") / "tiny-llama", "llama")))


def save(model: Any, out: Path, parent: Checkpoint) -> Checkpoint:
    from edgeslm.stages.saving import save_model

    return save_model(model, None, out, parent=parent, stage="finetune", spec=FinetuneSpec())


def scores(module: Any, tokenizer: Any, texts: tuple[str, ...]) -> Any:
    """[B, L] logits of a batch that is padded on the right."""
    import torch

    from edgeslm.stages.classifier import pad_token

    ids = [tokenizer.encode(text) for text in texts]
    width = max(map(len, ids))
    padded = torch.tensor([row + [pad_token(tokenizer)] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        return module(padded, mask)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_sequence_classifier_comes_back(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    import torch

    from edgeslm.stages.classifier import load_classifier, new_classifier

    parent = request.getfixturevalue(kind)
    model, new = new_classifier(parent, LABELS, seed=1)
    assert {name.partition(".")[0] for name in new} == {"classifier" if kind == "encoder" else "score"}
    saved = save(model, tmp_path / "out", parent)
    module, labels, tokenizer = load_classifier(resolve(str(saved.path)))
    assert labels == LABELS
    assert not module.training
    found = scores(module, tokenizer, TEXTS)
    assert found.shape == (3, 3)
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(
            found[index : index + 1], scores(module, tokenizer, (text,)), atol=1e-5, rtol=1e-4
        )
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found[:1], wanted, atol=1e-5, rtol=1e-4)
    assert module.get_input_embeddings().weight.shape[0] == module.config.vocab_size


def test_a_gguf_files_decoder_classifies_like_its_directory(decoder: Checkpoint, tmp_path: Path) -> None:
    import torch

    pytest.importorskip("llama_cpp")
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf
    from edgeslm.stages.classifier import load_classifier, new_classifier

    path = export_gguf.run(decoder, QuantizeSpec(scheme="F32"), tmp_path / "m.gguf").path
    parent = resolve(str(path))
    model, new = new_classifier(parent, LABELS, seed=1)
    assert new == ["score.weight"]
    saved = save(model, tmp_path / "out", parent)
    module, labels, tokenizer = load_classifier(saved)
    other, _ = new_classifier(decoder, LABELS, seed=1)
    other.score.load_state_dict(model.score.state_dict())
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        wanted = other(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(module(ids, torch.ones_like(ids)), wanted, atol=1e-4, rtol=1e-4)
    assert labels == LABELS


def test_new_weights_follow_the_seed(encoder: Checkpoint) -> None:
    import torch

    from edgeslm.stages.classifier import new_classifier

    heads = [new_classifier(encoder, LABELS, seed=seed)[0].classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_another_set_of_classes_gets_a_new_head(encoder: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages.classifier import load_classifier, new_classifier

    first = save(new_classifier(encoder, LABELS, seed=1)[0], tmp_path / "three", encoder)
    model, new = new_classifier(first, ("no", "yes"), seed=1)
    assert new == ["classifier.bias", "classifier.weight"]
    _, labels, _ = load_classifier(save(model, tmp_path / "two", first))
    assert labels == ("no", "yes")


def test_log_probabilities_are_in_the_examples_order(encoder: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages.classifier import log_probabilities, new_classifier, pad_token
    from edgeslm.stages.labelled import collate_texts

    tokenizer = encoder.tokenizer()
    data = examples(tmp_path / "x", tokenizer, 70)
    model, _ = new_classifier(encoder, LABELS, seed=1)
    model.train()
    collate = collate_texts(pad_token(tokenizer))
    found = log_probabilities(model, data, collate)
    assert model.training
    model.eval()
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-12)
    for index in (0, 33, 69):
        batch = collate([data[index]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        np.testing.assert_allclose(found[index], logits.log_softmax(-1).detach()[0], atol=1e-5)


@pytest.mark.parametrize(("pad", "eos", "wanted"), [(7, 2, 7), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_the_padding_token_is_found(pad: int | None, eos: int | None, wanted: int) -> None:
    from types import SimpleNamespace

    from edgeslm.stages.classifier import pad_token

    assert pad_token(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == wanted


def test_a_language_model_is_no_classifier(decoder: Checkpoint, encoder: Checkpoint) -> None:
    from edgeslm.stages.classifier import load_classifier

    for checkpoint, name in ((decoder, "LlamaForCausalLM"), (encoder, "BertModel")):
        with pytest.raises(ModelError, match=f"{name} is no classifier.*labelled texts"):
            load_classifier(checkpoint)


def test_a_recurrent_student_is_a_classifier(encoder: Checkpoint, tmp_path: Path) -> None:
    import torch

    from edgeslm.stages import students
    from edgeslm.stages.classifier import load_classifier
    from edgeslm.stages.saving import save_tokenizer

    student = students.RecurrentClassifier(
        vocabulary=87, embedding=4, units=3, layers=1, labels=LABELS
    ).eval()
    students.save(student, tmp_path / "out")
    save_tokenizer(None, tmp_path / "out", parent=encoder)
    module, labels, tokenizer = load_classifier(resolve(str(tmp_path / "out")))
    assert labels == LABELS
    torch.testing.assert_close(scores(module, tokenizer, TEXTS), scores(student, tokenizer, TEXTS))


def test_weights_that_are_missing_are_not_made_up(encoder: Checkpoint, tmp_path: Path) -> None:
    from edgeslm.stages.classifier import load_classifier, new_classifier

    saved = save(new_classifier(encoder, LABELS, seed=1)[0], tmp_path / "out", encoder)
    config = json.loads((saved.path / "config.json").read_text())
    (saved.path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"16 weights are missing or of another shape, first bert\.encoder"):
        load_classifier(resolve(str(saved.path)))
    with pytest.raises(ModelError, match="16 weights are missing"):
        new_classifier(resolve(str(saved.path)), ("no", "yes"), seed=0)
