"""Chat templates: rendered as transformers renders them, and in a sandbox."""

from __future__ import annotations

from datetime import datetime

import pytest

from edgeslm.errors import ModelError
from edgeslm.runtime.template import render_chat

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
FEATURES = """{# a comment #}
{% set ns = namespace(turns=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
    {% if message.role == 'assistant' %}
{% generation %}
A{{ ns.turns }}: {{ message.content }}{{ eos_token }}
{% endgeneration %}
    {% else %}
U{{ ns.turns }}: {{ message | tojson }} {{ message.content | tojson(indent=2) }}
    {% endif %}
    {% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}
{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}
{{ ({'b': 1, 'a': 2}) | tojson(sort_keys=true, separators=(',', ':')) }}
{% if tools is none and documents is none %}no tools{% endif %}
{% macro turn(x) %}[{{ x }}]{% endmacro %}{{ turn(messages | length) }}
{{- "prompt" if add_generation_prompt }}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "features": FEATURES}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "  1 < 2 & \"x\" 'é' 😀\n"},
    ],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "{{ c }} {% d %}"},
    ],
}


@pytest.mark.workstation
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_transformers(template: str, conversation: str, add_generation_prompt: bool) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    fast = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<bos>", eos_token="<eos>"
    )
    expected = fast.apply_chat_template(
        CONVERSATIONS[conversation],
        chat_template=TEMPLATES[template],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    ours = render_chat(
        TEMPLATES[template], CONVERSATIONS[conversation], "<bos>", "<eos>", add_generation_prompt
    )
    assert ours == expected


def test_the_date_is_the_callers() -> None:
    text = render_chat(LLAMA3, CONVERSATIONS["one"], "<bos>", now=lambda: datetime(2031, 5, 6))
    assert text.startswith("<bos><|start_header_id|>system<|end_header_id|>\n\nToday Date: 06 May 2031\n\n")


def test_a_mark_that_the_model_lacks_is_undefined() -> None:
    assert render_chat("{{ bos_token }}{{ 'x' if eos_token is defined else 'y' }}", []) == "y"


def test_a_template_may_refuse() -> None:
    with pytest.raises(ModelError, match="roles must alternate"):
        render_chat(GEMMA, [{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[9]['x'] }}",
    ],
)
def test_a_broken_template_is_one_clear_error(template: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        render_chat(template, CONVERSATIONS["one"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ strftime_now.func }}{{ strftime_now.func.x }}",
        "{{ range(10**9) | list }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_can_not_leave_the_sandbox(template: str) -> None:
    with pytest.raises(ModelError):
        render_chat(template, CONVERSATIONS["one"])


def test_a_template_is_compiled_once_and_keeps_nothing_of_a_render(monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    compiled = []
    compile_one = ImmutableSandboxedEnvironment.from_string
    monkeypatch.setattr(
        ImmutableSandboxedEnvironment,
        "from_string",
        lambda self, source: compiled.append(source) or compile_one(self, source),
    )
    template = LLAMA3 + "{# compiled once #}"
    for year in (2031, 2032, 2033):
        text = render_chat(
            template, CONVERSATIONS["one"], f"<bos {year}>", now=lambda year=year: datetime(year, 5, 6)
        )
        assert f"06 May {year}" in text
        assert text.startswith(f"<bos {year}>")
    assert compiled == [template]
    assert "bos" not in render_chat(template, CONVERSATIONS["one"])
