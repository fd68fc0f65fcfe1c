"""A recipe: what to build, out of what, held to which bounds.  TOML in, frozen dataclasses out.

The defaults live in edgeslm.specs, the allowed values in edgeslm.recipe_tables.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeslm.consistency import FORMATS, check_together
from edgeslm.errors import RecipeError
from edgeslm.recipe_tables import TABLES, TOP, VARIANTS, Pairs, Table
from edgeslm.schema import Key, read_table, read_toml, shipped_folder, unknown_name
from edgeslm.specs import (
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
    VariantSpec,
    WindowSpec,
)


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
    variants: tuple[VariantSpec, ...]
    """Several artifacts in place of the one of `quantize`; empty: that one."""
    decide: DecideSpec
    evaluate: EvaluateSpec
    gate: GateSpec
    bench: BenchSpec
    text: str
    sha256: str
    base: Path


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.  Raises RecipeError naming the table, the key and the value at fault."""
    path = Path(path)
    text, data = read_toml(path)
    return read_recipe(data, where=path.name, text=text, base=path.resolve().parent)


def read_recipe(data: dict[str, Any], *, where: str, text: str, base: Path) -> Recipe:
    """Check what a recipe holds.  where: what errors call it; base: what relative paths start from."""
    _check_tables(data, where)
    top = read_table(
        {name: data[name] for name in data if name not in (*TABLES, VARIANTS)}, TOP, f"{where}: the top level"
    )
    specs: dict[str, Any] = {
        name: None
        if table.optional and name not in data
        else _read(data.get(name, {}), table, f"{where}: [{name}]")
        for name, table in TABLES.items()
    }
    if top.get("device", "").endswith(".toml"):
        top["device"] = str(base / top["device"])
    specs["quantize"] = _with_defaults(specs["quantize"], data.get("quantize", {}), top["task"])
    if specs["data"].train and not specs["data"].calibration:
        specs["data"] = replace(specs["data"], calibration=specs["data"].train)
    specs["variants"] = _variants(data, top["task"], where)
    recipe = Recipe(
        **{"model": None, "device": None, "seed": 0, "licence": None, **top},
        **specs,
        text=text,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        base=base,
    )
    check_together(recipe, where, frozenset(name for name in data if name in TABLES))
    return recipe


def usual_scheme(task: str, format_: str) -> str:
    """What a model of the task is quantized to in a format when nobody says."""
    if format_ == "gguf":
        return QuantizeSpec().scheme
    return "int4" if task == "causal-lm" else "int8-dynamic"


def _with_defaults(spec: QuantizeSpec, given: dict[str, Any], task: str) -> QuantizeSpec:
    """A classifier is written as float32 ONNX unless told otherwise; each format has a usual scheme."""
    if task != "causal-lm" and not given:
        return QuantizeSpec(format="onnx", scheme="F32")
    return spec if "scheme" in given else replace(spec, scheme=usual_scheme(task, spec.format))


def _variants(data: dict[str, Any], task: str, where: str) -> tuple[VariantSpec, ...]:
    """Each of [[variants]] is a name and what [quantize] would hold."""
    if VARIANTS not in data:
        return ()
    given = data[VARIANTS]
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise RecipeError(
            f"{where}: {VARIANTS} is no list of tables", hint=f"write [[{VARIANTS}]] above each one"
        )
    found = []
    for number, table in enumerate(given, 1):
        top = {"name": table["name"]} if "name" in table else {}
        name = read_table(top, {"name": TOP["name"]}, f"{where}: [[{VARIANTS}]] {number}")["name"]
        rest = {"format": FORMATS[task][0], **{key: table[key] for key in table if key != "name"}}
        spec = _read(rest, TABLES["quantize"], f"{where}: [{VARIANTS}.{name}]")
        found.append(VariantSpec(name=name, quantize=_with_defaults(spec, rest, task)))
    return tuple(found)


def _check_tables(data: dict[str, Any], where: str) -> None:
    """Every table is a known one, and every known table is a table."""
    for name, value in data.items():
        if isinstance(value, dict) and name not in (*TABLES, VARIANTS):
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
