"""JSON Schema as grammars: whatever comes out is valid, as jsonschema judges; what can't be honoured is refused."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import DataError
from edgeslm.runtime.json_grammar import any_object, read_schema

if TYPE_CHECKING:
    from edgeslm.runtime.grammar import Grammar, State

NODE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 10},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {
                "type": "array", "items": {"enum": ["a", 'b"\\', 3, None, {"x": [1]}]}, "minItems": 1, "maxItems": 3,
            },
            "score": {"type": ["number", "null"], "description": "words for people"},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "key é\n": {"type": "boolean"},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    NODE,
    {"type": "object"},
    {"type": "object", "additionalProperties": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}},
    {"type": "object", "required": ["a"], "properties": {"b": {"type": "integer"}}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": {"type": "boolean"},
     "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}, {"const": 3}], "minItems": 2, "maxItems": 5},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    {"type": "array", "maxItems": 0},
    {"type": "string", "pattern": '^[a-z"\\\\]{2,5}(x|\\d+)$'},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email"},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": -0.25, "exclusiveMaximum": 0},
    {"type": "number", "minimum": 6.8, "maximum": 7.4},
    {"type": "number", "exclusiveMinimum": 0.30000000000000004, "minimum": 0.1, "exclusiveMaximum": 1000000},
    {"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 3.5, "minimum": -1},
    {"type": "string", "pattern": "^yes$|^no$"},
    {"type": "integer", "maximum": -7},
    {"const": {"z": ["é", 1.5, False]}},
    {"type": "integer", "enum": [1, "x", 2.0, True]},
    {"minLength": 3},
    {"oneOf": [{"type": "boolean"}, {"type": "integer"}]},
    {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"],
     "anyOf": [{"properties": {"x": {"type": "integer"}}, "required": ["x"]}, {"properties": {"y": {"type": "null"}}}]},
    {"allOf": [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"properties": {"b": {"const": {"z": 1}}}, "required": ["b"]},
    ]},
    {"$defs": {"s": {"type": "string"}}, "type": "object", "properties": {"x": {"$ref": "#/$defs/s", "maxLength": 3}},
     "required": ["x"]},
    {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"},
    {},
    True,
]  # fmt: skip


def written(grammar: Grammar, draw: random.Random, limit: int = 300) -> bytes:
    """A text along a random way, ended as soon as it may after `limit` bytes."""
    state: State | None = grammar.start
    data = b""
    while True:
        assert state is not None
        if state.accepting and (not state.mask or draw.random() < 0.3):
            return data
        if len(data) > limit:
            return data + state.soonest
        byte = draw.choice([byte for byte in range(256) if state.mask >> byte & 1])
        data += bytes([byte])
        state = grammar.advance(state, bytes([byte]))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_whatever_is_written_is_valid(schema: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    grammar, draw = read_schema(schema), random.Random(11)
    for _ in range(40):
        validator.validate(json.loads(written(grammar, draw)))
    validator.validate(json.loads(grammar.start.soonest))


def test_valid_texts_are_matched() -> None:
    """What a model would write by itself, with a blank after colons and commas or without."""
    grammar = read_schema(SCHEMAS[0])
    for text in (
        '{"name":"Ada","tags":["a"]}',
        '{"name": "Ada", "age": 36, "tags": ["a", "b\\"\\\\"], "score": -1.5e3, "share": 0.25}',
        '{"name": "\\u00e9\\n😀", "tags": [null, 3], "key é\\n": true}',
    ):
        assert grammar.matches(text.encode()), text
    for text in ('{"name":"","tags":["a"]}', '{"tags":["a"],"name":"x"}', '{"name":"x","tags":[]}', "{}",
                 '{"name":"x","tags":["a"],"more":1}', '{"name":"x","tags":["a"]} '):  # fmt: skip
        assert not grammar.matches(text.encode()), text
    assert read_schema(NODE).matches(b'{"value": 1, "next": {"value": 2, "next": null}}')


def test_any_object() -> None:
    draw = random.Random(2)
    for _ in range(100):
        assert isinstance(json.loads(written(any_object(), draw)), dict)
    assert any_object().matches(b'{"a": [1, {"b": "\\ud7ff"}], "c": null}')
    assert not any_object().matches(b'{"a": "\\ud800"}')
    assert not any_object().matches(b"[]")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (None, "not an object"),
        (False, "not an object"),
        ({"type": "thing"}, "type"),
        ({"type": []}, "type"),
        ({"not": {}}, "'not'"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"$ref": "http://example.org/x"}, "#/$defs/NAME"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": "#"}, "no text at all"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text at all"),
        ({"$defs": {"a": {"$ref": "#/$defs/a", "type": "string"}}, "$ref": "#/$defs/a"}, "circle"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "without a whole number"),
        ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "without a whole number"),
        ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 0.5}, "without a number between"),
        ({"type": "number", "minimum": 0.5, "exclusiveMinimum": 0.5, "maximum": 0.5}, "without a number between"),
        ({"type": "integer", "minimum": "x"}, "minimum"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "minLength": 4, "maxLength": 2}, "below"),
        ({"type": "string", "pattern": "a", "maxLength": 2}, "joins"),
        ({"type": "string", "pattern": "("}, "no regular expression"),
        ({"enum": []}, "enum"),
        ({"enum": ["abc"], "maxLength": 2}, "joins"),
        ({"type": "string", "enum": [1]}, "no value"),
        ({"anyOf": []}, "anyOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "both #/oneOf/0 and #/oneOf/1"),
        ({"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}, "oneOf forbids"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "says type twice"),
        ({"allOf": [{"type": "object", "properties": {"a": {}}, "additionalProperties": False},
                    {"properties": {"b": {}}, "required": ["b"]}]}, "closes"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "forbids"),
        ({"type": "object", "properties": [1]}, "wrong type"),
        ({"type": "array", "minItems": 3, "items": False}, "allows none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_schema(schema)
    assert words in str(caught.value)


def test_deep_and_large_schemas_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(DataError, match="too deep"):
        read_schema(deep)
    with pytest.raises(DataError, match="too large"):
        read_schema({"type": "object", "properties": {str(i): {"type": "null"} for i in range(30_000)}})
