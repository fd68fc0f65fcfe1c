"""Strict tables: what a key of a recipe or a device profile may hold, and one clear error when it doesn't.

Every error names the file, the table, the key and the value, and either the nearest known key or the
range that was expected.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeslm.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Kind = Literal["string", "strings", "integer", "integers", "number", "boolean"]

WORDS: dict[Kind, str] = {
    "string": "a string",
    "strings": "a string or a list of strings",
    "integer": "a whole number",
    "integers": "a whole number or a list of them",
    "number": "a number",
    "boolean": "true or false",
}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What one key may hold.  A list kind takes a single value too and always yields a tuple."""

    kind: Kind
    required: bool = False
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str | int, ...] = ()
    pattern: str = ""
    """Regular expression that the whole string must match."""


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file and what it holds.  Raises RecipeError when it can't be read or parsed."""
    try:
        text = path.read_bytes().decode("utf-8")
        return text, tomllib.loads(text)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}", hint="see https://toml.io") from None


def read_table(data: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> dict[str, Any]:
    """`data` held against `keys`: the present keys with checked values, lists as tuples.

    where: file and table for messages, such as "quickstart.toml: [gate]".  Raises RecipeError.
    """
    for name in data:
        if name not in keys:
            raise unknown_name(f"{where}: {name!r} is not a known key", name, keys)
    for name, key in keys.items():
        if key.required and name not in data:
            raise RecipeError(f"{where}: {name!r} is missing", hint=f"it holds {expectation(key)}")
    return {name: _read_value(value, keys[name], f"{where} {name}") for name, value in data.items()}


def unknown_name(message: str, name: str, known: Collection[str]) -> RecipeError:
    """An error whose hint names the known name nearest to `name`, and all of them."""
    near = difflib.get_close_matches(
        name.casefold(), {item.casefold(): item for item in known}, n=1, cutoff=0.5
    )
    by_fold = {item.casefold(): item for item in known}
    meant = f"did you mean {by_fold[near[0]]!r}? " if near else ""
    return RecipeError(message, hint=f"{meant}known: {', '.join(known)}")


def expectation(key: Key) -> str:
    """`key` in words, for messages."""
    words = WORDS[key.kind]
    if key.choices:
        return f"one of {', '.join(map(str, key.choices))}"
    if key.pattern:
        return f"{words} that matches {key.pattern}"
    if key.low > -math.inf and key.high < math.inf:
        return f"{words} from {_plain(key.low)} to {_plain(key.high)}"
    if key.low > -math.inf:
        return f"{words} from {_plain(key.low)} up"
    return words


def shipped_folder(name: str) -> Path:
    """A data folder of the project: inside the installed package, else at the root of the source tree."""
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise RecipeError(
        f"the folder {name}/ of edgeslm is not beside {package}", hint="install edgeslm again with pip"
    )


def _read_value(value: Any, key: Key, where: str) -> Any:
    if key.kind not in ("strings", "integers"):
        return _read_one(value, key, where)
    if value == []:
        raise RecipeError(f"{where} is an empty list", hint="leave the key out")
    items = value if isinstance(value, list) else [value]
    return tuple(_read_one(item, key, where) for item in items)


def _read_one(value: Any, key: Key, where: str) -> Any:
    """One scalar; TOML's true is no number here although Python's is."""
    wrong = RecipeError(f"{where} = {_shown(value)} is not allowed", hint=f"expected {expectation(key)}")
    if key.kind == "boolean":
        if not isinstance(value, bool):
            raise wrong
        return value
    if key.kind in ("string", "strings"):
        if not isinstance(value, str) or not value:
            raise wrong
        if key.choices and value not in key.choices:
            raise unknown_name(
                f"{where} = {_shown(value)} is not allowed", value, [str(choice) for choice in key.choices]
            )
        if key.pattern and not re.fullmatch(key.pattern, value):
            raise wrong
        return value
    types = (int, float) if key.kind == "number" else (int,)
    if isinstance(value, bool) or not isinstance(value, types):
        raise wrong
    if not (math.isfinite(value) and key.low <= value <= key.high):
        raise wrong
    if key.choices and value not in key.choices:
        raise wrong
    return float(value) if key.kind == "number" else value


def _plain(number: float) -> str:
    return f"{int(number)}" if float(number).is_integer() else f"{number}"


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
