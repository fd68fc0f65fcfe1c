"""Chat templates as transformers renders them (utils/chat_template_utils.py), in Jinja's sandbox.

A template is a program out of the model's file: it gets no attribute that leads to the interpreter
and can't change its arguments.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    from edgeslm.runtime.runner import Runner


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    bos: str = "",
    eos: str = "",
    add_generation_prompt: bool = True,
    *,
    now: Callable[[], datetime] = datetime.now,
) -> str:
    """The text of `messages` ({role, content}) with the model's own marks around them.

    bos, eos: the text of those tokens, "" where the model has none.  now: for templates that put
    in the date.  Raises ModelError when the template is broken or refuses the messages.
    """
    marks = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text}
    try:
        return _compiled(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: now().strftime(form),
            **marks,
        )
    except TemplateError as error:
        raise ModelError(
            f"the model's chat template refuses this: {error}",
            hint="leave the system message out, keep turns alternating, or use edgeslm generate",
        ) from error
    except Exception as error:  # whatever a template raises, it is the template's fault
        raise ModelError(
            f"the model's chat template fails: {type(error).__name__}: {error}", hint="use edgeslm generate"
        ) from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """A template as Python code: compiling takes a hundred times longer than rendering."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}: marks what the assistant wrote, for training; here its text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


def conversation_tokens(runner: Runner, template: str, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation with the head of the answer to come behind it."""
    facts = runner.facts
    bos, eos = (
        "" if token is None else runner.token_bytes(token, special=True).decode(errors="replace")
        for token in (facts.bos_token, facts.eos_token)
    )
    text = render_chat(template, messages, bos, eos, add_generation_prompt=True)
    tokens = runner.tokenize(text, add_special=False, parse_special=True)
    # Some templates write the beginning-of-text mark themselves, some leave it to the tokenizer.
    if facts.adds_bos and facts.bos_token is not None and tokens[:1] != [facts.bos_token]:
        tokens.insert(0, facts.bos_token)
    return tokens
