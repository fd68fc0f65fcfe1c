"""Several artifacts of one recipe: what runs once, what is skipped, the gate of each, the folder, the comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgeslm import console, learning, pipeline, variants
from edgeslm import gate as gate_module
from edgeslm.bench.records import load_results, report_document
from edgeslm.bundle import open_bundle
from edgeslm.console_variants import dominated_lines
from edgeslm.errors import BundleError, EngineError, GateError, RecipeError
from edgeslm.recipe import load_recipe
from edgeslm.specs import OnnxSpec, QuantizeSpec, VariantSpec
from tests import records
from tests.conftest import write_tiny_gguf
from tests.test_pipeline import RECIPE, Fakes, skipped

EACH = ["quantize", "evaluate", "bench"]
TWO = """
[[variants]]
name = "small"
scheme = "Q4_0"
[[variants]]
name = "big"
scheme = "Q8_0"
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_gguf: Path) -> Path:
    """A recipe with two variants, its texts and a tiny model."""
    (tmp_path / "r").mkdir()
    shutil.copy(tiny_gguf, tmp_path / "r" / "model.gguf")
    (tmp_path / "r" / "calibration.txt").write_text("the cat and the hat " * 40)
    (tmp_path / "r" / "heldout.txt").write_text("and in the hand " * 40)
    write(tmp_path, TWO)
    return tmp_path


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Fake stages, and weights that differ by scheme."""
    from edgeslm.stages import export_gguf

    made = Fakes().install(monkeypatch)
    export = export_gguf.run

    def export_apart(checkpoint: Any, spec: Any, out: Path, **given: Any) -> Any:
        exported = export(checkpoint, spec, out, **given)
        write_tiny_gguf(out, seed=sum(spec.scheme.encode()))
        return exported

    monkeypatch.setattr(export_gguf, "run", export_apart)
    return made


def write(folder: Path, tables: str) -> None:
    text = RECIPE.replace('[quantize]\nscheme = "Q8_0"\n', "") + tables
    (folder / "r" / "r.toml").write_text(text)


def build(folder: Path, **options: Any) -> dict[str, Any]:
    made = pipeline.build(load_recipe(folder / "r" / "r.toml"), folder / "out", **options)
    assert made is not None
    return made


# --- the recipe ---


def test_a_variant_is_a_name_and_what_quantize_would_hold(folder: Path) -> None:
    write(folder, TWO + '''
[[variants]]
name = "int4"
format = "onnx"
scheme = "int4-int8"
keep_going = true
[variants.onnx]
block = 64
[[variants]]
name = "usual"
format = "onnx"
[[variants]]
name = "mixed"
scheme = "Q4_0"
[variants.types]
"attn_v" = "Q8_0"
''')  # fmt: skip
    found = load_recipe(folder / "r" / "r.toml").variants
    assert found == (
        VariantSpec(name="small", quantize=QuantizeSpec(scheme="Q4_0")),
        VariantSpec(name="big", quantize=QuantizeSpec(scheme="Q8_0")),
        VariantSpec(
            name="int4",
            quantize=QuantizeSpec(
                format="onnx", scheme="int4-int8", keep_going=True, onnx=OnnxSpec(block=64)
            ),
        ),
        VariantSpec(name="usual", quantize=QuantizeSpec(format="onnx", scheme="int4")),
        VariantSpec(name="mixed", quantize=QuantizeSpec(scheme="Q4_0", types=(("attn_v", "Q8_0"),))),
    )


@pytest.mark.parametrize(
    ("tables", "said", "hint"),
    [
        (TWO + '[quantize]\nscheme = "Q8_0"', "both [quantize] and [[variants]]", "keep one of them"),
        (TWO.replace("small", "BIG"), "name = 'big' is taken by another variant", "directory of its name"),
        (TWO.replace("small", "report.html"), "'report.html' is taken by the report", "directory"),
        (TWO.replace('name = "big"\n', ""), "[[variants]] 2: 'name' is missing", "a string"),
        (TWO.replace('"big"', '"../big"'), "[[variants]] 2 name = '../big' is not allowed", "matches"),
        (TWO.replace("Q8_0", "Q9_0"), "[variants.big] scheme = 'Q9_0' is not allowed", "Q8_0"),
        (TWO + "sceme = 1", "[variants.big]: 'sceme' is not a known key", "'scheme'"),
        (TWO + 'format = "onnx"', "[variants.big] scheme = 'Q8_0' is not of the format onnx", "int4"),
        ("[variants]\nname = 'a'", "variants is no list of tables", "[[variants]]"),
        ("[[variants]]\nname = 'a'\nonnx = 3", "[variants.a] onnx = 3 is not allowed", "[onnx] is a table"),
    ],
)
def test_what_is_wrong_with_variants_is_said(folder: Path, tables: str, said: str, hint: str) -> None:
    write(folder, tables)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "r" / "r.toml")
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_a_classifier_s_variants_are_onnx(tmp_path: Path) -> None:
    text = """
name = "mail"
task = "text-classification"
model = "m"
[data]
train = "a.tsv"
[[variants]]
name = "float"
scheme = "F32"
[[variants]]
name = "usual"
"""
    (tmp_path / "r.toml").write_text(text)
    found = load_recipe(tmp_path / "r.toml").variants
    assert [(each.quantize.format, each.quantize.scheme) for each in found] == [
        ("onnx", "F32"),
        ("onnx", "int8-dynamic"),
    ]


# --- the stages ---


def test_what_variants_share_runs_once(folder: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, learn = [], learning.learn
    monkeypatch.setattr(learning, "learn", lambda *given: learned.append(1) or learn(*given))
    result = build(folder)
    assert learned == [1]
    assert fakes.ran == ["calibrate", *EACH, *EACH]
    assert result["schema"] == "edgeslm.variants/1"
    assert [each["name"] for each in result["variants"]] == ["small", "big"]
    assert [stage["name"] for stage in result["stages"]] == ["calibrate", *EACH, "calibrate", *EACH]
    for each in result["variants"]:
        bundle = open_bundle(folder / "out" / each["name"], verify=True)
        assert bundle.name == f"tiny-{each['name']}"
        assert bundle.manifest is not None
        assert bundle.manifest["quantization"]["scheme"] == {"small": "Q4_0", "big": "Q8_0"}[each["name"]]
        assert bundle.manifest["recipe"]["text"] == (folder / "r" / "r.toml").read_text()
        assert [stage["name"] for stage in each["stages"]] == ["calibrate", *EACH]
        assert each["quality"]["artifact"]["digest"] == each["bench"]["artifact"]["digest"] == bundle.digest
        assert Path(each["report"]).is_file()
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "big", "report.html", "report.json", "report.md", "small",
    ]  # fmt: skip
    assert json.loads((folder / "out.work" / "result.json").read_text()) == result
    json.dumps(result, allow_nan=False)


def test_a_second_build_skips_everything(folder: Path, fakes: Fakes) -> None:
    first = build(folder)
    fakes.again()
    second = build(folder)
    assert fakes.ran == []
    assert skipped(second) == ["calibrate", *EACH, "calibrate", *EACH]
    assert second["comparisons"] == first["comparisons"]


@pytest.mark.parametrize(
    ("tables", "runs"),
    [
        (TWO.replace("Q4_0", "Q5_0"), EACH),
        (TWO + '[[variants]]\nname = "more"\nscheme = "Q5_0"', EACH),
        ("[[variants]]" + TWO.split("[[variants]]")[2], []),
        (TWO.replace("small", "tiny"), ["evaluate"]),  # the record of an evaluation has the name
    ],
)
def test_a_changed_variant_leaves_the_others_alone(
    folder: Path, fakes: Fakes, tables: str, runs: list[str]
) -> None:
    build(folder)
    fakes.again()
    write(folder, tables)
    build(folder)
    assert fakes.again() == runs


def test_force_runs_a_shared_stage_once(folder: Path, fakes: Fakes) -> None:
    build(folder)
    fakes.again()
    build(folder, force=("calibrate", "bench"))
    assert fakes.again() == ["calibrate", "bench", "bench"]


def test_an_error_names_its_variant_and_keeps_what_is_whole(folder: Path, fakes: Fakes) -> None:
    write(folder, TWO.replace('"Q8_0"', '"Q8_0"\ntypes = { "no_such" = "Q8_0" }'))
    install = fakes.begin

    def begin(name: str, out: Path) -> None:
        install(name, out)
        if name == "quantize" and fakes.ran.count("quantize") == 2:
            raise EngineError("no such tensor", hint="see inspect")

    fakes.begin = begin  # type: ignore[method-assign]
    with pytest.raises(EngineError) as caught:
        build(folder)
    assert caught.value.message == "variant big: no such tensor"
    assert caught.value.hint == "see inspect"
    open_bundle(folder / "out" / "small", verify=True)
    assert not (folder / "out" / "big").exists()
    fakes.begin = install  # type: ignore[method-assign]
    fakes.again()
    build(folder)
    assert fakes.again() == EACH


# --- the gate ---


def test_the_gate_is_judged_for_each(folder: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeslm import measuring

    kls = iter((0.3, 0.01))
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: records.quality(kl=next(kls)))
    result = build(folder)
    assert [each["gate"]["passed"] for each in result["variants"]] == [False, True]
    assert result["gate"]["passed"] is False
    (miss,) = result["gate"]["misses"]
    assert (miss["variant"], miss["bound"], miss["value"]) == ("small", "max_kl_nats", 0.3)
    with pytest.raises(GateError, match=r"small: mean KL divergence 0\.300 nats is 0\.100 nats over"):
        gate_module.raise_for_gate(result)
    said = console.build_text(result)
    assert "small: mean KL divergence 0.300 nats" in said
    open_bundle(folder / "out" / "small", verify=True)


def test_without_bounds_there_is_no_verdict() -> None:
    assert variants.merged_gate(["a"], [{"gate": None}]) is None
    assert variants.merged_gate(["a", "b"], [{"gate": None}, {"gate": {"passed": True, "misses": []}}]) == {
        "passed": True, "misses": []
    }  # fmt: skip


# --- the folder and the comparison ---


@pytest.mark.parametrize("what", ["file", "bundle", "foreign"])
def test_a_folder_that_is_something_else_is_refused_before_any_work(
    folder: Path, fakes: Fakes, what: str
) -> None:
    out = folder / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "bundle":
        out.mkdir()
        (out / "manifest.json").write_text("{}")
    else:
        (out / "big").mkdir(parents=True)
        (out / "big" / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError):
        build(folder)
    assert fakes.ran == []
    assert not (folder / "out.work").exists()


def test_the_folder_s_report_is_that_of_its_bundles(folder: Path, fakes: Fakes) -> None:
    result = build(folder)
    out = folder / "out"
    of_folder = report_document(load_results([out]))
    of_bundles = report_document(load_results([out / "small", out / "big"]))
    of_record = report_document(load_results([folder / "out.work" / "result.json"]))
    assert [entry["label"] for entry in of_folder["results"]] == ["tiny-small", "tiny-big"]
    assert of_folder == of_record
    assert of_folder["comparisons"] == of_bundles["comparisons"] == result["comparisons"]
    assert json.loads((out / "report.json").read_text()) == of_folder


def test_text_has_a_line_for_each_and_names_the_dominated(folder: Path, fakes: Fakes) -> None:
    result = build(folder)
    said = console.build_text(result).splitlines()
    assert said[0].split()[:3] == ["variant", "size", "bits"]
    assert [line.split()[0] for line in said[2:4]] == ["small", "big"]
    assert str(folder / "out" / "report.html") in said[-1]
    result["comparisons"] = [{"cost": "file_bytes", "loss": "kl_nats", "results": [
        {"label": "tiny-small", "dominated_by": []}, {"label": "tiny-big", "dominated_by": ["tiny-small"]},
    ]}]  # fmt: skip
    assert dominated_lines(result) == ["size against KL divergence: big by small"]


# --- with the real stages ---


@pytest.mark.workstation
def test_real_variants_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    from tests.models import write_hf_model

    source = write_hf_model(tmp_path / "tiny-llama", "llama", hidden=96, intermediate=192)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "calibration.txt").write_text("The quick brown fox jumps over 12 lazy dogs. " * 60)
    (tmp_path / "r" / "heldout.txt").write_text("The lazy dog jumps over the quick brown fox. " * 30)
    write(tmp_path, TWO)
    text = (tmp_path / "r" / "r.toml").read_text().replace("model.gguf", str(source))
    (tmp_path / "r" / "r.toml").write_text(text)
    result = build(tmp_path)
    small, big = result["variants"]
    assert small["bytes"] < big["bytes"]
    assert small["bits_per_weight"] < big["bits_per_weight"]
    assert 0 < big["quality"]["kl_nats"]["mean"]["value"] < small["quality"]["kl_nats"]["mean"]["value"]
    assert small["quality"]["text"]["sha256"] == big["quality"]["text"]["sha256"]
    size = result["comparisons"][0]
    assert (size["cost"], size["loss"]) == ("file_bytes", "kl_nats")
    assert [each["dominated_by"] for each in size["results"]] == [[], []]
    assert skipped(build(tmp_path)) == ["calibrate", *EACH, "calibrate", *EACH]
