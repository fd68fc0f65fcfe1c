"""A recipe: what to build, out of what, held to which bounds.  TOML in, frozen dataclasses out.

The defaults live in the dataclasses, the allowed values in TABLES; a test holds one against the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeslm.errors import RecipeError
from edgeslm.schema import Key, read_table, read_toml, shipped_folder, unknown_name

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0",
                "Q4_1", "IQ4_NL", "IQ4_XS")  # fmt: skip
"""Types that a tensor of an export can have."""

SCHEMES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32",
           "Q5_0", "Q5_1", "Q4_1", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q5_K", "Q4_K", "Q3_K")  # fmt: skip
"""Presets that a scheme may name, as edgeslm.stages.plan has them (a test compares the two)."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where text comes from: files relative to the recipe, or pkg://package/path[#name]."""

    calibration: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    heldout_every: int | None = None
    """Every so-manieth document of the calibration sources is held out instead; 8: one eighth of them."""


@dataclass(frozen=True, kw_only=True)
class CalibrateSpec:
    """How much text the importance matrix is measured on; it is measured when there is calibration text."""

    tokens: int = 16384
    context: int = 512
    """Tokens in a window."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """The weights' format and types."""

    format: str = "gguf"
    scheme: str = "Q4_K_M"
    types: tuple[tuple[str, str], ...] = ()
    """(regular expression, type) for single tensors; the first that matches a name counts."""
    keep_going: bool = False
    """Write what can be written when a tensor has NaN or infinity."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """How quality is measured on held-out text."""

    context: int = 512
    """Tokens in a window; the second half of each is scored."""
    max_tokens: int | None = None
    """Stop after about so many tokens of text; None: all of it."""


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """Bounds that the artifact is held to; None: no bound."""

    max_kl_nats: float | None = None
    min_top1_agreement: float | None = None
    max_perplexity_ratio: float | None = None
    max_file_bytes: int | None = None
    min_decode_tokens_per_s: float | None = None
    max_peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What is timed on this machine."""

    prompt_tokens: tuple[int, ...] = (512,)
    decode_tokens: tuple[int, ...] = (128,)
    threads: tuple[int, ...] = ()
    """Empty: the physical cores that the process may use."""
    repetitions: int = 5
    context: int | None = None
    """Tokens that the KV cache holds; None: what the longest run needs."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe, checked.  text and sha256 are of the file; base is its folder."""

    name: str
    task: str
    model: str
    device: str | None
    """A profile's name, or the absolute path of one's own profile."""
    seed: int
    data: DataSpec
    calibrate: CalibrateSpec
    quantize: QuantizeSpec
    evaluate: EvaluateSpec
    gate: GateSpec
    bench: BenchSpec
    text: str
    sha256: str
    base: Path


TOP = {
    "name": Key(kind="string", required=True, pattern=NAME),
    "task": Key(kind="string", required=True, choices=("causal-lm",)),
    "model": Key(kind="string", required=True),
    "device": Key(kind="string"),
    "seed": Key(kind="integer", low=0, high=2**32 - 1),
}

TABLES: dict[str, tuple[Any, dict[str, Key]]] = {
    "data": (DataSpec, {
        "calibration": Key(kind="strings"),
        "heldout": Key(kind="strings"),
        "heldout_every": Key(kind="integer", low=2, high=10_000),
    }),
    "calibrate": (CalibrateSpec, {
        "tokens": Key(kind="integer", low=32, high=10**9),
        "context": Key(kind="integer", low=16, high=2**20),
    }),
    "quantize": (QuantizeSpec, {
        "format": Key(kind="string", choices=("gguf",)),
        "scheme": Key(kind="string", choices=SCHEMES),
        "keep_going": Key(kind="boolean"),
    }),
    "evaluate": (EvaluateSpec, {
        "context": Key(kind="integer", low=16, high=2**20),
        "max_tokens": Key(kind="integer", low=16, high=10**9),
    }),
    "gate": (GateSpec, {
        "max_kl_nats": Key(kind="number", low=0),
        "min_top1_agreement": Key(kind="number", low=0, high=1),
        "max_perplexity_ratio": Key(kind="number", low=0),
        "max_file_bytes": Key(kind="integer", low=1),
        "min_decode_tokens_per_s": Key(kind="number", low=0),
        "max_peak_rss_bytes": Key(kind="integer", low=1),
    }),
    "bench": (BenchSpec, {
        "prompt_tokens": Key(kind="integers", low=1, high=2**20),
        "decode_tokens": Key(kind="integers", low=1, high=2**20),
        "threads": Key(kind="integers", low=1, high=4096),
        "repetitions": Key(kind="integer", low=1, high=10_000),
        "context": Key(kind="integer", low=8, high=2**20),
    }),
}  # fmt: skip
"""Table of a recipe: the dataclass that it becomes and what its keys may hold ([quantize.types] is apart)."""


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.  Raises RecipeError naming the table, the key and the value at fault."""
    path = Path(path)
    text, data = read_toml(path)
    where = path.name
    _check_tables(data, where)
    top = read_table(
        {name: data[name] for name in data if name not in TABLES}, TOP, f"{where}: the top level"
    )
    specs = {
        table: make(**_table_values(data.get(table, {}), table, keys, f"{where}: [{table}]"))
        for table, (make, keys) in TABLES.items()
    }
    base = path.resolve().parent
    if top.get("device", "").endswith(".toml"):
        top["device"] = str(base / top["device"])
    recipe = Recipe(
        **{"device": None, "seed": 0, **top},
        **specs,
        text=text,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        base=base,
    )
    _check_together(recipe, where)
    return recipe


def _check_tables(data: dict[str, Any], where: str) -> None:
    """Every table is a known one, and every known table is a table."""
    for name, value in data.items():
        if isinstance(value, dict) and name not in TABLES:
            raise unknown_name(
                f"{where}: [{name}] is not a table of this version's recipes", name, tuple(TABLES)
            )
        if name in TABLES and not isinstance(value, dict):
            raise RecipeError(
                f"{where}: {name} = {value!r} is not allowed",
                hint=f"[{name}] is a table with the keys {', '.join(TABLES[name][1])}",
            )


def _table_values(data: dict[str, Any], table: str, keys: dict[str, Key], where: str) -> dict[str, Any]:
    if table != "quantize":
        return read_table(data, keys, where)
    rest = {name: value for name, value in data.items() if name != "types"}
    if "types" not in data:
        return read_table(rest, {**keys, "types": Key(kind="string")}, where)
    return {**read_table(rest, keys, where), "types": _types(data["types"], where)}


def _types(data: Any, where: str) -> tuple[tuple[str, str], ...]:
    """[quantize.types]: regular expression = type, in the file's order."""
    if not isinstance(data, dict):
        raise RecipeError(
            f"{where} types = {data!r} is not allowed", hint='[quantize.types] is a table: "REGEX" = "TYPE"'
        )
    where = where.replace("]", ".types]")
    for pattern, name in data.items():
        if isinstance(name, dict):
            raise RecipeError(
                f"{where} {pattern} is a table", hint=f'quote a pattern with dots: "{pattern}..." = "TYPE"'
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"{where} {pattern!r} is not a regular expression: {error}") from None
    checked = read_table(data, dict.fromkeys(data, Key(kind="string", choices=TENSOR_TYPES)), where)
    return tuple(checked.items())


def _check_together(recipe: Recipe, where: str) -> None:
    """Rules that need more than one key."""
    data, gate = recipe.data, recipe.gate
    if data.heldout and data.heldout_every:
        raise RecipeError(
            f"{where}: [data] has both heldout and heldout_every = {data.heldout_every}",
            hint="keep one of them",
        )
    if data.heldout_every and not data.calibration:
        raise RecipeError(
            f"{where}: [data] heldout_every = {data.heldout_every} has nothing to divide",
            hint="it holds out documents of calibration: name some",
        )
    bounds = ("max_kl_nats", "min_top1_agreement", "max_perplexity_ratio")
    asked = [name for name in bounds if getattr(gate, name) is not None]
    if asked and not (data.heldout or data.heldout_every):
        raise RecipeError(
            f"{where}: [gate] {asked[0]} = {getattr(gate, asked[0])} needs held-out text",
            hint="name some: set heldout or heldout_every in [data]",
        )
    for table, tokens, context in (
        ("calibrate", "tokens", recipe.calibrate.context),
        ("evaluate", "max_tokens", recipe.evaluate.context),
    ):
        value = getattr(getattr(recipe, table), tokens)
        if value is not None and value < context:
            raise RecipeError(
                f"{where}: [{table}] {tokens} = {value} is less than one window of context = {context}",
                hint=f"raise {tokens} or lower context",
            )


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
