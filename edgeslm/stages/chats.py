"""Conversations as a model's chat template renders them: where a tokenizer's template, BOS and EOS are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeslm.errors import DataError, ModelError

Messages = Sequence[Mapping[str, str]]
Chat = Callable[[str, Messages, str, str, bool], str]
"""(template, messages, BOS, EOS, whether the beginning of an answer is asked for) -> text."""
Render = Callable[[Messages, bool], str]
"""(messages, whether the beginning of an answer is asked for) -> text."""


def template_of(tokenizer: Any) -> str | None:
    """A tokenizer's chat template, of several the one called default; None without any."""
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return str(template) if template else None


def renderer(tokenizer: Any, chat: Chat | None) -> Render:
    """Conversations as text by the tokenizer's template; chat: None for transformers' own way.

    What it returns raises DataError for a tokenizer without a template.
    """

    def render(messages: Messages, asks: bool) -> str:
        template = template_of(tokenizer)
        if not template:
            raise DataError(
                "the text has conversations and the model has no chat template",
                hint="use plain text, or put the template into tokenizer_config.json",
            )
        if chat is not None:
            return chat(template, messages, tokenizer.bos_token or "", tokenizer.eos_token or "", asks)
        try:
            return str(
                tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
            )
        except Exception as error:  # whatever a template raises, it is the template's fault
            raise ModelError(f"the model's chat template refuses a conversation: {error}") from error

    return render
