"""Students: the recurrent classifier against torch's own GRU and LSTM, its ONNX export, and fewer layers."""

from __future__ import annotations

import copy
import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeslm.errors import ModelError  # noqa: E402
from edgeslm.specs import StudentSpec  # noqa: E402
from edgeslm.stages import students  # noqa: E402
from edgeslm.stages.checkpoint import model_directory  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

V, E, U = 50, 6, 5
LENGTHS = (7, 1, 4, 12)


def student(network: str = "gru", layers: int = 2) -> Any:
    torch.manual_seed(0)
    return students.RecurrentClassifier(
        vocabulary=V, embedding=E, units=U, layers=layers, labels=("ham", "spam", "else"), network=network
    ).eval()


def texts(lengths: tuple[int, ...] = LENGTHS, padding: int = 0, pad: int = 0) -> tuple[Any, Any]:
    """[B, S] ids and mask of random texts, padded on the right to the longest and by `padding` more."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths) + padding
    ids, mask = torch.full((len(lengths), width), pad), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(0, V, (length,), generator=generator)
        mask[row, :length] = 1
    return ids, mask


def plain(model: Any, ids: Any) -> Any:
    """[L] logits of one unpadded text, by torch's own bidirectional layers with the same weights."""
    states = model.embed(ids)[None]
    for ahead, behind in zip(model.ahead, model.behind, strict=True):
        layer = type(ahead)(ahead.input_size, U, batch_first=True, bidirectional=True)
        weights = dict(ahead.state_dict())
        weights |= {f"{name}_reverse": tensor for name, tensor in behind.state_dict().items()}
        layer.load_state_dict(weights)
        states = layer(states)[0]
    return model.head(torch.cat([states[0].mean(0), states[0].amax(0)]))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("network", ["gru", "lstm"])
def test_a_padded_batch_equals_each_text_alone(network: str, layers: int) -> None:
    model = student(network, layers)
    ids, mask = texts()
    with torch.no_grad():
        found = model(ids, mask)
        for row, length in enumerate(LENGTHS):
            assert torch.allclose(found[row], plain(model, ids[row, :length]), atol=1e-6)


@pytest.mark.parametrize("network", ["gru", "lstm"])
def test_padding_changes_nothing(network: str) -> None:
    model = student(network)
    with torch.no_grad():
        short, long = model(*texts()), model(*texts(padding=9, pad=17))
    assert torch.allclose(short, long, atol=1e-6)


def test_an_empty_text_has_finite_logits() -> None:
    ids, mask = texts((3, 0))
    assert torch.isfinite(student()(ids, mask)).all()


@pytest.mark.parametrize("network", ["gru", "lstm"])
def test_onnx_export_equals_torch(tmp_path: Path, network: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, path = student(network), tmp_path / "student.onnx"
    names = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
    torch.onnx.export(
        model, texts((5, 3)), str(path), dynamo=False, opset_version=17, output_names=["logits"],
        input_names=list(names), dynamic_axes={**names, "logits": {0: "batch"}},
    )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for lengths in ((1,), (30,), LENGTHS, (2, 64, 3, 9, 33, 1, 8), (5, 3)):
        ids, mask = texts(lengths, padding=2)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            wanted = model(ids, mask).numpy()
        np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("network", ["gru", "lstm"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, network: str) -> None:
    model = student(network)
    students.save(model, tmp_path / "s", max_tokens=256)
    again = students.load(tmp_path / "s")
    assert again.labels == ("ham", "spam", "else")
    assert not again.training
    with torch.no_grad():
        assert torch.equal(model(*texts()), again(*texts()))
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["max_tokens"] == 256
    assert config["parameters"] == model_directory(tmp_path / "s", "s").parameters


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    students.save(student(), tmp_path / "s")
    path = tmp_path / "s" / "config.json"
    config = json.loads(path.read_text())
    for change in ({"units": 7}, {"labels": None}, {"network": "rnn"}, {"model_type": "bert"}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ModelError):
            students.load(tmp_path / "s")


def test_token_vectors_are_the_principal_components() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(V, 9, generator=generator) @ torch.diag(torch.arange(9, 0, -1.0))
    drawn = torch.randn(V, 4, generator=generator)
    narrow = students.narrow_vectors(vectors, drawn).numpy()
    centred = vectors.numpy().astype(np.float64) - vectors.numpy().mean(0)
    left, values, _right = np.linalg.svd(centred, full_matrices=False)
    wanted = left[:, :4] * values[:4]
    wanted /= wanted.std(ddof=1)
    signs = np.sign((wanted * narrow).sum(0))
    np.testing.assert_allclose(narrow * signs, wanted, atol=1e-4)


def test_a_wide_student_keeps_random_columns_beyond_the_teacher() -> None:
    vectors, drawn = torch.randn(V, 3), torch.randn(V, 5)
    wide = students.narrow_vectors(vectors, drawn)
    assert wide.shape == (V, 5)
    assert torch.equal(wide[:, 3:], drawn[:, 3:])
    assert wide[:, :3].std().item() == pytest.approx(1, rel=1e-5)


def test_a_recurrent_student_depends_on_the_seed_alone() -> None:
    spec, vectors = StudentSpec(kind="lstm", embedding=E, units=U), torch.randn(V, 8)
    one = students.recurrent(spec, vectors=vectors, labels=("a", "b"), seed=5)
    torch.rand(3)
    two = students.recurrent(spec, vectors=vectors, labels=("a", "b"), seed=5)
    other = students.recurrent(spec, vectors=vectors, labels=("a", "b"), seed=6)
    assert one.network == "lstm"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("layers", "kept", "wanted"),
    [
        (30, 1, [0]),
        (6, 3, [0, 2, 5]),
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (4, 2, [0, 3]),
        (5, 4, [0, 1, 3, 4]),
    ],
)
def test_layers_are_spread_evenly(layers: int, kept: int, wanted: list[int]) -> None:
    assert students.spread(layers, kept) == wanted


@pytest.mark.parametrize(("layers", "kept"), [(6, 6), (6, 7), (6, 0)])
def test_a_student_has_fewer_layers_than_its_teacher(layers: int, kept: int) -> None:
    with pytest.raises(ModelError, match=f"{kept} of {layers}"):
        students.spread(layers, kept)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "qwen3", "phi3", "olmo2"])
def test_fewer_layers_equal_the_model_with_layers_cut_out(tmp_path: Path, family: str) -> None:
    from tests.models import write_hf_model

    overrides: dict[str, Any] = {}
    if family == "gemma3_text":
        overrides["layer_types"] = ["sliding_attention", "full_attention", *["sliding_attention"] * 2]
    checkpoint = model_directory(write_hf_model(tmp_path / "m", family, layers=4, **overrides), "m")
    model = checkpoint.load()
    fewer, kept = students.smaller(model, 3)
    assert kept == [0, 2, 3] or kept == [0, 1, 3]
    cut = copy.deepcopy(model)
    layers = torch.nn.ModuleList(cut.model.layers[index] for index in kept)
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place
    cut.model.layers = layers
    cut.config.num_hidden_layers = 3
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = cut(input_ids=ids, use_cache=False).logits
        assert torch.allclose(fewer(input_ids=ids, use_cache=False).logits, wanted, atol=1e-5)
    fewer.save_pretrained(tmp_path / "fewer")
    again = model_directory(tmp_path / "fewer", "fewer").load()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids, use_cache=False).logits, wanted, atol=1e-5)


def test_fewer_layers_keep_the_pattern_that_the_exporters_expect(tmp_path: Path) -> None:
    """SmolLM3: every fourth layer has no rotary positions, and evenly spread ones would not fit."""
    from edgeslm.stages import prune, widths
    from tests.models import write_hf_model

    path = write_hf_model(tmp_path / "m", "smollm3", layers=8, no_rope_layer_interval=4)
    model = model_directory(path, "m").load()
    kinds = widths.required_kinds(prune.text_config(model))
    assert students.spread(8, 5) == [0, 2, 4, 5, 7]
    fewer, kept = students.smaller(model, 5, kinds)
    assert (
        [model.config.no_rope_layers[layer] for layer in kept]
        == [1, 1, 1, 0, 1]
        == fewer.config.no_rope_layers
    )
    fits = [
        (sum(min(abs(layer - even) for even in (0, 2, 4, 5, 7)) for layer in chosen), list(chosen))
        for chosen in itertools.combinations(range(8), 5)
        if [model.config.no_rope_layers[layer] for layer in chosen] == [1, 1, 1, 0, 1]
    ]
    nearest = min(distance for distance, _ in fits)
    assert (nearest, kept) in fits


def test_an_encoder_loses_layers_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    fewer, kept = students.smaller(model, 2)
    assert kept == [0, 3]
    cut = copy.deepcopy(model)
    cut.bert.encoder.layer = torch.nn.ModuleList(cut.bert.encoder.layer[index] for index in kept)
    ids, mask = texts()
    with torch.no_grad():
        assert torch.allclose(fewer(ids, mask).logits, cut(ids, mask).logits, atol=1e-6)
    assert model.config.num_hidden_layers == 4
