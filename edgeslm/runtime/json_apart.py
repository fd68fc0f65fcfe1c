"""Whether a value can satisfy two JSON Schemas at once: what oneOf forbids, and a grammar of alternatives can't see."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError
from edgeslm.runtime.json_schema import is_of, is_texts, merged, target

if TYPE_CHECKING:
    from collections.abc import Mapping

DEEPEST = 16
"""Schemas within schemas that are looked at; what lies deeper is taken to overlap."""
MOST_LOOKS = 20_000
_KINDS = {
    "object": {"object"}, "array": {"array"}, "string": {"string"}, "boolean": {"boolean"}, "null": {"null"},
    "number": {"whole", "broken"}, "integer": {"whole"},
}  # fmt: skip
_ALL = frozenset[str]().union(*_KINDS.values())


class Apart:
    """What is known to be apart within one document of schemas; it looks at MOST_LOOKS pairs and then at no more."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = MOST_LOOKS

    def holds(self, first: Any, second: Any, depth: int = 0) -> bool:
        """True where no value satisfies both schemas; False where one does, or where that is not seen."""
        if first is False or second is False:
            return True
        self._left -= 1
        if self._left < 0 or depth > DEEPEST:
            return False
        one, other = _resolved(self._root, first), _resolved(self._root, second)
        return one is not None and other is not None and self._are_apart(one, other, depth)

    def _are_apart(self, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """The same of two schemas that are spelled out: by alternatives, by constants, kind by kind."""
        for here, there in ((one, other), (other, one)):
            options = here.get("anyOf", here.get("oneOf"))
            if isinstance(options, list) and all(self.holds(part, there, depth + 1) for part in options):
                return True
        known = _values(one), _values(other)
        if known[0] is not None and known[1] is not None:
            return not set(map(_same, known[0])) & set(map(_same, known[1]))
        for values, schema in ((known[0], other), (known[1], one)):
            if values is not None:
                return not any(_fits(value, _kinds(schema)) for value in values)
        return all(self._of_kind(kind, one, other, depth) for kind in _kinds(one) & _kinds(other))

    def _of_kind(self, kind: str, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """The same of the values of one kind."""
        if kind == "object":
            return self._objects(one, other, depth)
        if kind == "array":
            return _lengths_apart(one, other, "Items") or (
                min(_least(one, "minItems"), _least(other, "minItems")) > 0
                and not {"prefixItems"} & {*one, *other}
                and self.holds(one.get("items", True), other.get("items", True), depth + 1)
            )
        if kind == "string":
            return _lengths_apart(one, other, "Length")
        return kind in ("whole", "broken") and _bounds_apart(one, other)

    def _objects(self, one: Mapping[str, Any], other: Mapping[str, Any], depth: int) -> bool:
        """By a property that both need, or that one needs and the other has no room for."""
        for here, there in ((one, other), (other, one)):
            own, theirs = (part.get("properties") or {} for part in (here, there))
            if not isinstance(own, dict) or not isinstance(theirs, dict):
                continue
            for name in _required(here):
                held = theirs.get(name, there.get("additionalProperties", True))
                if held is False:
                    return True
                if name in _required(there) and self.holds(own.get(name, True), held, depth + 1):
                    return True
        return False


def _resolved(root: Any, schema: Any) -> Mapping[str, Any] | None:
    """A schema without $ref and allOf; None where there is no such object."""
    if schema is True:
        return {}
    try:
        for _ in range(DEEPEST):
            if not isinstance(schema, dict) or not ("$ref" in schema or "allOf" in schema):
                break
            if "$ref" in schema and len(schema) == 1:
                schema = target(root, schema["$ref"], "oneOf")
                continue
            own = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
            refs = [{"$ref": schema["$ref"]}] if "$ref" in schema else []
            schema = merged(root, {"allOf": [own, *refs, *schema.get("allOf", [])]}, "oneOf")
    except DataError:
        return None
    return schema if isinstance(schema, dict) and "$ref" not in schema and "allOf" not in schema else None


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _same(value: Any) -> str:
    """Equal for equal values: 1 is 1.0, and true is not 1."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict):
        return f"{{{sorted((key, _same(inner)) for key, inner in value.items())}}}"
    return f"[{[_same(one) for one in value]}]" if isinstance(value, list) else json.dumps(value)


def _kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    """What a schema lets through by its type."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return (
        frozenset[str]().union(*(_KINDS.get(kind, _ALL) for kind in kinds))
        if is_texts(kinds) and kinds
        else _ALL
    )


def _fits(value: Any, kinds: frozenset[str]) -> bool:
    return any(is_of(value, name) for name, own in _KINDS.items() if own <= kinds)


def _required(schema: Mapping[str, Any]) -> list[str]:
    names: Any = schema.get("required")
    return list(names) if is_texts(names) else []


def _least(schema: Mapping[str, Any], key: str, otherwise: float = 0) -> float:
    value = schema.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _lengths_apart(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> bool:
    return any(
        _least(here, f"min{what}") > _least(there, f"max{what}", math.inf)
        for here, there in ((one, other), (other, one))
    )


def _bounds_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def span(schema: Mapping[str, Any]) -> tuple[tuple[float, bool], tuple[float, bool]]:
        """The lower bound and whether it is left out, the upper one and whether it is not."""
        low = max(
            (_least(schema, "minimum", -math.inf), False),
            (_least(schema, "exclusiveMinimum", -math.inf), True),
        )
        high = min(
            (_least(schema, "maximum", math.inf), True), (_least(schema, "exclusiveMaximum", math.inf), False)
        )
        return low, high

    for here, there in ((one, other), (other, one)):
        (low, is_out), (high, is_in) = span(here)[0], span(there)[1]
        if low > high or (low == high and (is_out or not is_in)):
            return True
    return False
