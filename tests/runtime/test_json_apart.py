"""Schemas that no value satisfies both of: what is said to be apart is, by brute force over values."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest

from edgeslm.errors import DataError
from edgeslm.runtime.json_apart import Apart
from edgeslm.runtime.json_grammar import read_schema

DEFS = {
    "text": {"type": "string"},
    "cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
}


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


SCHEMAS: list[Any] = [
    False, True, {}, {"type": "integer"}, {"type": "number"}, {"type": ["string", "null"]}, {"type": "boolean"},
    {"minLength": 2}, {"type": "string", "minLength": 2}, {"type": "string", "maxLength": 1},
    {"const": 1}, {"const": 1.0}, {"const": True}, {"enum": ["a", None, 0.5]}, {"enum": [[], {}, 3]},
    {"const": {"kind": "cat"}}, {"type": "null"},
    {"type": "number", "maximum": 1}, {"type": "number", "exclusiveMinimum": 1},
    {"type": "integer", "minimum": 1, "maximum": 2}, {"type": "integer", "exclusiveMaximum": 0}, {"minimum": 3},
    {"type": "array", "minItems": 2}, {"type": "array", "maxItems": 1}, {"type": "array", "items": False},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1},
    {"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "string"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "minItems": 1},
    {"type": "object"}, closed(a={"type": "integer"}), closed(b={}), closed(a={}, b={}), closed(a={"type": "string"}),
    {"type": "object", "required": ["a"]}, {"type": "object", "additionalProperties": {"type": "integer"}},
    {"$ref": "#/$defs/cat"}, closed(kind={"const": "dog"}), {"$ref": "#/$defs/text"},
    {"$ref": "#/$defs/text", "minLength": 2}, {"$ref": "#/$defs/missing"}, {"$ref": "#/$defs/cat/properties"},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
    {"oneOf": [{"type": "array"}, {"type": "object"}]}, {"allOf": [{"type": "integer"}, {"minimum": 2}]},
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, 1.0, 2, 3, -1, 0.5, 1.5, "", "a", "ab", "cat", [], [1], ["a"], [1, "a"], [1, 2],
    ["a", "b"],
    [None], {}, {"a": 1}, {"a": "x"}, {"a": 1, "b": 2}, {"b": None}, {"kind": "cat"}, {"kind": "dog"}, {"kind": 3},
    {"kind": "cat", "a": 1},
]  # fmt: skip


def test_what_is_apart_shares_no_value() -> None:
    """The oracle: jsonschema on every value; and the other way round, most pairs without a value are seen."""
    jsonschema = pytest.importorskip("jsonschema")
    usable = [schema for schema in SCHEMAS if "missing" not in str(schema)]

    def valid(schema: Any) -> set[int]:
        whole = {"allOf": [schema], "$defs": DEFS}
        validator = jsonschema.Draft202012Validator(whole)
        return {place for place, value in enumerate(VALUES) if validator.is_valid(value)}

    held = [valid(schema) for schema in usable]
    seen = unseen = 0
    for i, j in itertools.combinations(range(len(usable)), 2):
        found = Apart({"$defs": DEFS}).holds(usable[i], usable[j])
        assert found == Apart({"$defs": DEFS}).holds(usable[j], usable[i])
        if found:
            assert not held[i] & held[j], (usable[i], usable[j])
        seen, unseen = seen + found, unseen + (not found and not held[i] & held[j])
    assert seen > 10 * unseen, (seen, unseen)


def test_a_schema_overlaps_itself() -> None:
    for schema in SCHEMAS:
        if schema not in (False, {"type": "array", "items": False}):
            assert not Apart({"$defs": DEFS}).holds(schema, schema), schema


@pytest.mark.parametrize(
    "options",
    [
        [closed(kind={"const": "a"}, x={}), closed(kind={"const": "b"})],
        [closed(answer={}), closed(error={})],
        [{"type": "integer", "maximum": 10}, {"type": "integer", "minimum": 90}],
        [{"type": "string"}, {"type": "array"}, {"type": "null"}, False],
        [{"$ref": "#/$defs/cat"}, closed(kind={"enum": ["dog", "cow"]})],
    ],
    ids=str,
)
def test_one_of_may_be_written_as_alternatives(options: list[Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = {"oneOf": options, "$defs": DEFS}
    jsonschema.validate(json.loads(read_schema(schema).start.soonest), schema)


def test_what_stands_beside_one_of_counts() -> None:
    """A property that all options need tells them apart, though no option says that it is needed."""
    kinds = [{"properties": {"kind": {"const": kind}}} for kind in ("a", "b")]
    assert read_schema({"type": "object", "required": ["kind"], "oneOf": kinds}).matches(b'{"kind":"b"}')
    with pytest.raises(DataError, match="oneOf forbids"):
        read_schema({"type": "object", "oneOf": kinds})


def test_hostile_schemas_take_no_time() -> None:
    deep: Any = {"type": "string", "pattern": "x"}
    for _ in range(40):
        deep = {"anyOf": [deep, deep, deep]}
    start = time.process_time()
    assert not Apart({}).holds(deep, deep)
    with pytest.raises(DataError):
        read_schema({"oneOf": [{"const": number % 1999} for number in range(4000)]})
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}}
    assert not Apart(loop).holds({"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"})
    assert time.process_time() - start < 5
