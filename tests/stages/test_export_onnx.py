"""ONNX files against torch: every kind of classifier, any batch and length, and what must be refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bundle import write_bundle
from edgeslm.errors import ModelError
from edgeslm.onnx_file import read_onnx
from edgeslm.runtime.ort import OrtClassifier, normalized
from edgeslm.stages.checkpoint import Checkpoint
from edgeslm.stages.export_onnx import (
    Exported,
    Traced,
    describe,
    padded,
    plain_tokenizer,
    prove,
    run,
    text_limit,
    to_onnx,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LABELS = ("ham", "spam", "other")
WORDS = ("win", "money", "now", "meeting", "at", "noon", "hello", "a", "b", "c", "d", "e", "f", "g")
TEXTS = ["win money now", "meeting at noon", "", "hello " * 80, "now", "a b c d e f g"]
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0,
    "id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
}


def tokenizer(pad: int = 0) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", *WORDS]
    if pad:
        words[0], words[pad] = words[pad], words[0]
    held = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    held.pre_tokenizer = pre_tokenizers.Whitespace()
    held.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", words.index("[CLS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=held, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint(path=path, kind="hf", name=path.name, source=str(path))


def hf_classifier(path: Path, family: str, **changes: Any) -> Any:
    """A random sequence classifier of transformers in `path`; returns it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5
    model.save_pretrained(path)
    tokenizer(config.pad_token_id).save_pretrained(path)
    return model


def bundle_of(exported: Exported, out: Path) -> Any:
    manifest = {
        "name": "x", "task": "text-classification", "format": "onnx", "weights": exported.path.name,
        "model": exported.model, "quantization": exported.plan,
    }  # fmt: skip
    return write_bundle(out, files=exported.files, manifest=manifest)


def by_torch(model: Any, texts: list[str], limit: int, held: Any) -> np.ndarray:
    """Probabilities of each text alone: no padding anywhere."""
    rows = []
    for text in texts:
        tokens = held(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        rows.append(torch.softmax(getattr(output, "logits", output).double(), -1)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_classifier_of_every_kind(family: str, tmp_path: Path) -> None:
    """Encoders and decoders, sliding windows and soft caps, padded on the device and alone in torch."""
    model = hf_classifier(tmp_path / "hf", family)
    exported = run(checkpoint(tmp_path / "hf"), tmp_path / "out" / "model.onnx")
    assert exported.model["labels"] == list(LABELS)
    limit = exported.model["preprocessing"]["max_tokens"]
    assert limit == (38 if family == "roberta" else 40)
    classifier = OrtClassifier(bundle_of(exported, tmp_path / "bundle"), threads=1)
    found = classifier.predict_texts(TEXTS, batch=4)
    expected = by_torch(model, TEXTS, limit, tokenizer(model.config.pad_token_id))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 0.01  # the model does tell these texts apart


def test_facts_and_plan(tmp_path: Path) -> None:
    model = hf_classifier(tmp_path / "hf", "bert")
    exported = run(checkpoint(tmp_path / "hf"), tmp_path / "model.onnx", max_tokens=16)
    assert exported.model["preprocessing"] == {"kind": "text", "max_tokens": 16, "pad_id": 0}
    assert exported.model["inputs"] == [
        {"name": name, "type": "I64", "shape": ["batch", "sequence"]}
        for name in ("input_ids", "attention_mask")
    ]
    assert exported.model["outputs"] == [{"name": "logits", "type": "F32", "shape": ["batch", 3]}]
    assert (exported.model["architecture"], exported.model["opset"]) == ("bert", 17)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert exported.model["parameters"] == pytest.approx(count, rel=0.01)
    assert exported.plan["types"]["F32"]["bytes"] == 4 * exported.plan["types"]["F32"]["parameters"]
    assert exported.plan["scheme"] == "F32"
    assert set(exported.files) == {"model.onnx", "tokenizer.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.onnx", "tokenizer.json"]
    held = read_onnx(exported.path)
    assert held.inputs == ("input_ids", "attention_mask")
    assert sum(each.nbytes for each in held.tensors.values()) == sum(
        of["bytes"] for of in exported.plan["types"].values()
    )
    json.dumps([exported.plan, exported.model], allow_nan=False)


def test_same_model_same_bytes(tmp_path: Path) -> None:
    hf_classifier(tmp_path / "hf", "llama")
    one, other = (run(checkpoint(tmp_path / "hf"), tmp_path / name / "model.onnx") for name in "ab")
    assert one.path.read_bytes() == other.path.read_bytes()
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_weights_in_half_precision_become_float32(tmp_path: Path) -> None:
    hf_classifier(tmp_path / "hf", "bert").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    exported = run(checkpoint(tmp_path / "hf"), tmp_path / "model.onnx")
    assert not {"F16", "BF16"} & set(exported.plan["types"])


def test_an_encoder_with_a_head(tmp_path: Path) -> None:
    """Mean of the states that are no padding, normalized, one linear layer: by hand."""
    from safetensors.torch import save_file

    model = hf_classifier(tmp_path / "hf", "bert")
    encoder = model.bert.eval()
    encoder.save_pretrained(tmp_path / "hf")
    head = torch.nn.Linear(32, 3)
    save_file(dict(head.state_dict()), tmp_path / "hf" / "head.safetensors")
    (tmp_path / "hf" / "edgeslm.json").write_text(json.dumps({"kind": "pooled"}))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"id2label": dict(enumerate(LABELS))}))
    exported = run(checkpoint(tmp_path / "hf"), tmp_path / "model.onnx", max_tokens=20)

    def pooled(input_ids: Any, attention_mask: Any) -> Any:
        states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)
        return head(states / states.norm(dim=-1, keepdim=True))

    found = OrtClassifier(bundle_of(exported, tmp_path / "bundle"), threads=1).predict_texts(TEXTS)
    np.testing.assert_allclose(found, by_torch(pooled, TEXTS, 20, tokenizer()), atol=1e-5)


@pytest.mark.parametrize("network", ["gru", "lstm"])
def test_a_recurrent_student(network: str, tmp_path: Path) -> None:
    from edgeslm.stages import students

    torch.manual_seed(0)
    student = students.RecurrentClassifier(
        vocabulary=64, embedding=6, units=5, layers=2, labels=LABELS, network=network
    ).eval()
    students.save(student, tmp_path / "student")
    tokenizer().save_pretrained(tmp_path / "student")
    exported = run(checkpoint(tmp_path / "student"), tmp_path / "model.onnx", max_tokens=32)
    classifier = OrtClassifier(bundle_of(exported, tmp_path / "bundle"), threads=1)
    for batch in (1, 2, 6):
        found = classifier.predict_texts(TEXTS, batch=batch)
        np.testing.assert_allclose(found, by_torch(student, TEXTS, 32, tokenizer()), atol=2e-6)


@pytest.mark.parametrize(("network", "rows"), [("gru", 12), ("lstm", 7), ("gru", 1)])
def test_a_sensor_network(network: str, rows: int, tmp_path: Path) -> None:
    from edgeslm.stages import sensor_net
    from edgeslm.stages.normalization import Normalization

    normalization = Normalization(
        kind="standard", channels=("rms", "kurtosis"), center=(1.0, -2.0), scale=(0.5, 3.0)
    )
    config = sensor_net.SensorConfig(
        network=network, units=6, layers=2, channels=("rms", "kurtosis"), labels=("failure", "normal"), rows=rows,
        stride=3, normalization=normalization.as_record(), max_missing=0.2,
        class_shares={"failure": 0.1, "normal": 0.9},
    )  # fmt: skip
    net = sensor_net.create(config, seed=1).eval()
    sensor_net.save(net, tmp_path / "net")
    exported = run(checkpoint(tmp_path / "net"), tmp_path / "model.onnx")
    assert exported.files.keys() == {"model.onnx"}
    assert exported.model["preprocessing"]["stride"] == 3
    assert exported.model["class_shares"] == {"failure": 0.1, "normal": 0.9}
    assert exported.model["inputs"][0]["shape"] == ["batch", rows, 2]
    readings = np.random.default_rng(0).standard_normal((9, rows, 2)) * 4
    readings[2, 0, 1] = readings[3, rows // 2 :, 0] = np.nan
    prepared = normalization.apply(readings)
    np.testing.assert_allclose(
        normalized(readings, normalization.as_record()), prepared, rtol=1e-6, atol=1e-6
    )
    with torch.no_grad():
        expected = torch.softmax(net(torch.from_numpy(prepared)).double(), -1).numpy()
    classifier = OrtClassifier(bundle_of(exported, tmp_path / "bundle"), threads=1)
    for batch in (1, 4, 9):
        np.testing.assert_allclose(classifier.predict_readings(readings, batch=batch), expected, atol=2e-6)


# --- what the proof is for ---


def tiny(module: Any, labels: tuple[str, ...] = LABELS) -> Traced:
    rows = [[5, 6, 7, 8, 9], [5, 6, 7], [9]]
    return Traced(
        module=module, labels=labels, preprocessing={"kind": "text", "max_tokens": 9, "pad_id": 0},
        probe=padded(rows, 0), axes={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")},
    )  # fmt: skip


class Mean(torch.nn.Module):  # type: ignore[misc]
    """Mean of the tokens' vectors; `masked`: of those that are no padding."""

    def __init__(self, masked: bool, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 3)
        self.masked, self.frozen = masked, frozen

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        inside = (
            attention_mask[..., None].float() if self.masked else torch.ones_like(attention_mask)[..., None]
        )
        total = (self.embed(input_ids) * inside).sum(1)
        return self.head(total / (input_ids.shape[1] if self.frozen else inside.sum(1)))


def test_a_module_that_heeds_the_mask_passes() -> None:
    traced = tiny(Mean(masked=True))
    data = to_onnx(traced, "x")
    prove(data, traced, "x")
    plan, interface = describe(data)
    assert plan["types"]["F32"]["parameters"] == 16 * 8 + 3 * 8 + 3
    assert interface["opset"] == 17


def test_a_module_that_reads_the_padding_is_refused() -> None:
    for module in (Mean(masked=False), Mean(masked=True, frozen=True)):
        traced = tiny(module)
        with pytest.raises(ModelError, match="computes something else"):
            prove(to_onnx(traced, "x"), traced, "x")


def test_a_weight_that_was_changed_is_found() -> None:
    traced = tiny(Mean(masked=True))
    data = to_onnx(traced, "x")
    bias = traced.module.head.bias.detach().numpy().tobytes()
    assert bias in data
    with pytest.raises(ModelError, match="computes something else"):
        prove(data.replace(bias, np.ones(3, np.float32).tobytes()), traced, "x")


def test_labels_that_are_not_as_many_as_scores() -> None:
    traced = tiny(Mean(masked=True), labels=("a", "b"))
    with pytest.raises(ModelError, match="3 scores for 2 labels"):
        prove(to_onnx(traced, "x"), traced, "x")


def test_an_operation_that_onnx_has_not() -> None:
    class Odd(torch.nn.Module):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return torch.special.bessel_j0(input_ids.float())[:, :3]

    with pytest.raises(ModelError, match="can't export it to ONNX"):
        to_onnx(tiny(Odd()), "x")


def test_nothing_is_left_where_the_export_fails(tmp_path: Path) -> None:
    hf_classifier(tmp_path / "hf", "bert")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"hidden_act": "nonsense"}))
    with pytest.raises(ModelError):
        run(checkpoint(tmp_path / "hf"), tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


# --- small parts ---


@pytest.mark.parametrize(
    ("config", "tokenizer_limit", "asked", "limit"),
    [({}, 1e30, None, 512), ({"max_position_embeddings": 128}, 1e30, None, 128), ({}, 64, None, 64),
     ({"max_position_embeddings": 8192}, 1e30, None, 512), ({"max_position_embeddings": 8192}, 1e30, 2048, 2048),
     ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, 1e30, None, 512),
     ({"max_position_embeddings": 512}, 512, 4096, 512)],
)  # fmt: skip
def test_text_limit(config: dict[str, Any], tokenizer_limit: float, asked: int | None, limit: int) -> None:
    assert text_limit(config, tokenizer_limit, asked) == limit


def test_padded() -> None:
    ids, mask = padded([[5, 6], [7]], 3)
    assert ids.tolist() == [[5, 6], [7, 3]]
    assert mask.tolist() == [[1, 1], [1, 0]]


def test_the_tokenizer_neither_pads_nor_cuts() -> None:
    from tokenizers import Tokenizer

    held = tokenizer().backend_tokenizer
    held.enable_padding(length=50)
    held.enable_truncation(4)
    plain = Tokenizer.from_str(plain_tokenizer(held))
    assert len(plain.encode("win money now meeting at noon").ids) == 7
    assert held.padding is not None
