"""edgeslm.prediction held against published runs, and its arithmetic against closed forms."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click.testing import CliRunner

from edgeslm import console_fit, prediction
from edgeslm.bundle import write_bundle
from edgeslm.device import Device, list_devices, load_device
from edgeslm.device_commands import fit
from edgeslm.errors import GateError, ModelError, RecipeError
from edgeslm.footprint import shape_of_config
from edgeslm.gguf_file import GGML_TYPES, read_gguf
from edgeslm.safetensors_file import read_checkpoint
from edgeslm.workload import Model, Part, Workload, decoder_tensors, in_scheme, read_model
from tests.models import write_hf_model

TABLE = tomllib.loads((Path(__file__).parent / "data/published_runs.toml").read_text(encoding="utf-8"))
MIXTURES = {"Q6_K": ("Q6_K", "Q6_K"), "Q5_K_M": ("Q6_K", "Q5_K")}
"""Types of the embedding and of the blocks, for models of which only the sums are told."""


@cache
def published_workload(name: str, scheme: str) -> Workload:
    """A published model in a scheme, out of the configuration in the table."""
    config = TABLE["models"][name]
    shape = shape_of_config(config)
    if "parameters" not in config:
        tensors = decoder_tensors(shape, tied=config["tie_word_embeddings"])
        model = Model(name=name, path=Path(name), shape=shape, architecture=None, own=None, tensors=tensors)
        return in_scheme(model, scheme, importance=False)
    embedding = config["vocab_size"] * config["hidden_size"]
    sizes = {"embedding": embedding, "block": config["parameters"] - embedding}
    parts = tuple(
        Part(role=role, type=kind, parameters=size, nbytes=round(size * GGML_TYPES[kind].bits / 8))  # type: ignore[arg-type]
        for (role, size), kind in zip(sizes.items(), MIXTURES[scheme], strict=True)
    )
    return Workload(
        name=name, format="gguf", scheme=scheme, shape=shape, parts=parts,
        file_bytes=sum(part.nbytes for part in parts),
    )  # fmt: skip


def errors(kind: str, use: set[str]) -> dict[str, float]:
    """Relative error of each counted run, signed: positive where the prediction is too fast."""
    found = {}
    for index, run in enumerate(TABLE["runs"]):
        if run["use"] not in use or kind not in run:
            continue
        work, device = published_workload(run["model"], run["scheme"]), load_device(run["device"])
        if not run.get("packed", True):
            device = dataclasses.replace(device, prefill_family_ops_per_s={})
        if kind == "decode":
            # llama-bench decodes on an empty cache; a chat on what it was asked.
            before = 0 if run["prompt_tokens"] == 512 else run["prompt_tokens"]
            seconds = prediction.decode_s(work, device, before + run["decode_tokens"] // 2)
            assert seconds is not None
            predicted = 1 / seconds
        else:
            seconds = prediction.prefill_s(work, device, run["prompt_tokens"])
            assert seconds is not None
            predicted = run["prompt_tokens"] / seconds
        name = f"{index}: {run['device']} {run['model']} {run['scheme']}"
        found[name] = predicted / run[kind] - 1
    return found


# -------------------------------------------------------------------------------- published runs


@pytest.mark.parametrize(("kind", "most"), [("decode", 0.10), ("prefill", 0.20)])
@pytest.mark.parametrize("use", ["fit", "held"])
def test_median_error_on_published_runs(kind: str, most: float, use: str) -> None:
    found = errors(kind, {use})
    assert len(found) >= 15
    assert median(map(abs, found.values())) <= most, found


@pytest.mark.parametrize(("kind", "most"), [("decode", 0.10), ("prefill", 0.20)])
def test_median_error_on_each_board_that_others_measured(kind: str, most: float) -> None:
    found = errors(kind, {"held"})
    for board in ("rpi4", "rpi5"):
        of_board = [abs(error) for name, error in found.items() if f" {board}-" in name]
        assert len(of_board) >= 3
        assert median(of_board) <= most


def test_nine_runs_in_ten_lie_in_the_band() -> None:
    inside = []
    for kind in ("decode", "prefill"):
        for name, error in errors(kind, {"fit", "held"}).items():
            device = load_device(name.split()[1])
            spread = device.decode_spread if kind == "decode" else device.prefill_spread
            spread = spread or prediction.DEFAULT_SPREAD
            inside.append(1 / (1 + spread) - 1 <= error <= spread)
    assert sum(inside) / len(inside) >= 0.9


def test_every_run_has_a_source_and_an_uncounted_one_a_reason() -> None:
    for run in TABLE["runs"]:
        assert len(run["source"]) > 10
        assert run["model"] in TABLE["models"]
        assert run["use"] in {"fit", "held", "old"}
        assert run["use"] != "old" or run["note"]


@pytest.mark.parametrize(
    ("name", "scheme", "mebibytes"),
    [
        # What llama-bench prints for these files, which hold their metadata besides.
        ("qwen2.5-0.5b", "Q4_0", 330.95),
        ("tinyllama-1.1b", "Q4_K_M", 636.18),
        ("llama3.2-3b", "Q4_K_M", 1.87 * 1024),
        ("llama2-7b", "Q4_0", 3.56 * 1024),
        ("llama2-7b", "Q8_0", 6.67 * 1024),
    ],
)
def test_planned_sizes_are_those_of_published_files(name: str, scheme: str, mebibytes: float) -> None:
    assert published_workload(name, scheme).file_bytes / 2**20 == pytest.approx(mebibytes, rel=0.01)


# ------------------------------------------------------------------------------------ arithmetic


def board(**changes: Any) -> Device:
    """A device on which a byte takes a nanosecond and an operation a tenth of one."""
    values: dict[str, Any] = {
        "memory_bandwidth_bytes_per_s": 1e9, "layer_overhead_s": 0.0, "prefill_ops_per_s": 1e10,
        "prefill_family_ops_per_s": {}, "storage_bytes_per_s": 1e8, "memory_bytes": 2**30,
        "memory_system_bytes": 0, "decode_spread": 0.25, "prefill_spread": 0.5,
    }  # fmt: skip
    return dataclasses.replace(load_device("rpi5-8gb"), **(values | changes))


def work(*, context: int = 0, tied: bool = True, block: str = "F32", **changes: Any) -> Workload:
    """Two layers of 1,000 weights each (F32) and a vocabulary of 500 weights."""
    config = {
        "num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 2, "intermediate_size": 8, "vocab_size": 125, "max_position_embeddings": context or 4096,
    }  # fmt: skip
    parts = [
        Part(role="embedding", type="F32", parameters=500, nbytes=2000),
        Part(role="block", type=block, parameters=2000, nbytes=8000),
    ]
    parts += [] if tied else [Part(role="head", type="F32", parameters=500, nbytes=2000)]
    values: dict[str, Any] = {
        "name": "w", "format": "gguf", "scheme": "F32", "shape": shape_of_config(config | changes),
        "file_bytes": sum(part.nbytes for part in parts), "parts": tuple(parts),
    }  # fmt: skip
    return Workload(**values)


def test_decode_reads_every_weight_and_the_cache_once() -> None:
    # 8,000 bytes of blocks, 2,000 of the head; a cell is 2 layers x 1 head x (2 + 2) x 2 bytes
    assert prediction.decode_s(work(), board(), 0) == pytest.approx(10_000e-9)
    assert prediction.decode_s(work(), board(), 100) == pytest.approx(10_000e-9 + 100 * 16e-9)
    assert prediction.decode_s(work(tied=False), board(), 0) == pytest.approx(10_000e-9), (
        "embedding looked up"
    )
    assert prediction.decode_s(work(), board(layer_overhead_s=1e-3), 0) == pytest.approx(10_000e-9 + 2e-3)
    assert prediction.decode_s(work(), board(memory_bandwidth_bytes_per_s=None), 0) is None


def test_decode_takes_as_long_as_multiplying_where_that_is_slower() -> None:
    slow = board(prefill_family_ops_per_s={"codebook": 1e8}, instruction_sets=("neon",))
    assert prediction.decode_s(work(block="IQ4_NL"), slow, 0) == pytest.approx(2 * 2000 / 1e8 + 2000e-9)


def test_a_sliding_window_is_read_no_further() -> None:
    windowed = work(model_type="gemma2", sliding_window=64)  # every other layer
    assert prediction.decode_s(windowed, board(), 100) == pytest.approx(10_000e-9 + (64 + 100) * 8e-9)


def test_prefill_multiplies_the_blocks_for_every_token_and_the_head_once() -> None:
    tokens = 100
    cell = 2 * 2 * (2 + 2)  # multiplications and additions of two heads with a key and a value
    attention = cell * sum(range(tokens)) * 2
    expected = tokens * 2 * 2000 / 1e10 + 2000e-9 + attention / (prediction.ATTENTION_RATE * 1e10)
    found = prediction.prefill_s(work(), board(memory_bandwidth_bytes_per_s=1e9), tokens)
    assert found == pytest.approx(expected, rel=0.02)


def test_a_short_prompt_takes_as_long_as_reading_the_weights() -> None:
    assert prediction.prefill_s(work(), board(), 1) == pytest.approx(10_000e-9, rel=0.01)


def test_experts_count_by_the_share_that_a_token_uses() -> None:
    part = Part(role="block", type="F32", parameters=2000, nbytes=8000, active=0.25)
    mixture = dataclasses.replace(work(), parts=(part,))
    assert prediction.decode_s(mixture, board(), 0) == pytest.approx(2_000e-9)
    assert mixture.weight_bytes == 8000


@pytest.mark.parametrize(
    ("kind", "sets", "measured", "expected"),
    [
        ("Q4_0", ("neon",), {"repacked": 2.0}, "plain"),
        ("Q4_0", ("neon", "dotprod"), {"repacked": 2.0}, "repacked"),
        ("Q4_0", ("neon", "dotprod"), {}, "plain"),
        ("Q4_K", ("avx2",), {"repacked_k": 2.0}, "repacked_k"),
        ("Q6_K", ("avx2",), {"repacked_k": 2.0}, "plain"),
        ("Q8_0", ("avx2",), {"eight_bit": 2.0}, "eight_bit"),
        ("IQ4_XS", ("neon", "dotprod"), {"repacked": 2.0}, "codebook"),
        ("F16", ("neon", "dotprod"), {"repacked": 2.0}, "plain"),
    ],
)
def test_family(kind: str, sets: tuple[str, ...], measured: dict[str, float], expected: str) -> None:
    device = board(instruction_sets=sets, prefill_family_ops_per_s=measured)
    assert prediction.family(kind, device) == expected
    if expected.startswith("repacked"):
        assert prediction.family(kind, dataclasses.replace(device, accelerator="metal")) == "plain"


def test_verdict_turns_at_the_free_memory() -> None:
    needed = sum(part or 0 for part in prediction.memory_bytes(work(), 256).values())
    verdicts = []
    for free in (needed - 1, needed, round(needed / 0.9) + 1):
        found = prediction.predict(work(), board(memory_bytes=free), context=256, prompt_tokens=8)
        assert found["fits"] == (free >= needed)
        verdicts.append(found["verdict"])
    assert verdicts == ["no", "tight", "yes"]
    assert prediction.free_bytes(board(memory_system_bytes=None)) == 2**30 - round(0.2 * 2**30)


def test_band_and_load() -> None:
    found = prediction.predict(work(), board(), context=256, prompt_tokens=8)
    rate = found["decode_tokens_per_s"]
    assert rate["low"] == pytest.approx(rate["value"] / 1.25)
    assert rate["high"] == pytest.approx(rate["value"] * 1.25)
    assert found["ttft_s"]["high"] == pytest.approx(found["ttft_s"]["value"] * 1.5)
    assert found["load_s"] == pytest.approx(10_000 / 1e8)
    bare = board(memory_bandwidth_bytes_per_s=None, storage_bytes_per_s=None)
    found = prediction.predict(work(), bare, context=256, prompt_tokens=8)
    assert [found[key] for key in ("load_s", "ttft_s", "decode_tokens_per_s")] == [None] * 3


# --------------------------------------------------------------------------------- whole records


def test_fit_of_a_file_on_one_device(tiny_gguf: Path) -> None:
    record = prediction.fit(tiny_gguf, "rpi5-8gb", context=256)
    assert record["schema"] == "edgeslm.fit/1"
    (device,) = record["devices"]
    (found,) = device["schemes"]
    tensors = read_gguf(tiny_gguf).tensors.values()
    assert found["memory"]["weights_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert found["file_bytes"] == tiny_gguf.stat().st_size
    assert found["memory"]["total_bytes"] == sum(
        found["memory"][key] for key in ("weights_bytes", "kv_cache_bytes", "compute_bytes", "runtime_bytes")
    )
    prediction.raise_for_fit(record)
    text = console_fit.fit_text(record)
    assert "fits" in text
    assert text.isascii()


def test_fit_of_all_devices_and_schemes(tiny_gguf: Path) -> None:
    record = prediction.fit(tiny_gguf)
    assert [one["device"] for one in record["devices"]] == list_devices()
    schemes = [found["scheme"] for found in record["devices"][0]["schemes"]]
    assert set(schemes) >= {"Q8_0", "Q4_0", "Q4_K_M"}
    assert len(schemes) == len(set(schemes))
    table = console_fit.fit_text(record)
    assert all(name in table for name in list_devices())


def test_fit_in_a_scheme_agrees_with_the_plan_of_the_export(tiny_gguf: Path) -> None:
    record = prediction.fit(tiny_gguf, "rpi4-4gb", scheme="Q8_0")
    (found,) = record["devices"][0]["schemes"]
    assert found["bits_per_weight"] == pytest.approx(8.5, abs=0.5)
    with pytest.raises(RecipeError, match="Q9_0"):
        prediction.fit(tiny_gguf, "rpi4-4gb", scheme="Q9_0")


def onnx_bundle(path: Path, task: str = "causal-lm") -> Path:
    facts = {
        "architecture": "llama", "layers": 2, "kv_heads": 3, "head_dim": 8, "vocab_size": 1000, "context_length": 64,
        "inputs": [{"name": "past_key_values.0.key", "type": "float16", "shape": []}],
    }  # fmt: skip
    types = {"int4": {"tensors": 2, "parameters": 1000, "bytes": 560}}
    write_bundle(
        path, files={"model.onnx": b"graph", "model.onnx.data": b"0" * 560},
        manifest={
            "name": "little", "task": task, "format": "onnx", "weights": "model.onnx", "model": facts,
            "quantization": {"scheme": "int4", "types": types},
        },
    )  # fmt: skip
    return path


def test_fit_of_an_onnx_bundle_reads_its_manifest(tmp_path: Path) -> None:
    record = prediction.fit(onnx_bundle(tmp_path / "b"), "rpi5-8gb", context=100)
    (found,) = record["devices"][0]["schemes"]
    assert found["memory"]["weights_bytes"] == prediction.ONNX_COPIES * 560
    assert found["memory"]["kv_cache_bytes"] == 2 * 3 * (8 + 8) * 100 * 2
    assert found["memory"]["compute_bytes"] is None
    assert found["decode_tokens_per_s"]["high"] / found["decode_tokens_per_s"]["value"] == pytest.approx(1.5)
    assert any("trained for 64" in note for note in record["notes"])
    assert "n/a" in console_fit.fit_text(record)
    with pytest.raises(ModelError, match="no tensors"):
        prediction.fit(tmp_path / "b", "rpi5-8gb", scheme="Q4_0")


def test_a_classifier_gets_no_rates(tmp_path: Path) -> None:
    record = prediction.fit(onnx_bundle(tmp_path / "b", "text-classification"), "rpi5-8gb")
    (found,) = record["devices"][0]["schemes"]
    assert found["fits"]
    assert found["decode_tokens_per_s"] is None


def test_what_does_not_fit_raises_and_names_the_numbers(tiny_gguf: Path, tmp_path: Path) -> None:
    profile = tmp_path / "small.toml"
    profile.write_text(
        'name = "small"\ndescription = "s"\n[cpu]\nmodel = "m"\narchitecture = "aarch64"\ncores = 1\n'
        'source = "s"\n[memory]\nbytes = 16_777_216\nsource = "s"\n'
    )
    record = prediction.fit(tiny_gguf, profile)
    with pytest.raises(GateError, match=r"does not fit small: it needs .* MiB are free") as caught:
        prediction.raise_for_fit(record)
    assert caught.value.exit_code == 1
    assert "nobody has measured the decode and prefill and storage rate" in record["notes"][-1]
    prediction.raise_for_fit(prediction.fit(tiny_gguf))


def test_command_prints_and_exits(tiny_gguf: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(fit, [str(tiny_gguf), "--device", "rpi5-8gb", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["devices"][0]["device"] == "rpi5-8gb"
    done = CliRunner().invoke(fit, [str(tiny_gguf), "--device", "rpi-zero2w", "-c", "9999999"])
    assert isinstance(done.exception, GateError)
    assert "does not fit" in done.stdout


@pytest.mark.workstation
def test_a_hugging_face_directory_is_planned_as_its_file(tmp_path: Path) -> None:
    """The sizes before an export are those of the same model's GGUF file in the same types."""
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    directory = write_hf_model(tmp_path / "hf", "llama")
    model = read_model(directory)
    assert {tensor.name for tensor in model.tensors} >= {"token_embd.weight", "blk.0.attn_v.weight"}
    found = in_scheme(model, "F16")
    assert found.parameters == sum(tensor.parameters for tensor in read_checkpoint(directory).values())
