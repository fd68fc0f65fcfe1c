"""The first half as a whole: what runs, what is skipped, what a kill leaves, and bundles of every task."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeslm import learning, pipeline
from edgeslm.bundle import open_bundle
from edgeslm.errors import DataError, EdgeslmError, ModelError, RecipeError
from edgeslm.recipe import load_recipe
from edgeslm.specs import PruneSpec, QuantizeSpec

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "max_steps = 3\nbatch_size = 2\ncontext = 32\n"
TEXT = "The bread of the sea is baked in an oven of waves, and the moon sails over the harbour. "


def write(folder: Path, text: str) -> Path:
    (folder / "r.toml").write_text(text, encoding="utf-8")
    return folder / "r.toml"


def build(folder: Path, **options: Any) -> dict[str, Any]:
    result = pipeline.build(load_recipe(folder / "r.toml"), folder / "out", **options)
    assert result is not None
    return result


def ran(result: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in result["stages"] if not stage["skipped"]]


def test_the_vocabulary_is_pruned_apart_as_the_teacher_needs_it_too() -> None:
    assert learning.split_spec(PruneSpec(drop_layers=2)) == (None, PruneSpec(drop_layers=2))
    tokens, rest = learning.split_spec(PruneSpec(vocabulary=True, layers_by="perplexity"))
    assert tokens == PruneSpec(vocabulary=True)
    assert rest is None
    tokens, rest = learning.split_spec(PruneSpec(vocabulary=True, drop_layers=2, multiple=32))
    assert tokens == PruneSpec(vocabulary=True, multiple=32)
    assert rest == PruneSpec(drop_layers=2, multiple=32)


@pytest.mark.workstation
def test_a_target_in_a_recipe_is_of_its_artifact_and_of_the_whole_model(
    language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary is pruned first, apart: shares are of the model before that, bytes of what [quantize] makes."""
    from edgeslm.stages import prune, vocabulary
    from edgeslm.stages.checkpoint import resolve

    kept_ids = vocabulary.kept_ids
    monkeypatch.setattr(vocabulary, "kept_ids", lambda *given: kept_ids(*given, unexpected=1.0))
    given: list[dict[str, Any]] = []
    whole = prune.run
    monkeypatch.setattr(prune, "run", lambda *one, **more: given.append(more) or whole(*one, **more))
    text = (language / "r.toml").read_text()
    start, end = text.index("[finetune.train]"), text.index("[prune]")
    text = text[:start] + text[end:]
    start, end = text.index("[distill.train]"), text.index("[calibrate]")
    text = text[:start] + text[end:]
    before = resolve(str(language / "model")).parameters
    write(language, text.replace("drop_layers = 1", "vocabulary = true\ntarget = 0.6"))
    result = build(language)
    assert (
        result["prune"]["parameters"]["after"]
        <= 0.6 * before
        < result["prune"]["before"]["parameters"]["after"]
    )
    assert [more["tokens_before"] for more in given] == [None, result["prune"]["before"]["tokens"]["before"]]
    assert {more["artifacts"] for more in given} == {(QuantizeSpec(scheme="Q8_0"),)}
    scheme = text.replace("drop_layers = 1", "vocabulary = true\ntarget = 0.6").replace('"Q8_0"', '"F16"')
    write(language, scheme)
    assert "prune" not in ran(build(language))  # a share is of parameters, whatever they become


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    learning.check_writable(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    learning.check_writable(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ModelError, match="choose another name"):
        learning.check_writable(tmp_path / "mine")


@pytest.fixture
def language(tmp_path: Path) -> Path:
    """A recipe that fine-tunes, drops a layer, distils and quantizes a tiny model."""
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    write_hf_model(tmp_path / "model", "llama", tokenizer="smollm", num_hidden_layers=3)
    rows = [
        json.dumps({"text": f"{TEXT} {number} write to me{number}@example.org. " * 4}) for number in range(16)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    write(
        tmp_path,
        'name = "tiny"\ntask = "causal-lm"\nmodel = "model"\nseed = 3\nlicence = "MIT"\n'
        '[data]\ntrain = "train.jsonl"\nheldout_every = 4\nlicence = "CC0-1.0"\n[scrub]\n'
        f"[finetune.train]\n{TRAIN}[prune]\ndrop_layers = 1\n[distill.train]\n{TRAIN}"
        '[calibrate]\ntokens = 64\ncontext = 32\n[quantize]\nscheme = "Q8_0"\n'
        "[evaluate]\ncontext = 32\nmax_tokens = 256\n"
        "[bench]\nprompt_tokens = 16\ndecode_tokens = 8\nrepetitions = 2\n",
    )
    return tmp_path


@pytest.mark.workstation
def test_a_language_model_from_text_to_bundle(language: Path) -> None:
    result = build(language)
    assert ran(result) == [
        "prove",
        "data",
        "finetune",
        "prune",
        "distill",
        "calibrate",
        "quantize",
        "evaluate",
        "bench",
    ]
    assert [one["stage"] for one in result["training"]] == ["finetune", "distill"]
    assert all(math.isfinite(point["loss"]) for one in result["training"] for point in one["curve"])
    assert result["data"]["scrubbed"]["emails"] > 0
    assert len(result["prune"]["dropped_layers"]) == 1
    manifest = open_bundle(language / "out", verify=True).manifest
    assert manifest is not None
    assert manifest["model"]["licence"] == "MIT"
    assert manifest["data"]["licence"] == "CC0-1.0"
    card = (language / "out" / "README.md").read_text()
    assert "| Licence of the data | CC0-1.0 |" in card
    assert "| Made by | finetune, prune, distill, quantize |" in card
    assert result["quality"]["reference"]["name"] == "model after finetune, prune, distill"
    assert manifest["ancestry"]["stage"] == "distill"
    assert manifest["ancestry"]["before"]["before"]["stage"] == "finetune"
    assert manifest["quality"]["kl_nats"]["mean"]["value"] < 0.1
    report = (language / "out" / "report.html").read_text()
    assert "me3@example.org" not in report
    again = build(language)
    assert ran(again) == []
    changed = (language / "r.toml").read_text().replace("drop_layers = 1", "drop_layers = 2")
    write(language, changed)
    assert ran(build(language)) == ["prove", "prune", "distill", "calibrate", "quantize", "evaluate", "bench"]


@pytest.mark.workstation
def test_a_killed_training_goes_on(language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeslm.stages import distill

    whole = distill.run

    def interrupted(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(language)
    assert not (language / "out").exists()
    monkeypatch.setattr(distill, "run", whole)
    assert ran(build(language))[0] == "distill"


@pytest.mark.workstation
@pytest.mark.parametrize(
    ("distill", "error", "message"),
    [
        ('mode = "on-policy"\ncache_top_k = 8', RecipeError, "cache_top_k"),
        ('teacher = "other"', ModelError, "tokenizer"),
        ('student = {kind = "smaller", layers = 3}', ModelError, "3 of 3 layers"),
    ],
)
def test_what_distilling_will_refuse_is_refused_before_anything_is_trained(
    language: Path, distill: str, error: type[EdgeslmError], message: str
) -> None:
    from tests.models import write_hf_model

    write_hf_model(language / "other", "qwen2")
    text = (language / "r.toml").read_text()
    write(language, text.replace("[distill.train]", f"[distill]\n{distill}\n[distill.train]"))
    with pytest.raises(error, match=message):
        build(language)
    assert not list((language / "out.work").glob("finetune-*"))


@pytest.mark.workstation
def test_a_student_of_fewer_layers_is_proven_before_it_is_taught(
    language: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeslm.stages import distill, prune

    text = (language / "r.toml").read_text()
    start, end = text.index("[finetune.train]"), text.index("[distill.train]")
    write(language, f'{text[:start]}[distill.student]\nkind = "smaller"\nlayers = 2\n{text[end:]}')
    proven, taught = [], []

    def refuse(checkpoint: Any, spec: PruneSpec, **_: Any) -> None:
        proven.append(spec)
        raise ModelError("llama.cpp can't hold it")

    monkeypatch.setattr(prune, "prove", refuse)
    monkeypatch.setattr(distill, "run", lambda *_, **__: taught.append(1))
    with pytest.raises(ModelError, match="can't hold"):
        build(language)
    assert proven == [PruneSpec(drop_layers=1)]
    assert not taught


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A recipe that fine-tunes a tiny encoder and distils it into a recurrent network."""
    pytest.importorskip("transformers")
    from tests.encoders import write_encoder

    write_encoder(tmp_path / "encoder")
    rows = ["text\tlabel"]
    for number in range(40):
        rows.append(f"bread of the oven {number}\tfood")
        rows.append(f"the moon over the sea {number}\tsky")
    (tmp_path / "train.tsv").write_text("\n".join(rows))
    write(
        tmp_path,
        'name = "letters"\ntask = "text-classification"\nmodel = "encoder"\nseed = 3\n'
        '[data]\ntrain = "train.tsv"\nheldout_every = 4\n'
        "[finetune.train]\nepochs = 4\nlearning_rate = 3e-3\nbatch_size = 8\ncontext = 32\n"
        "[distill.train]\nepochs = 12\nlearning_rate = 1e-2\nbatch_size = 8\ncontext = 32\n"
        '[distill.student]\nkind = "gru"\nembedding = 8\nunits = 8\n'
        "[decide.prior]\nfood = 0.9\n[gate]\nmin_accuracy = 0.9\n[bench]\nrepetitions = 2\n",
    )
    return tmp_path


@pytest.mark.workstation
def test_a_text_classifier_from_table_to_bundle(letters: Path) -> None:
    result = build(letters)
    assert ran(result) == ["data", "finetune", "distill", "quantize", "evaluate", "bench"]
    assert result["gate"]["passed"], result["gate"]
    assert result["quality"]["protocol"]["examples"] == 20
    bundle = open_bundle(letters / "out", verify=True)
    assert bundle.format == "onnx"
    assert bundle.manifest is not None
    assert bundle.manifest["decision"]["prior"] == pytest.approx([0.9, 0.1])
    assert bundle.manifest["decision"]["training_prior"] == pytest.approx([0.5, 0.5])
    record = pipeline.evaluate(letters / "out", [str(letters / "train.tsv")])
    assert record["accuracy"]["value"] > 0.9
    other = pipeline.evaluate(letters / "out", [str(letters / "train.tsv")], prior={"food": 0.5})
    assert other["decision"]["prior"] == pytest.approx([0.5, 0.5])
    with pytest.raises(EdgeslmError, match="fod"):
        pipeline.evaluate(letters / "out", [str(letters / "train.tsv")], prior={"fod": 0.5})


@pytest.mark.workstation
def test_head_only_is_a_bundle_too(letters: Path) -> None:
    text = (letters / "r.toml").read_text()
    start, end = text.index("[distill.train]"), text.index("[decide.prior]")
    write(
        letters,
        text[:start].replace("[finetune.train]", '[finetune]\nmethod = "head-only"\n[finetune.train]')
        + text[end:],
    )
    result = build(letters)
    assert result["quality"]["accuracy"]["value"] > 0.9


@pytest.mark.workstation
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "empty|no"),
        ("a\tfood\nb\tfood\n", "one class only"),
        ("a\nb\nc\n", "column"),
        ("a\t\nb\t\n", "label"),
        ("a\tfood\tx\nb\tsky\ty\n", "rows"),
    ],
)
def test_bad_tables_are_one_clear_error(letters: Path, rows: str, message: str) -> None:
    (letters / "train.tsv").write_text(f"text\tlabel\n{rows}" if rows else "")
    with pytest.raises(DataError, match=message):
        build(letters)
    assert not (letters / "out").exists()


@pytest.fixture
def machines(tmp_path: Path) -> Path:
    """A recipe for two machines whose pressure falls before they fail."""
    random = np.random.default_rng(0)
    lines = ["time_s,unit,pressure,heat,state"]
    for unit in range(6):
        for second in range(120):
            failing = second >= 90
            pressure = random.normal(5 - 3 * failing, 0.3)
            lines.append(
                f"{second},m{unit},{pressure:.4f},{random.normal(40, 2):.3f},{'failing' if failing else 'fine'}"
            )
    (tmp_path / "readings.csv").write_text("\n".join(lines))
    write(
        tmp_path,
        'name = "machines"\ntask = "sensor-classification"\nseed = 3\n'
        '[data]\ntrain = "readings.csv"\nheldout_every = 3\n'
        '[columns]\nlabel = "state"\ntime = "time_s"\nunit = "unit"\n[windows]\nrows = 8\nstride = 2\n'
        "[finetune]\nunits = 8\n[finetune.train]\nepochs = 6\nlearning_rate = 1e-2\nbatch_size = 16\n"
        "[decide.prior]\nfailing = 0.01\n[decide.costs]\nfailing = 100\n[bench]\nrepetitions = 2\n",
    )
    return tmp_path


@pytest.mark.workstation
def test_a_sensor_model_from_table_to_bundle(machines: Path) -> None:
    result = build(machines)
    assert ran(result) == ["finetune", "quantize", "evaluate", "bench"]
    assert result["quality"]["macro"]["f1"]["value"] > 0.8
    record = pipeline.evaluate(machines / "out", [str(machines / "readings.csv")], prior={"failing": 0.25})
    assert record["accuracy"]["value"] > 0.9
    alarms = result["quality"]["alarms"]
    assert alarms["machines"] == 2
    assert alarms["warning_s"] == 30
    assert alarms["score"]["announced"] == 2
    assert record["alarms"]["machines"] == 6
    assert "Announced before failure" in (machines / "out" / "report.md").read_text()
    assert ran(build(machines)) == []
    manifest = open_bundle(machines / "out", verify=True).manifest
    assert manifest is not None
    assert manifest["model"]["preprocessing"]["channels"] == ["pressure", "heat"]
    text = (machines / "readings.csv").read_text()
    (machines / "readings.csv").write_text(text.replace("fine", "fail"))
    with pytest.raises(EdgeslmError):
        pipeline.evaluate(machines / "out", [str(machines / "readings.csv")])


@pytest.mark.workstation
def test_commands_make_checkpoints_with_the_recipes_keys(language: Path) -> None:
    from click.testing import CliRunner

    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from edgeslm.training_commands import finetune, prune

    train = str(language / "train.jsonl")
    done = CliRunner().invoke(
        finetune,
        [str(language / "model"), "--train", train, "--heldout-every", "4", "--method", "lora", "--rank", "4",
         "--max-steps", "2", "--batch-size", "2", "--context", "32", "--out", str(language / "tuned"), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["training"][0]["steps"] == 2
    assert (language / "tuned" / "adapter" / "adapter_config.json").is_file()
    done = CliRunner().invoke(
        prune,
        [str(language / "tuned"), "--calibration", train, "--drop-layers", "1",
         "--out", str(language / "small"), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((language / "small" / "config.json").read_text())["num_hidden_layers"] == 2
    limit = int(0.9 * sum(one.numel() for one in resolve(str(language / "tuned")).load().parameters()) * 2)
    done = CliRunner().invoke(
        prune,
        [str(language / "tuned"), "--calibration", train, "--target-bytes", str(limit), "--scheme", "F16",
         "--out", str(language / "fits"), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    made = export_gguf.run(
        resolve(str(language / "fits")), QuantizeSpec(scheme="F16"), language / "fits.gguf"
    )
    assert made.path.stat().st_size <= limit


def launched(folder: Path, processes: int) -> dict[str, Any]:
    """The record of `accelerate launch -m edgeslm build` on so many processes."""
    several = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    out = folder / f"out-{processes}"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         "-m", "edgeslm", "build", str(folder / "r.toml"), "--out", str(out), "--json"],
        capture_output=True, text=True, check=False, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"schema"')]
    assert len(records) == 1
    assert {one["processes"] for one in records[0]["training"]} == {processes}
    open_bundle(out, verify=True)
    record: dict[str, Any] = records[0]
    return record


@pytest.mark.workstation
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["language", "machines"])
def test_two_processes_learn_what_one_does(recipe: str, request: pytest.FixtureRequest) -> None:
    """The same losses of every step and of the held-out examples, one bundle, one report."""
    folder = request.getfixturevalue(recipe)
    one, two = (launched(folder, processes)["training"] for processes in (1, 2))
    for points in ("curve", "evaluations"):
        losses = [[point["loss"] for each in training for point in each[points]] for training in (one, two)]
        assert losses[0]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.workstation
def test_simulated_bearings_into_a_relative_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is in one folder, the build starts in another and names its result from there."""
    pytest.importorskip("torch")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.toml").write_text(
        'name = "bearing"\ntask = "sensor-classification"\nseed = 7\n'
        "[simulate]\nunits = 4\nlife_s = 90\nwarning_s = 30\nsample_hz = 2048\n"
        "[windows]\nrows = 8\nstride = 4\n[finetune]\nunits = 4\n"
        "[finetune.train]\nmax_steps = 2\nbatch_size = 8\n[bench]\nbatch_sizes = [1]\nrepetitions = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    result = pipeline.build(load_recipe(Path("recipes/r.toml")), Path("build/bearing"))
    assert result is not None
    assert ran(result)[0] == "simulate"
    assert open_bundle(tmp_path / "build" / "bearing", verify=True).is_classifier
