"""JSON Schema (draft 2020-12): references followed, allOf joined, bounds read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError
from edgeslm.runtime.gbnf import MOST_TIMES

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_HOPS = 48
"""References that lead to references."""
ASSERTING = (
    "type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "enum", "const", "anyOf", "oneOf", "$ref",
)  # fmt: skip
"""Keywords that narrow what is valid; all others are words for people."""
_IMPLYING = (
    ("object", ("properties", "required", "additionalProperties")),
    ("array", ("items", "prefixItems", "minItems", "maxItems")),
    ("string", ("minLength", "maxLength", "pattern", "format")),
    ("number", ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
)


def target(root: Any, name: Any, where: str) -> Any:
    """What a $ref within `root` leads to (RFC 6901).  Raises DataError for one that leads elsewhere."""
    found = root
    if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
        raise DataError(f"the schema's $ref at {where} is {str(name)[:60]!r}", hint="use #/$defs/NAME")
    for step in name.split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key[:9]) < len(found):
            found = found[int(key[:9])]
        else:
            raise DataError(f"the schema's $ref {name[:60]!r} at {where} leads nowhere")
    return found


def merged(root: Any, schema: Mapping[str, Any], where: str, depth: int = 0) -> dict[str, Any]:
    """One schema that says what `schema` and all of its allOf say.

    Only what they don't say twice can be joined; DataError for the rest.
    """
    parts = schema["allOf"]
    if not isinstance(parts, list) or depth > MOST_HOPS:
        raise DataError(f"the schema's allOf at {where} is no list, or too deep")
    own = {key: value for key, value in schema.items() if key != "allOf"}
    parts = [_followed(root, part, where) for part in (own, *parts) if part is not True]
    closed = [part.get("additionalProperties") is False for part in parts]
    open_ = [bool(part.get("properties") or part.get("required")) for part in parts]
    if any(is_closed and sum(open_) > one for is_closed, one in zip(closed, open_, strict=True)):
        raise DataError(
            f"the schema's allOf at {where} closes an object that others add to", hint="write one"
        )
    joined: dict[str, Any] = {}
    for part in parts:
        inner = merged(root, part, where, depth + 1) if "allOf" in part else part
        for key, value in inner.items():
            joined[key] = _both(key, joined[key], value, where) if key in joined else value
    return joined


def _both(key: str, first: Any, second: Any, where: str) -> Any:
    """A keyword of two schemas as one."""
    if key == "properties" and isinstance(first, dict) and isinstance(second, dict):
        twice = [name for name in second if name in first and first[name] != second[name]]
        if not twice:
            return {**first, **second}
    elif key == "required" and is_texts(first) and is_texts(second):
        return [*first, *second]
    elif key not in ASSERTING or first == second:
        return second
    raise DataError(f"the schema's allOf at {where} says {key} twice", hint="write it once")


def _followed(root: Any, part: Any, where: str) -> dict[str, Any]:
    """A schema, or what its $ref leads to in the end."""
    for _ in range(MOST_HOPS):
        if not isinstance(part, dict):
            raise DataError(f"the schema's allOf at {where} holds {str(part)[:40]!r}, not an object")
        if "$ref" not in part:
            return part
        part = target(root, part["$ref"], where)
    raise DataError(f"the schema's $ref at {where} leads in a circle")


def implied_type(schema: Mapping[str, Any]) -> str | None:
    """The type that keywords without one speak of."""
    return next((kind for kind, keys in _IMPLYING if any(key in schema for key in keys)), None)


def bounds(schema: Mapping[str, Any], least: str, most: str, where: str) -> tuple[int, int | None]:
    """The numbers of two keywords such as minItems and maxItems.  Raises DataError for no such numbers."""
    low, high = schema.get(least, 0), schema.get(most)
    for value in (low, 0 if high is None else high):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TIMES:
            raise DataError(
                f"the schema's {least} or {most} at {where} is {str(value)[:40]}", hint=f"0 to {MOST_TIMES}"
            )
    if high is not None and high < low:
        raise DataError(f"the schema's {most} at {where} is below its {least}")
    return low, high


def is_of(value: Any, kind: str) -> bool:
    """Whether a value has a type of JSON Schema."""
    if isinstance(value, bool):
        return kind == "boolean"
    found = {dict: "object", list: "array", str: "string", type(None): "null"}.get(type(value))
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return kind == found or (found is None and (kind == "number" or (kind == "integer" and whole)))


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
