"""JSON, and JSON Schema (draft 2020-12), as grammars: whatever the grammar matches is valid.

Objects come with their properties in the schema's order, at most one blank after ',' and ':'.  The grammar may
match less than the schema allows; a keyword that it can't honour is refused, so that it never matches more.
"""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError
from edgeslm.runtime.gbnf import LAST, Ranges, read_regex
from edgeslm.runtime.grammar import Alt, Byte, Grammar, Node, Ref, Rep, Seq, characters, literal, mask_of
from edgeslm.runtime.json_apart import Apart
from edgeslm.runtime.json_schema import ASSERTING, bounds, implied_type, is_of, is_texts, merged, target
from edgeslm.runtime.number_ranges import any_number, integers, numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REFUSED = (
    "not", "if", "then", "else", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas",
    "dependencies", "uniqueItems", "contains", "minContains", "maxContains", "multipleOf", "minProperties",
    "maxProperties", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Keywords that a grammar of this kind can't check."""
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
DEEPEST = 48
MOST_NODES = 20_000
FORMATS = {
    "date": r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(\.(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)){3}",
    "email": r"[a-z0-9]+([._-][a-z0-9]+)*@[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)*\.[a-z]{2,8}",
}
FORMATS["date-time"] = f"{FORMATS['date']}T{FORMATS['time']}"
_BLANK = Rep(Byte(1 << 32), 0, 1)
_QUOTE = literal('"')
_HEX = Byte(mask_of(48, 57) | mask_of(65, 70) | mask_of(97, 102))


def read_schema(schema: Any) -> Grammar:
    """The grammar of a JSON Schema.  Raises DataError, with the place, for what it can't honour."""
    compiler = _Compiler(schema)
    root = compiler.node(schema, "#", 0)
    return Grammar(root, compiler.rules)


def any_object() -> Grammar:
    """The grammar of every JSON object."""
    compiler = _Compiler({})
    return Grammar(compiler.object_of(None), compiler.rules)


def _between(first: str, items: Node, last: str) -> Node:
    return Seq([literal(first), items, literal(last)])


def _separated(item: Node, low: int, high: int | None) -> Node:
    """low to high items with commas between them."""
    if high == 0:
        return Seq([])
    more = Rep(Seq([_COMMA, item]), max(0, low - 1), None if high is None else high - 1)
    list_ = Seq([item, more])
    return list_ if low else Rep(list_, 0, 1)


_COMMA = Seq([literal(","), _BLANK])
_COLON = Seq([literal(":"), _BLANK])


def json_character(ranges: Ranges) -> Node:
    """One character of a JSON string, escaped where it must be; any by \\u where all characters may come."""
    options: list[Node] = []
    plain: Ranges = []
    for low, high in ranges:
        for start, end in ((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST)):
            if max(low, start) <= min(high, end):
                plain.append((max(low, start), min(high, end)))
        options += [literal(f"\\{chr(code)}") for code in (0x22, 0x5C) if low <= code <= high]
        options += [literal(json.dumps(chr(code))[1:-1]) for code in range(low, min(high, 0x1F) + 1)]
    if plain:
        options.append(characters(plain))
    return options[0] if len(options) == 1 else Alt(options)


def _any_character() -> Node:
    """One character of a JSON string in any of its spellings, but for half surrogate pairs."""
    low = Seq([Byte(_bytes(b"0123456789ABCEFabcef")), _HEX])
    middle = Seq([Byte(_bytes(b"Dd")), Byte(mask_of(48, 55))])
    code = Seq([literal("\\u"), Alt([low, middle]), _HEX, _HEX])
    escape = Seq([literal("\\"), Byte(_bytes(b'"\\/bfnrt'))])
    return Alt([characters([(0x20, 0x21), (0x23, 0x5B), (0x5D, LAST)]), escape, code])


def _bytes(data: bytes) -> int:
    return sum(1 << byte for byte in data)


class _Compiler:
    """One schema on its way to rules; rules: what $ref and values of any kind refer to."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._apart = Apart(schema)
        self._made = 0
        self._text = _any_character()
        self.rules: dict[str, Node] = {"character": self._text}
        self._string = Seq([_QUOTE, Rep(Ref("character")), _QUOTE])
        scalars = [
            self._string,
            any_number(),
            *(literal(word) for word in ("true", "false", "null")),
        ]
        value = Ref("value")
        self.rules["object"] = self.object_of(value)
        self.rules["array"] = _between("[", _separated(value, 0, None), "]")
        self.rules["value"] = Alt([*scalars, Ref("object"), Ref("array")])

    def object_of(self, value: Node | None) -> Node:
        """Any object whose values are `value`; None: anything."""
        pair = Seq([self._string, _COLON, value or Ref("value")])
        return _between("{", _separated(pair, 0, None), "}")

    def node(self, schema: Any, where: str, depth: int) -> Node:
        """The values of a schema."""
        self._made += 1
        if depth > DEEPEST or self._made > MOST_NODES:
            raise DataError(f"the schema is too large or too deep at {where}")
        if not isinstance(schema, dict):
            if schema is True:
                return Ref("value")
            raise DataError(f"the schema at {where} is {str(schema)[:40]!r}, not an object")
        if refused := next((key for key in REFUSED if schema.get(key) not in (None, False)), None):
            raise DataError(
                f"the schema's keyword {refused!r} at {where} can't be honoured", hint="leave it out"
            )
        asserted = [key for key in schema if key in ASSERTING]
        if asserted == ["$ref"] and "allOf" not in schema:
            return self._reference(schema["$ref"], where, depth)
        if "$ref" in schema or "allOf" in schema:
            own = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
            refs = [{"$ref": schema["$ref"]}] if "$ref" in schema else []
            parts = {"allOf": [own, *refs, {"allOf": schema.get("allOf", [])}]}
            return self.node(merged(self._schema, parts, where), where, depth + 1)
        return self._plain(schema, where, depth)

    def _plain(self, schema: Mapping[str, Any], where: str, depth: int) -> Node:
        """The values of a schema without references and allOf."""
        if "const" in schema or "enum" in schema:
            return self._constants(schema, where)
        if either := next((key for key in ("anyOf", "oneOf") if key in schema), ""):
            return self._either(schema, either, where, depth)
        kinds = schema.get("type", implied_type(schema))
        if kinds is None:
            return Ref("value")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or not all(kind in TYPES for kind in kinds):
            raise DataError(
                f"the schema's type at {where} is {str(kinds)[:60]}", hint=f"one of {', '.join(TYPES)}"
            )
        nodes = [self._typed(kind, schema, where, depth) for kind in kinds]
        return nodes[0] if len(nodes) == 1 else Alt(nodes)

    def _typed(self, kind: str, schema: Mapping[str, Any], where: str, depth: int) -> Node:
        if kind == "object":
            return self._object(schema, where, depth)
        if kind == "array":
            return self._array(schema, where, depth)
        if kind == "string":
            return self._texts(schema, where)
        if kind in ("integer", "number"):
            return self._numbers(kind, schema, where)
        return literal("null") if kind == "null" else Alt([literal("true"), literal("false")])

    def _object(self, schema: Mapping[str, Any], where: str, depth: int) -> Node:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        more = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not is_texts(required):
            raise DataError(f"the schema's properties or required names at {where} have the wrong type")
        if missing := [name for name in required if name not in properties]:
            if more is False:
                raise DataError(f"the schema at {where} requires {missing[0]!r} and forbids it")
            properties = properties | dict.fromkeys(missing, more)
        if not properties:
            if more is False:
                return literal("{}")
            return self.object_of(self.node(more, f"{where}/additionalProperties", depth + 1))
        pairs = []
        for name, inner in properties.items():
            if inner is False:
                continue
            value = self.node(inner, f"{where}/properties/{name}", depth + 1)
            key = literal(_written(name))
            pairs.append((Seq([key, _COLON, value]), name in required))
        return _between("{", _listed(pairs), "}")

    def _array(self, schema: Mapping[str, Any], where: str, depth: int) -> Node:
        low, high = bounds(schema, "minItems", "maxItems", where)
        first = schema.get("prefixItems") or []
        items = schema.get("items", True)
        if not isinstance(first, list):
            raise DataError(f"the schema's prefixItems at {where} are no list")
        fixed = [self.node(one, f"{where}/prefixItems/{i}", depth + 1) for i, one in enumerate(first)][:high]
        rest = Seq([]) if items is False else self.node(items, f"{where}/items", depth + 1)
        most = 0 if items is False else None if high is None else high - len(fixed)
        if not fixed:
            if low and most == 0:
                raise DataError(f"the schema at {where} wants {low} items and allows none")
            return _between("[", _separated(rest, low, most), "]")
        if low > len(fixed) and most == 0:
            raise DataError(f"the schema at {where} wants {low} items and allows {len(fixed)}")
        tail: Node = Rep(Seq([_COMMA, rest]), max(0, low - len(fixed)), most)
        for number in range(len(fixed) - 1, 0, -1):
            tail = Seq([_COMMA, fixed[number], tail])
            if number >= low:
                tail = Rep(tail, 0, 1)
        list_ = Seq([fixed[0], tail])
        return _between("[", list_ if low else Rep(list_, 0, 1), "]")

    def _texts(self, schema: Mapping[str, Any], where: str) -> Node:
        low, high = bounds(schema, "minLength", "maxLength", where)
        pattern = schema.get("pattern", FORMATS.get(str(schema.get("format"))))
        if pattern is None:
            return Seq([_QUOTE, Rep(Ref("character"), low, high), _QUOTE])
        if not isinstance(pattern, str) or low or high is not None:
            raise DataError(
                f"the schema at {where} joins a pattern or format with lengths", hint="use one of them"
            )
        return Seq([_QUOTE, read_regex(pattern, json_character), _QUOTE])

    def _numbers(self, kind: str, schema: Mapping[str, Any], where: str) -> Node:
        low: tuple[float, bool] = -math.inf, False  # the bound, and whether it is left out
        high: tuple[float, bool] = math.inf, True  # the bound, and whether it is not
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            value = schema.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
                raise DataError(f"the schema's {key} at {where} is {str(value)[:40]}", hint="at most 1e15")
            outside = key.startswith("exclusive")
            low, high = (
                (max(low, (value, outside)), high)
                if "inimum" in key
                else (low, min(high, (value, not outside)))
            )
        if kind == "integer":
            first = math.floor(low[0]) + 1 if low[1] else low[0]
            last = high[0] if high[1] else math.ceil(high[0]) - 1
            found = integers(first, last)
        else:
            found = numbers(low[0], high[0], above=low[1], below=not high[1])
        if found is None:
            what = "whole number" if kind == "integer" else "number"
            raise DataError(f"the schema at {where} has bounds without a {what} between them")
        return found

    def _constants(self, schema: Mapping[str, Any], where: str) -> Node:
        if more := [key for key in schema if key in ASSERTING and key not in ("const", "enum", "type")]:
            raise DataError(f"the schema at {where} joins enum or const with {more[0]}", hint="leave it out")
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise DataError(f"the schema's enum at {where} is no list of values")
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        kept = [value for value in values if not kinds or any(is_of(value, kind) for kind in kinds)]
        if "enum" in schema and "const" in schema:
            kept = [value for value in kept if value in schema["enum"]]
        if not kept:
            raise DataError(f"the schema at {where} allows no value")
        return Alt([literal(_written(value)) for value in kept])

    def _either(self, schema: Mapping[str, Any], key: str, where: str, depth: int) -> Node:
        options = schema[key]
        if not isinstance(options, list) or not options:
            raise DataError(f"the schema's {key} at {where} is no list of schemas")
        shared = {name: value for name, value in schema.items() if name != key and name in ASSERTING}
        places = {
            f"{where}/{key}/{number}": option for number, option in enumerate(options) if option is not False
        }
        for place, option in places.items():
            if shared:
                places[place] = merged(self._schema, {"allOf": [shared, option]}, place)
        for (place, first), (other, second) in combinations(places.items(), 2) if key == "oneOf" else ():
            if not self._apart.holds(first, second):
                raise DataError(
                    f"a value may be of both {place} and {other}, which oneOf forbids",
                    hint="use anyOf, or require a property with a const of its own in each",
                )
        return Alt([self.node(option, place, depth + 1) for place, option in places.items()])

    def _reference(self, name: Any, where: str, depth: int) -> Node:
        found = target(self._schema, name, where)
        rule = f"$ref {name}"
        if rule not in self.rules:
            self.rules[rule] = Seq([])  # stands for itself while its own parts are read
            self.rules[rule] = self.node(found, str(name), depth + 1)
        return Ref(rule)


def _listed(pairs: Sequence[tuple[Node, bool]]) -> Node:
    """Pairs of an object in order, commas between those that are there; the flag says which must be."""
    after: Node = Seq([])
    tails: list[Node] = [after]
    for pair, needed in reversed(pairs):
        step = Seq([_COMMA, pair, tails[0]])
        tails.insert(0, step if needed else Alt([step, tails[0]]))
    options: list[Node] = []
    for number, (pair, needed) in enumerate(pairs):
        options.append(Seq([pair, tails[number + 1]]))
        if needed:
            return options[0] if len(options) == 1 else Alt(options)
    return Alt([*options, Seq([])])


def _written(value: Any) -> str:
    """A value as JSON; half of a surrogate pair, which UTF-8 can't say, by its number."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if any("\ud800" <= one <= "\udfff" for one in text) else text
