"""A recipe: what to build, out of what, held to which bounds.  TOML in, frozen dataclasses out.

The defaults live in edgeslm.specs, the allowed values in TABLES; a test holds one against the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from edgeslm.consistency import check_together
from edgeslm.errors import RecipeError
from edgeslm.schema import Key, read_table, read_toml, shipped_folder, unknown_name
from edgeslm.specs import (
    TASKS,
    BenchSpec,
    CalibrateSpec,
    ColumnsSpec,
    DataSpec,
    DecideSpec,
    DistillSpec,
    EvaluateSpec,
    FinetuneSpec,
    GateSpec,
    PruneSpec,
    QuantizeSpec,
    ScrubSpec,
    SimulateSpec,
    StudentSpec,
    TrainSpec,
    WindowSpec,
)

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0",
                "Q4_1", "IQ4_NL", "IQ4_XS")  # fmt: skip
"""Types that a tensor of an export can have."""

SCHEMES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32",
           "Q5_0", "Q5_1", "Q4_1", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q5_K", "Q4_K", "Q3_K")  # fmt: skip
"""Presets that a scheme may name, as edgeslm.stages.plan has them (a test compares the two)."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, checked.  text and sha256 are of the file; base is its folder.

    A stage is None when its table is missing: it does not run then.
    """

    name: str
    task: str
    model: str | None
    """None: a sensor network that is trained from scratch."""
    device: str | None
    """A profile's name, or the absolute path of one's own profile."""
    seed: int
    licence: str | None
    """The model's licence, as SPDX has it."""
    data: DataSpec
    columns: ColumnsSpec
    windows: WindowSpec
    simulate: SimulateSpec | None
    scrub: ScrubSpec | None
    finetune: FinetuneSpec | None
    prune: PruneSpec | None
    distill: DistillSpec | None
    calibrate: CalibrateSpec
    quantize: QuantizeSpec
    decide: DecideSpec
    evaluate: EvaluateSpec
    gate: GateSpec
    bench: BenchSpec
    text: str
    sha256: str
    base: Path


class Table(NamedTuple):
    """A table of a recipe: the dataclass that it becomes and what its keys may hold.

    A key may be a table itself, or Pairs: a table whose keys are the user's own.
    """

    make: Any
    keys: dict[str, Key | Table | Pairs]
    optional: bool = False
    """Whether a missing table is None, rather than its defaults."""


class Pairs(NamedTuple):
    """A table of the user's own keys, each with a value of this kind; patterns: the keys are regular expressions."""

    value: Key
    patterns: bool = False


TOP = {
    "name": Key(kind="string", required=True, pattern=NAME),
    "task": Key(kind="string", required=True, choices=TASKS),
    "model": Key(kind="string"),
    "device": Key(kind="string"),
    "seed": Key(kind="integer", low=0, high=2**32 - 1),
    "licence": Key(kind="string"),
}

POSITIVE = 1e-12
TRAIN = Table(TrainSpec, {
    "epochs": Key(kind="number", low=POSITIVE, high=10_000),
    "max_steps": Key(kind="integer", low=1, high=10**9),
    "learning_rate": Key(kind="number", low=POSITIVE, high=10),
    "batch_size": Key(kind="integer", low=1, high=2**20),
    "micro_batch": Key(kind="integer", low=1, high=2**20),
    "context": Key(kind="integer", low=8, high=2**20),
    "patience": Key(kind="integer", low=1, high=10_000),
    "gradient_checkpointing": Key(kind="boolean"),
})  # fmt: skip

TABLES: dict[str, Table] = {
    "data": Table(DataSpec, {
        "train": Key(kind="strings"),
        "calibration": Key(kind="strings"),
        "heldout": Key(kind="strings"),
        "heldout_every": Key(kind="integer", low=2, high=10_000),
        "completion_only": Key(kind="boolean"),
        "max_bad_rows": Key(kind="number", low=0, high=1),
        "licence": Key(kind="string"),
    }),
    "columns": Table(ColumnsSpec, {
        "text": Key(kind="string"),
        "label": Key(kind="string"),
        "labels": Key(kind="strings"),
        "ordinal": Key(kind="boolean"),
        "channels": Key(kind="strings"),
        "time": Key(kind="string"),
        "unit": Key(kind="string"),
    }),
    "windows": Table(WindowSpec, {
        "rows": Key(kind="integer", low=1, high=2**20),
        "stride": Key(kind="integer", low=1, high=2**20),
        "normalize": Key(kind="string", choices=("standard", "robust")),
        "max_gap": Key(kind="number", low=1),
        "max_missing": Key(kind="number", low=0, high=1),
    }),
    "simulate": Table(SimulateSpec, {
        "units": Key(kind="integer", low=4, high=10_000),
        "seed": Key(kind="integer", low=0, high=2**32 - 1),
        "sample_hz": Key(kind="number", low=64, high=10**6),
        "shaft_hz": Key(kind="number", low=0.1, high=10**4),
        "fault_ratio": Key(kind="number", low=0.1, high=100),
        "life_s": Key(kind="number", low=10, high=10**7),
        "noise": Key(kind="number", low=0, high=1000),
        "warning_s": Key(kind="number", low=1, high=10**7),
    }, optional=True),
    "scrub": Table(ScrubSpec, {
        "emails": Key(kind="boolean"),
        "phones": Key(kind="boolean"),
        "ibans": Key(kind="boolean"),
        "cards": Key(kind="boolean"),
        "addresses": Key(kind="boolean"),
        "names": Key(kind="strings"),
    }, optional=True),
    "finetune": Table(FinetuneSpec, {
        "method": Key(kind="string", choices=("full", "lora", "dora", "head-only")),
        "rank": Key(kind="integer", low=1, high=4096),
        "alpha": Key(kind="number", low=POSITIVE, high=4096),
        "network": Key(kind="string", choices=("gru", "lstm")),
        "units": Key(kind="integer", low=1, high=4096),
        "train": TRAIN,
    }, optional=True),
    "prune": Table(PruneSpec, {
        "drop_layers": Key(kind="integer", low=1, high=1000),
        "layers_by": Key(kind="string", choices=("cosine", "perplexity")),
        "mlp_width": Key(kind="integer", low=32, high=2**20),
        "kv_heads": Key(kind="integer", low=1, high=1024),
        "hidden_size": Key(kind="integer", low=32, high=2**20),
        "vocabulary": Key(kind="boolean"),
        "target": Key(kind="number", low=POSITIVE, high=1e13),
        "multiple": Key(kind="integer", low=1, high=4096),
    }, optional=True),
    "distill": Table(DistillSpec, {
        "teacher": Key(kind="string"),
        "mode": Key(kind="string", choices=("logits", "sequence", "on-policy")),
        "divergence": Key(kind="string", choices=("forward", "reverse", "js")),
        "temperature": Key(kind="number", low=POSITIVE, high=1000),
        "hard_weight": Key(kind="number", low=0, high=1),
        "hidden_weight": Key(kind="number", low=0, high=10**6),
        "attention_weight": Key(kind="number", low=0, high=10**6),
        "cache_top_k": Key(kind="integer", low=1, high=2**20),
        "student": Table(StudentSpec, {
            "kind": Key(kind="string", choices=("pruned", "smaller", "gru", "lstm")),
            "layers": Key(kind="integer", low=1, high=1000),
            "embedding": Key(kind="integer", low=1, high=2**16),
            "units": Key(kind="integer", low=1, high=2**16),
        }),
        "train": TRAIN,
    }, optional=True),
    "calibrate": Table(CalibrateSpec, {
        "tokens": Key(kind="integer", low=32, high=10**9),
        "context": Key(kind="integer", low=16, high=2**20),
    }),
    "quantize": Table(QuantizeSpec, {
        "format": Key(kind="string", choices=("gguf", "onnx")),
        "scheme": Key(kind="string", choices=SCHEMES),
        "keep_going": Key(kind="boolean"),
        "types": Pairs(Key(kind="string", choices=TENSOR_TYPES), patterns=True),
    }),
    "decide": Table(DecideSpec, {
        "prior": Pairs(Key(kind="number", low=POSITIVE, high=1)),
        "costs": Pairs(Key(kind="number", low=POSITIVE)),
    }),
    "evaluate": Table(EvaluateSpec, {
        "context": Key(kind="integer", low=16, high=2**20),
        "max_tokens": Key(kind="integer", low=16, high=10**9),
    }),
    "gate": Table(GateSpec, {
        "max_kl_nats": Key(kind="number", low=0),
        "min_top1_agreement": Key(kind="number", low=0, high=1),
        "max_perplexity_ratio": Key(kind="number", low=0),
        "min_accuracy": Key(kind="number", low=0, high=1),
        "min_macro_f1": Key(kind="number", low=0, high=1),
        "max_file_bytes": Key(kind="integer", low=1),
        "min_decode_tokens_per_s": Key(kind="number", low=0),
        "max_peak_rss_bytes": Key(kind="integer", low=1),
    }),
    "bench": Table(BenchSpec, {
        "prompt_tokens": Key(kind="integers", low=1, high=2**20),
        "decode_tokens": Key(kind="integers", low=1, high=2**20),
        "batch_sizes": Key(kind="integers", low=1, high=2**16),
        "threads": Key(kind="integers", low=1, high=4096),
        "repetitions": Key(kind="integer", low=1, high=10_000),
        "context": Key(kind="integer", low=8, high=2**20),
    }),
}  # fmt: skip
"""Every table of a recipe."""


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.  Raises RecipeError naming the table, the key and the value at fault."""
    path = Path(path)
    text, data = read_toml(path)
    return read_recipe(data, where=path.name, text=text, base=path.resolve().parent)


def read_recipe(data: dict[str, Any], *, where: str, text: str, base: Path) -> Recipe:
    """Check what a recipe holds.  where: what errors call it; base: what relative paths start from."""
    _check_tables(data, where)
    top = read_table(
        {name: data[name] for name in data if name not in TABLES}, TOP, f"{where}: the top level"
    )
    specs: dict[str, Any] = {
        name: None
        if table.optional and name not in data
        else _read(data.get(name, {}), table, f"{where}: [{name}]")
        for name, table in TABLES.items()
    }
    if top.get("device", "").endswith(".toml"):
        top["device"] = str(base / top["device"])
    if top["task"] != "causal-lm" and "quantize" not in data:
        specs["quantize"] = QuantizeSpec(format="onnx", scheme="F32")
    if specs["data"].train and not specs["data"].calibration:
        specs["data"] = replace(specs["data"], calibration=specs["data"].train)
    recipe = Recipe(
        **{"model": None, "device": None, "seed": 0, "licence": None, **top},
        **specs,
        text=text,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        base=base,
    )
    check_together(recipe, where, frozenset(name for name in data if name in TABLES))
    return recipe


def _check_tables(data: dict[str, Any], where: str) -> None:
    """Every table is a known one, and every known table is a table."""
    for name, value in data.items():
        if isinstance(value, dict) and name not in TABLES:
            raise unknown_name(
                f"{where}: [{name}] is not a table of this version's recipes", name, tuple(TABLES)
            )
        if name in TABLES:
            _check_is_table(value, name, TABLES[name], f"{where}: {name}")


def _check_is_table(value: Any, name: str, table: Table | Pairs, where: str) -> None:
    if isinstance(value, dict):
        return
    if isinstance(table, Table):
        holds = f"with the keys {', '.join(table.keys)}"
    else:
        holds = 'of "REGEX" = "TYPE"' if table.patterns else "of NAME = VALUE"
    raise RecipeError(f"{where} = {value!r} is not allowed", hint=f"[{name}] is a table {holds}")


def _read(data: dict[str, Any], table: Table, where: str) -> Any:
    """The dataclass of one table, the tables in it included."""
    inner = {name: key for name, key in table.keys.items() if not isinstance(key, Key)}
    flat = {name: key if isinstance(key, Key) else Key(kind="string") for name, key in table.keys.items()}
    values = read_table({name: value for name, value in data.items() if name not in inner}, flat, where)
    for name, kind in inner.items():
        if name not in data:
            continue
        _check_is_table(data[name], name, kind, f"{where} {name}")
        place = where.replace("]", f".{name}]")
        values[name] = (
            _read(data[name], kind, place) if isinstance(kind, Table) else _pairs(data[name], kind, place)
        )
    return table.make(**values)


def _pairs(data: dict[str, Any], kind: Pairs, where: str) -> tuple[tuple[str, Any], ...]:
    """(key, value) of a table of the user's own keys, in the file's order."""
    for name, value in data.items():
        if isinstance(value, dict):
            raise RecipeError(
                f"{where} {name} is a table", hint=f'quote a name with dots: "{name}..." = VALUE'
            )
        try:
            re.compile(name if kind.patterns else "")
        except re.error as error:
            raise RecipeError(f"{where} {name!r} is not a regular expression: {error}") from None
    return tuple(read_table(data, dict.fromkeys(data, kind.value), where).items())


def recipe_template(model: str, device: str) -> str:
    """A commented recipe for `model` on `device`: recipes/template.toml with its first keys replaced.

    A local model is named by its absolute path, so that the recipe may lie anywhere.
    """
    for what, value in (("model", model), ("device", device)):
        if not value or not value.isprintable():
            raise RecipeError(f"{value!r} can't be the {what} of a recipe", hint="use printable characters")
    stem = re.sub(r"\.(gguf|toml)$", "", re.split(r"[/\\]", re.sub(r"@[^/]*$", "", model).rstrip("/\\"))[-1])
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{stem}-{Path(device).stem}".lower()).strip("-.")
    source = str(Path(model).resolve()) if Path(model).exists() else model
    text = (shipped_folder("recipes") / "template.toml").read_text(encoding="utf-8")
    for key, value in (("name", words or "my-model"), ("model", source), ("device", device)):
        head, _line, rest = re.split(rf"^({key} = .*)$", text, maxsplit=1, flags=re.MULTILINE)
        text = f"{head}{key} = {json.dumps(value, ensure_ascii=False)}{rest}"
    return text


def write_template(text: str, out: Path) -> None:
    """Write a recipe to a new file.  Raises RecipeError when the file is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{out}: the file exists", hint="choose another name or remove it") from None
