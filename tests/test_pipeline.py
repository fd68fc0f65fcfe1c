"""The order of the stages, what is skipped and redone, kills at any moment, the gate; and real builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgeslm import console, measuring, pipeline, quantizing
from edgeslm import gate as gate_module
from edgeslm.bundle import open_bundle
from edgeslm.errors import BundleError, EdgeslmError, EngineError, GateError, ModelError, RecipeError
from edgeslm.gguf_file import read_gguf
from edgeslm.inspection import inspect_model
from edgeslm.progress import Quiet
from edgeslm.recipe import load_recipe
from edgeslm.specs import GateSpec
from tests import records

ALL = ["calibrate", "quantize", "evaluate", "bench"]
RECIPE = """
name = "tiny"
task = "causal-lm"
model = "model.gguf"
seed = 3
[data]
calibration = "calibration.txt"
heldout = "heldout.txt"
[calibrate]
tokens = 64
context = 16
[quantize]
scheme = "Q8_0"
[evaluate]
context = 16
[gate]
max_kl_nats = 0.2
[bench]
prompt_tokens = 16
decode_tokens = 8
repetitions = 2
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_gguf: Path) -> Path:
    """A recipe, its texts and a tiny model."""
    (tmp_path / "r").mkdir()
    shutil.copy(tiny_gguf, tmp_path / "r" / "model.gguf")
    (tmp_path / "r" / "calibration.txt").write_text("the cat and the hat " * 40)
    (tmp_path / "r" / "heldout.txt").write_text("and in the hand " * 40)
    (tmp_path / "r" / "r.toml").write_text(RECIPE)
    return tmp_path


def change(folder: Path, before: str, after: str) -> None:
    text = (folder / "r" / "r.toml").read_text()
    assert before in text
    (folder / "r" / "r.toml").write_text(text.replace(before, after))


def build(folder: Path, **options: Any) -> dict[str, Any]:
    return pipeline.build(load_recipe(folder / "r" / "r.toml"), folder / "out", **options)


@dataclass
class Fakes:
    """Stages that only note that they ran; the one named in `fails` writes half a file, then raises."""

    ran: list[str] = field(default_factory=list)
    fails: str = ""
    error: BaseException = field(default_factory=lambda: EngineError("no"))

    def begin(self, name: str, out: Path) -> None:
        self.ran.append(name)
        if self.fails == name:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(b"half")
            raise self.error

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Fakes:
        from edgeslm.bench import child
        from edgeslm.stages import calibrate, export_gguf

        def fake_calibrate(checkpoint: Any, found: Any, spec: Any, out: Path, **_: Any) -> Path:
            self.begin("calibrate", out)
            out.write_text("".join(document.text for document in found) + str(spec))
            return out

        def fake_export(checkpoint: Any, spec: Any, out: Path, **_: Any) -> Any:
            self.begin("quantize" if spec.scheme != "F32" else "reference", out)
            shutil.copy(checkpoint.path, out)
            types = {"Q8_0": {"tensors": 15, "parameters": 100, "bytes": 106}}
            plan = {
                "scheme": spec.scheme,
                "bits_per_weight": 8.5,
                "importance": None,
                "types": types,
                "fallbacks": [],
            }
            model = {"architecture": "llama", "parameters": 100, "context_length": 256, "vocab_size": 265,
                     "tokenizer": "gpt2/smollm", "licence": None, "source": checkpoint.source,
                     "source_sha256": checkpoint.digest}  # fmt: skip
            return export_gguf.Exported(path=out, plan=plan, model=model, warnings=["beware"])

        def fake_measure(artifact: Any, reference: Path, found: Any, **_: Any) -> dict[str, Any]:
            self.begin("evaluate", reference.parent / "half")
            return records.quality()

        def fake_bench(artifact: Path, **_: Any) -> dict[str, Any]:
            self.begin("bench", Path(os.devnull))
            return records.bench()

        monkeypatch.setattr(calibrate, "run", fake_calibrate)
        monkeypatch.setattr(export_gguf, "run", fake_export)
        monkeypatch.setattr(measuring, "measure", fake_measure)
        monkeypatch.setattr(child, "bench_in_subprocess", fake_bench)
        return self

    def again(self) -> list[str]:
        """What ran since the last call."""
        ran, self.ran = self.ran, []
        return ran


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes().install(monkeypatch)


def skipped(result: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in result["stages"] if stage["skipped"]]


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_the_order_and_the_result(folder: Path, fakes: Fakes) -> None:
    result = build(folder)
    assert fakes.ran == ALL
    assert result["schema"] == "edgeslm.build/1"
    assert [stage["name"] for stage in result["stages"]] == ALL
    assert result["gate"] == {"passed": True, "misses": []}
    assert result["warnings"] == ["beware"]
    assert Path(result["report"]).is_file()
    bundle = open_bundle(folder / "out", verify=True)
    assert bundle.manifest is not None
    assert result["bytes"] == bundle.size_bytes
    assert result["quality"]["artifact"]["digest"] == result["bench"]["artifact"]["digest"] == bundle.digest
    assert bundle.manifest["quality"]["kl_nats"] == result["quality"]["kl_nats"]
    assert bundle.manifest["recipe"]["text"] == RECIPE
    assert [entry["path"] for entry in bundle.manifest["files"]] == [
        "README.md",
        "chat_template.jinja",
        "model.gguf",
    ]
    assert {entry["path"] for entry in bundle.manifest["reports"]} == {
        "report.html",
        "report.md",
        "report.json",
    }
    assert json.loads((folder / "out.work" / "result.json").read_text())["bundle"] == str(folder / "out")
    json.dumps(result, allow_nan=False)


def test_a_second_build_skips_everything(folder: Path, fakes: Fakes) -> None:
    first = build(folder)
    fakes.again()
    second = build(folder)
    assert fakes.ran == []
    assert skipped(second) == ALL
    assert [stage["key"] for stage in first["stages"]] == [stage["key"] for stage in second["stages"]]
    assert second["quality"] == first["quality"]


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ("tokens = 64", "tokens = 48", ALL),
        ('scheme = "Q8_0"', 'scheme = "Q4_0"', ["quantize"]),  # the fake export's bytes are the same
        ("[evaluate]\ncontext = 16", "[evaluate]\ncontext = 32", ["evaluate"]),
        ("max_kl_nats = 0.2", "max_kl_nats = 0.1", []),
        ("repetitions = 2", "repetitions = 3", ["bench"]),
        ("seed = 3", "seed = 4", ["evaluate", "bench"]),
    ],
)
def test_a_changed_recipe_redoes_what_depends_on_it(
    folder: Path, fakes: Fakes, before: str, after: str, runs: list[str]
) -> None:
    build(folder)
    fakes.again()
    change(folder, before, after)
    build(folder)
    if before.startswith("tokens"):  # a new matrix, an equal file: nothing after it changed
        runs = ["calibrate", "quantize"]
    assert fakes.again() == runs
    change(folder, after, before)
    build(folder)
    assert fakes.again() == []


def test_changed_data_redoes_its_stage(folder: Path, fakes: Fakes) -> None:
    build(folder)
    fakes.again()
    (folder / "r" / "heldout.txt").write_text("something else")
    build(folder)
    assert fakes.again() == ["evaluate"]
    (folder / "r" / "calibration.txt").write_text("something else")
    build(folder)
    assert fakes.again() == ["calibrate", "quantize"]


def test_another_model_redoes_everything(folder: Path, fakes: Fakes) -> None:
    from tests.conftest import write_tiny_gguf

    build(folder)
    fakes.again()
    write_tiny_gguf(folder / "r" / "model.gguf", seed=1)
    build(folder)
    assert fakes.again() == ALL


def test_force_runs_a_stage_again(folder: Path, fakes: Fakes) -> None:
    build(folder)
    fakes.again()
    build(folder, force=("quantize", "bench"))
    assert fakes.again() == ["quantize", "bench"]
    with pytest.raises(RecipeError) as caught:
        build(folder, force=("quantise",))
    assert "calibrate, quantize, evaluate, bench" in caught.value.hint


def test_a_recipe_without_texts_only_quantizes_and_benches(folder: Path, fakes: Fakes) -> None:
    change(folder, '[data]\ncalibration = "calibration.txt"\nheldout = "heldout.txt"\n', "")
    change(folder, "[gate]\nmax_kl_nats = 0.2\n", "")
    result = build(folder)
    assert fakes.ran == ["quantize", "bench"]
    assert result["quality"] is None
    assert result["gate"] is None


def test_every_nth_document_is_held_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "\n".join(json.dumps({"text": f"row {number}"}) for number in range(8))
    (folder / "r" / "rows.jsonl").write_text(rows)
    change(folder, 'calibration = "calibration.txt"\nheldout = "heldout.txt"',
           'calibration = "rows.jsonl"\nheldout_every = 4')  # fmt: skip
    fakes, seen = Fakes().install(monkeypatch), []
    monkeypatch.setattr(
        measuring, "measure", lambda artifact, reference, found, **_: seen.extend(found) or records.quality()
    )
    build(folder)
    assert [document.text for document in seen] == ["row 3", "row 7"]
    matrix = next((folder / "out.work").glob("calibrate-*/importance.gguf")).read_text()
    assert matrix.startswith("row 0row 1row 2row 4")
    assert fakes.ran == ["calibrate", "quantize", "bench"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "error", [EngineError("out of memory"), KeyboardInterrupt(), OSError(28, "No space left")]
)
def test_a_stage_that_fails_leaves_nothing_half_written(
    folder: Path, fakes: Fakes, name: str, error: BaseException
) -> None:
    fakes.fails, fakes.error = name, error
    with pytest.raises(type(error)):
        build(folder)
    finished = ALL[: ALL.index(name)]
    assert (folder / "out.work").exists() == bool(finished)
    if finished:
        left = visible(folder / "out.work")
        assert [entry.partition("-")[0] for entry in left if entry != "run.jsonl"] == sorted(finished)
        lines = [json.loads(line) for line in (folder / "out.work" / "run.jsonl").read_text().splitlines()]
        assert lines[-1]["event"] == "failed"
        assert lines[-1]["stage"] == name
    fakes.again()
    fakes.fails = ""
    result = build(folder)
    assert skipped(result) == finished
    assert fakes.ran == ALL[len(finished) :]


def test_a_damaged_result_is_made_again(folder: Path, fakes: Fakes) -> None:
    build(folder)
    fakes.again()
    weights = next((folder / "out.work").glob("quantize-*/model.gguf"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    build(folder)
    assert fakes.again() == ["quantize"]
    open_bundle(folder / "out", verify=True)
    next((folder / "out.work").glob("bench-*/stage.json")).write_text("{")
    build(folder)
    assert fakes.again() == ["bench"]


def test_a_model_too_large_for_the_device_is_said(folder: Path, fakes: Fakes) -> None:
    profile = (Path(__file__).resolve().parents[1] / "devices" / "rpi-zero2w.toml").read_text()
    start = profile.index("[memory]")
    before, after = profile[:start], profile[start:]
    after = re.sub(r"(?m)^bytes = .*$", "bytes = 1_048_576", after, count=1)
    (folder / "r" / "small.toml").write_text(before + after)
    assert build(folder)["warnings"] == ["beware"]
    change(folder, "seed = 3", 'seed = 3\ndevice = "small.toml"')
    warnings = build(folder)["warnings"]
    assert len(warnings) == 2
    assert "with 256 tokens of context; rpi-zero2w has 1.00 MiB" in warnings[1]


def test_one_build_at_a_time(folder: Path, fakes: Fakes) -> None:
    from edgeslm.work import open_work

    with (
        open_work(folder / "out.work", frozenset(), Quiet()),
        pytest.raises(EdgeslmError, match="another build"),
    ):
        build(folder)
    build(folder)


def test_a_foreign_directory_is_refused_before_any_work(folder: Path, fakes: Fakes) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError):
        build(folder)
    assert fakes.ran == []
    assert not (folder / "out.work").exists()
    with pytest.raises(BundleError):
        quantizing.quantize(str(folder / "r" / "model.gguf"), folder / "out")


def test_a_missing_model_is_named(folder: Path, fakes: Fakes) -> None:
    (folder / "r" / "model.gguf").unlink()
    with pytest.raises(ModelError, match="no model at"):
        build(folder)
    assert not (folder / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from edgeslm import pipeline
from edgeslm.recipe import load_recipe
from edgeslm.specs import GateSpec
from tests.test_pipeline import Fakes

class Killer(Fakes):
    def begin(self, name, out):
        super().begin(name, out)
        if name == sys.argv[2]:
            if out.parent.is_dir() and not out.is_char_device():
                out.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

with pytest.MonkeyPatch.context() as monkeypatch:
    Killer().install(monkeypatch)
    folder = Path(sys.argv[1])
    pipeline.build(load_recipe(folder / "r" / "r.toml"), folder / "out")
"""


@pytest.mark.parametrize("name", ALL)
def test_a_killed_build_goes_on_where_it_stopped(folder: Path, fakes: Fakes, name: str) -> None:
    root = Path(__file__).resolve().parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), name], cwd=root, check=False)
    assert killed.returncode == -9
    result = build(folder)
    assert skipped(result) == ALL[: ALL.index(name)]
    assert fakes.ran == ALL[ALL.index(name) :]
    hidden = [path.name for path in (folder / "out.work").iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"]
    open_bundle(folder / "out", verify=True)


# --- the gate ---


@pytest.mark.parametrize(
    ("gate", "misses"),
    [
        ({}, None),
        ({"max_kl_nats": 0.0817}, []),
        ({"max_kl_nats": 0.08}, [("max_kl_nats", 0.08, 0.0817, 0.0017)]),
        ({"min_top1_agreement": 0.8731}, []),
        ({"min_top1_agreement": 0.9}, [("min_top1_agreement", 0.9, 0.8731, 0.0269)]),
        ({"max_perplexity_ratio": 1.08}, [("max_perplexity_ratio", 1.08, 1.0817, 0.0017)]),
        ({"max_file_bytes": 1000}, []),
        ({"max_file_bytes": 999}, [("max_file_bytes", 999, 1000, 1)]),
        ({"min_decode_tokens_per_s": 100.0}, [("min_decode_tokens_per_s", 100.0, 89.0, 11.0)]),
        ({"max_peak_rss_bytes": 166_551_551}, [("max_peak_rss_bytes", 166_551_551, 166_551_552, 1)]),
        (
            {"max_kl_nats": 0.08, "max_file_bytes": 999},
            [("max_kl_nats", 0.08, 0.0817, 0.0017), ("max_file_bytes", 999, 1000, 1)],
        ),
    ],
)
def test_the_gate_judges_point_estimates(gate: dict[str, Any], misses: list[Any] | None) -> None:
    verdict = gate_module.judge(GateSpec(**gate), 1000, records.quality(), records.bench())
    if misses is None:
        assert verdict is None
        return
    assert verdict is not None
    assert verdict["passed"] is not bool(misses)
    found = [tuple(miss[key] for key in ("bound", "limit", "value", "by")) for miss in verdict["misses"]]
    assert [miss[0] for miss in found] == [miss[0] for miss in misses]
    for one, other in zip(found, misses, strict=True):
        assert one[1:] == pytest.approx(other[1:])


def test_what_was_not_measured_misses_its_bound() -> None:
    verdict = gate_module.judge(GateSpec(max_kl_nats=1.0, min_decode_tokens_per_s=1.0), 1000, None, None)
    assert verdict == {
        "passed": False,
        "misses": [
            {"bound": "max_kl_nats", "limit": 1.0, "value": None, "by": None},
            {"bound": "min_decode_tokens_per_s", "limit": 1.0, "value": None, "by": None},
        ],
    }


def test_a_missed_gate_keeps_the_bundle_and_raises(folder: Path, fakes: Fakes) -> None:
    change(folder, "max_kl_nats = 0.2", "max_kl_nats = 0.01")
    result = build(folder)
    with pytest.raises(GateError, match=r"mean KL divergence 0\.0817 nats"):
        gate_module.raise_for_gate(result)
    open_bundle(folder / "out", verify=True)
    change(folder, "max_kl_nats = 0.01", "max_kl_nats = 0.1")
    gate_module.raise_for_gate(build(folder))


# --- with the real stages ---


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tiny llama."""
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    from tests.models import write_hf_model

    path = write_hf_model(tmp_path_factory.mktemp("hf") / "tiny-llama", "llama", hidden=96, intermediate=192)
    (path / "LICENSE").write_text("Do what you like.")
    return path


def real_folder(tmp_path: Path, source: Path) -> Path:
    (tmp_path / "r").mkdir(parents=True)
    (tmp_path / "r" / "calibration.txt").write_text("The quick brown fox jumps over 12 lazy dogs. " * 60)
    chat = {
        "messages": [
            {"role": "user", "content": "Is the fox quick?"},
            {"role": "assistant", "content": "Yes, it is."},
        ]
    }
    (tmp_path / "r" / "heldout.jsonl").write_text("\n".join([json.dumps(chat)] * 8))
    text = RECIPE.replace("model.gguf", str(source)).replace("heldout.txt", "heldout.jsonl")
    (tmp_path / "r" / "r.toml").write_text(text)
    return tmp_path


@pytest.mark.workstation
def test_a_real_build_is_whole_measured_and_the_same_each_time(source: Path, tmp_path: Path) -> None:
    first = build(real_folder(tmp_path / "a", source))
    bundle = open_bundle(tmp_path / "a" / "out", verify=True)
    assert (tmp_path / "a" / "out" / "LICENSE").read_text() == "Do what you like."
    assert bundle.manifest is not None
    quality = bundle.manifest["quality"]
    assert 0 < quality["kl_nats"]["mean"]["value"] < 0.01
    assert quality["top1_agreement"]["value"] > 0.9
    assert first["gate"]["passed"]
    assert first["bench"]["memory"]["peak_rss_bytes"] > 0
    assert skipped(build(tmp_path / "a")) == ALL
    second = build(real_folder(tmp_path / "b", source))
    assert open_bundle(tmp_path / "b" / "out").digest == bundle.digest
    assert second["quality"]["kl_nats"] == first["quality"]["kl_nats"]


@pytest.mark.workstation
def test_evaluate_takes_any_reference(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    for scheme in ("F32", "Q8_0", "Q4_0"):
        quantizing.quantize(str(source), tmp_path / f"{scheme}.gguf", scheme=scheme)

    def kl(artifact: str, reference: str) -> float:
        record = pipeline.evaluate(tmp_path / artifact, [str(text)], reference=reference, context=32)
        return float(record["kl_nats"]["mean"]["value"])

    assert kl("F32.gguf", str(source)) == 0
    assert 0 < kl("Q8_0.gguf", str(source)) < kl("Q4_0.gguf", str(source))
    assert kl("Q4_0.gguf", str(source)) == kl("Q4_0.gguf", str(tmp_path / "F32.gguf"))
    # Not 0: with quantized weights llama.cpp quantizes the activations too.
    assert kl("Q4_0.gguf", str(tmp_path / "Q4_0.gguf")) < kl("Q8_0.gguf", str(source)) + 1e-3
    record = pipeline.evaluate(tmp_path / "Q8_0.gguf", [str(text)], context=32)
    assert record["reference"] is None
    assert record["kl_nats"] is None
    assert record["artifact"]["name"] == "Q8_0"
    assert record["text"]["sources"] == [str(text)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "F32.gguf",
        "Q4_0.gguf",
        "Q8_0.gguf",
        "text.txt",
    ]


@pytest.mark.workstation
def test_quantize_writes_a_file_or_a_bundle(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 300)
    made = quantizing.quantize(str(source), tmp_path / "a.gguf", scheme="Q4_0", types={"attn_v": "Q8_0"})
    assert (made["kind"], made["bytes"]) == ("file", (tmp_path / "a.gguf").stat().st_size)
    tensors = read_gguf(tmp_path / "a.gguf").tensors
    assert {info.type for name, info in tensors.items() if "attn_v" in name} == {"Q8_0"}
    weighed = quantizing.quantize(str(source), tmp_path / "b", scheme="Q4_0", calibration=str(text))
    assert (weighed["kind"], weighed["quantization"]["importance"] is None) == ("bundle", False)
    open_bundle(tmp_path / "b", verify=True)
    with pytest.raises(RecipeError, match="matches none"):
        quantizing.quantize(str(source), tmp_path / "c.gguf", types={"no_such": "Q8_0"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b", "text.txt"]


@pytest.mark.workstation
def test_quantize_audits_the_accuracy_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models import write_hf_model

    source, text = tmp_path / "source", tmp_path / "text.txt"
    write_hf_model(source, "llama", hidden=64, heads=4, kv_heads=2, tokenizer="smollm")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 300)

    def traps(bundle: str) -> list[str]:
        return [trap["kind"] for trap in inspect_model(tmp_path / bundle, context=64, verify=False)["traps"]]

    plain = quantizing.quantize(str(source), tmp_path / "plain", format="onnx", scheme="int4")
    assert "not audited" in console.quantize_text(plain)
    assert traps("plain") == ["accuracy_level"]
    monkeypatch.setattr(gate_module, "LEVEL_AGREEMENT", 1.01)
    made = quantizing.quantize(
        str(source), tmp_path / "audited", format="onnx", scheme="int4", calibration=str(text)
    )
    assert [of["level"] for of in made["quantization"]["accuracy_audit"]["levels"]] == [0, 4]
    assert "4, level 0's likeliest token in" in console.quantize_text(made)
    assert "--accuracy-level 0" in made["warnings"][-1]
    assert traps("audited") == []


@pytest.mark.workstation
@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_quantize_takes_an_importance_matrix(source: Path, tmp_path: Path, suffix: str) -> None:
    import numpy as np

    from edgeslm.stages.calibrate import write_importance
    from tests.stages.test_calibrate import write_legacy

    quantizing.quantize(str(source), tmp_path / "plain.gguf", scheme="Q4_0")
    tensors = read_gguf(tmp_path / "plain.gguf").tensors
    random = np.random.default_rng(0)
    means = {
        name: random.random(info.shape[-1]).astype(np.float32)
        for name, info in tensors.items()
        if info.type != "F32"
    }
    path = tmp_path / f"importance.{suffix}"
    if suffix == "dat":
        write_legacy(path, {name: (1, value.tolist()) for name, value in means.items()})
    else:
        write_importance(path, {name: (value, 1) for name, value in means.items()}, windows=1, context=1)
    made = quantizing.quantize(str(source), tmp_path / "weighed.gguf", scheme="Q4_0", calibration=str(path))
    assert made["quantization"]["importance"] is not None
    assert (tmp_path / "weighed.gguf").read_bytes() != (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.workstation
def test_what_a_killed_quantize_left_is_removed(source: Path, tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = subprocess.run(ask, capture_output=True, text=True, check=True)
    left = tmp_path / f".a.gguf.work-{int(dead.stdout)}"
    left.mkdir()
    mine = tmp_path / f".a.gguf.work-{os.getppid()}"
    mine.mkdir()
    quantizing.quantize(str(source), tmp_path / "a.gguf", scheme="Q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "a.gguf"]
