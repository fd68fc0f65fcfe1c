"""What the server takes, as JSON Schemas: the description at /openapi.json, and the check of every request by it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_STOPS = 16
MOST_MESSAGES = 4096
MOST_INPUTS = 4096
MOST_EMBEDDED = 2048
"""Texts of one request for embeddings, as at OpenAI."""


def _maybe(kind: str, **more: Any) -> dict[str, Any]:
    """A value that may also be null: not given."""
    return {"type": [kind, "null"], **more}


_TEXT = {"type": "string"}
_SOME_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": _TEXT},
    "required": ["type", "text"],
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}]},
    },
    "required": ["role", "content"],
}
SHARED: dict[str, Any] = {
    "model": _maybe("string"),
    "max_tokens": _maybe("integer", minimum=1),
    "temperature": _maybe("number", minimum=0, maximum=100),
    "top_p": _maybe("number", minimum=0, maximum=1),
    "top_k": _maybe("integer", minimum=0),
    "min_p": _maybe("number", minimum=0, maximum=1),
    "repeat_penalty": _maybe("number", minimum=0.01, maximum=100),
    "seed": _maybe("integer", minimum=-(2**63), maximum=2**63 - 1),
    "stop": {
        "anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MOST_STOPS}, {"type": "null"}]
    },
    "stream": _maybe("boolean"),
    "stream_options": _maybe("object", properties={"include_usage": _maybe("boolean")}),
    "n": _maybe("integer", minimum=1, maximum=1),
    "frequency_penalty": _maybe("number", minimum=0, maximum=0),
    "presence_penalty": _maybe("number", minimum=0, maximum=0),
    "grammar": _maybe("string"),
    "response_format": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"type": {"enum": ["json_schema"]}, "json_schema": {
                    "type": "object",
                    "properties": {"schema": {"type": ["object", "boolean"]}, "name": _TEXT},
                    "required": ["schema"],
                }},
                "required": ["type", "json_schema"],
            },
            {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
            {"type": "null"},
        ]
    },
}  # fmt: skip
CHAT = {
    "type": "object",
    "properties": {
        "messages": {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": MOST_MESSAGES},
        **SHARED,
        "max_completion_tokens": _maybe("integer", minimum=1),
        "logprobs": _maybe("boolean"),
        "top_logprobs": _maybe("integer", minimum=0, maximum=20),
        "tools": {"type": ["array", "null"], "maxItems": 0},
    },
    "required": ["messages"],
}
COMPLETION = {
    "type": "object",
    "properties": {
        "prompt": {
            "anyOf": [
                _SOME_TEXT,
                _TOKENS,
                {"type": "array", "items": _SOME_TEXT, "minItems": 1, "maxItems": 1},
            ]
        },
        **SHARED,
        "logprobs": _maybe("integer", minimum=0, maximum=20),
        "echo": {"enum": [False, None]},
        "best_of": _maybe("integer", minimum=1, maximum=1),
        "suffix": {"type": "null"},
    },
    "required": ["prompt"],
}  # fmt: skip
EMBEDDINGS = {
    "type": "object",
    "properties": {
        "model": _maybe("string"),
        "input": {
            "anyOf": [
                _SOME_TEXT,
                {"type": "array", "items": _SOME_TEXT, "minItems": 1, "maxItems": MOST_EMBEDDED},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MOST_EMBEDDED},
            ]
        },
        "encoding_format": {"enum": ["float", "base64", None]},
        "dimensions": _maybe("integer", minimum=1),
    },
    "required": ["input"],
}  # fmt: skip
CLASSIFY = {
    "type": "object",
    "properties": {
        "input": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_INPUTS},
            ]
        }
    },
    "required": ["input"],
}
PREDICT = {
    "type": "object",
    "properties": {
        "windows": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "array", "items": _maybe("number")}},
            "minItems": 1,
            "maxItems": MOST_INPUTS,
        }
    },
    "required": ["windows"],
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}  # fmt: skip
POSTS = {
    "/v1/chat/completions": (CHAT, "Answer a conversation; with stream as server-sent events."),
    "/v1/completions": (COMPLETION, "Continue a text, with no chat template."),
    "/v1/embeddings": (EMBEDDINGS, "Vectors of texts, where the model can."),
    "/classify": (CLASSIFY, "Classes of texts."),
    "/predict": (PREDICT, "Classes of windows of sensor readings; null is a missing reading."),
}
GETS = {
    "/v1/models": ("application/json", "The one model that is served."),
    "/healthz": ("application/json", "Whether the server takes requests."),
    "/metrics": ("text/plain", "Counters in Prometheus' format."),
}
FAILURES = {
    400: "The request can't be understood or carried out.", 401: "The API key is missing or wrong.",
    403: "The request's Host is not this machine.", 404: "There is no such model or path.",
    408: "The request's body came too slowly.", 413: "The request's body is too large.",
    415: "The request's body is not application/json.", 429: "The queue is full: see Retry-After.",
    500: "The engine failed.", 501: "The model can't do this.", 503: "The server is stopping.",
}  # fmt: skip


def document(name: str, version: str, *, keyed: bool) -> dict[str, Any]:
    """The OpenAPI description (3.1) of a server of the model `name`."""
    failures = {
        str(status): {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in FAILURES.items()
    }
    paths: dict[str, Any] = {}
    for path, (schema, text) in POSTS.items():
        streams = "stream" in schema["properties"]
        kinds = ("application/json", "text/event-stream") if streams else ("application/json",)
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {
                    "200": {"description": "Done.", "content": {kind: {} for kind in kinds}},
                    **failures,
                },
            }
        }
    for path, (kind, text) in GETS.items():
        answers = {"200": {"description": "Done.", "content": {kind: {}}}}
        paths[path] = {"get": {"summary": text, "responses": {**answers, **failures}}}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"edgeslm serve {name}", "version": version},
        "paths": paths,
    }
    if keyed:
        described["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        described["security"] = [{"key": []}]
    return described


def fault(value: Any, schema: Mapping[str, Any], where: str = "") -> tuple[str, str] | None:
    """What of a JSON value breaks a schema of this module, as (place, words); None: nothing."""
    if "anyOf" in schema:
        faults = [found for option in schema["anyOf"] if (found := fault(value, option, where))]
        # The option that got furthest tells most, unless one is right but for its length.
        told = max(faults, key=lambda found: (found[1].startswith("has "), len(found[0])), default=None)
        return told if len(faults) == len(schema["anyOf"]) else None
    if "enum" in schema and not any(type(value) is type(one) and value == one for one in schema["enum"]):
        wanted = ", ".join("null" if one is None else str(one).lower() for one in schema["enum"])
        return where, f"is {_shown(value)}, not one of {wanted}"
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        return where, f"is {_shown(value)}, not of type {' or '.join(kinds)}"
    if isinstance(value, dict):
        return _object_fault(value, schema, where)
    if isinstance(value, list):
        return _list_fault(value, schema, where)
    wrong = _size_fault(value, schema)
    return (where, wrong) if wrong else None


def _list_fault(value: list[Any], schema: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    wrong = _length_fault(len(value), schema, "Items", "entries")
    if wrong:
        return where, wrong
    inner = schema.get("items", {})
    faults = (fault(one, inner, f"{where}[{i}]") for i, one in enumerate(value))
    return next((found for found in faults if found), None)


def _size_fault(value: Any, schema: Mapping[str, Any]) -> str:
    """What is wrong with the length of a text or the size of a number."""
    if isinstance(value, str):
        return _length_fault(len(value), schema, "Length", "characters")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    return "" if low <= value <= high else f"is {_shown(value)}, not from {low} to {high}"


def _object_fault(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> tuple[str, str] | None:
    prefix = f"{where}." if where else ""
    for name, inner in schema.get("properties", {}).items():
        if name in value and (found := fault(value[name], inner, f"{prefix}{name}")):
            return found
    for name in schema.get("required", ()):
        if name not in value:
            return f"{prefix}{name}", "is missing"
    return None


def _length_fault(size: int, schema: Mapping[str, Any], kind: str, what: str) -> str:
    low, high = schema.get(f"min{kind}", 0), schema.get(f"max{kind}", math.inf)
    return "" if low <= size <= high else f"has {size} {what}, not {low} to {high}"


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return math.isfinite(value) and (kind == "number" or (kind == "integer" and value.is_integer()))
    classes: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": int}
    return kind in classes and isinstance(value, classes[kind])


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:57]}..."
