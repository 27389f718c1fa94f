"""Chat templates: rendered as transformers renders them; hostile ones are refused quickly and without harm."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.errors import CheckpointError, RequestError
from minillm.text.template import ChatTemplate

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. <&>"},
    {"role": "user", "content": " What's 2+2?\n"},
    {"role": "assistant", "content": "4 é 🙂"},
    {"role": "user", "content": "And 3+3?"},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}, "ü": [1, 2.5, None]}}}
]

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
INST = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' ~ system_message ~ message['content'] ~ ' [/INST]' }}
        {%- set system_message = '' %}
    {%- else %}
        {%- generation %}{{- ' ' + message.content.strip() + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
TOOLED = """{%- set ns = namespace(last=-1, names=[]) %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% else %}{% continue %}{% endif %}
{%- set ns.names = ns.names + [m.role | upper] %}
{%- endfor %}
{%- macro show(tool) %}{{ tool.function.name }}: {{ tool | tojson(indent=2) }}
{% endmacro %}
{%- if tools is defined and tools %}{% for tool in tools %}{{ show(tool) }}{% endfor %}{% endif %}
{{- ns.last }} {{ ns.names | join(',') }} {{ dict(a=1) | tojson }} {{ messages | map(attribute='role') | list | count }}
{{- messages | selectattr('role', 'equalto', 'user') | list | last | tojson }}
{%- for key, value in messages[0].items() %}{{ key }}={{ value.split(' ')[0] | replace('B', 'b') }};{% endfor %}
{{- '%s-%d' % ('x', 3) }} {{ 'ab' * 2 }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ range(3) | list }} {{ none is none }}
{%- for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{- messages[-1].content is string }}{{ undefined_thing }}{{ documents }} {{ 'é' | tojson }}"""


@pytest.mark.parametrize("source", [CHATML, INST, TOOLED], ids=["chatml", "inst", "tools"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompted", [True, False])
def test_rendered_as_transformers_does(source: str, tools: list[dict[str, Any]] | None, prompted: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
        expected, _ = render_jinja_template(
            [messages], tools=tools, chat_template=source, add_generation_prompt=prompted, **NAMED
        )
        found = ChatTemplate(source, NAMED).render(messages, tools=tools, add_generation_prompt=prompted)
        assert found == expected[0]


def test_strftime_now_formats_the_time() -> None:
    from datetime import datetime

    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(MESSAGES)
    assert abs(int(text) - datetime.now().year) <= 1


def test_a_template_can_refuse_messages() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        ChatTemplate(INST, NAMED).render([MESSAGES[2]])


GROW = "{% set ns = namespace(x='aaaaaaaa', l=[1]) %}{% for i in range(100) %}"
HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ namespace.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os }}",
    "subclasses": "{{ messages[0].__class__.__base__.__subclasses__() }}",
    "mapped attribute": "{{ messages | map(attribute='__class__') | map(attribute='__base__') | first }}",
    "mutation": "{{ messages.append(1) }}",
    "hidden variable": "{% set ns = namespace(_a=1) %}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "repetition": "{{ 'a' * 10**10 }}",
    "list repetition": "{{ [0] * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "concatenation": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "sum": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested lists as text": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | string | length }}",
    "nested lists joined": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ 'x' ~ ns.l }}",
    "nested lists formatted": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ '%s' % (ns.l,) }}",
    "replace filter": "{{ ('a' * 9**6) | replace('', 'b' * 9**6) }}",
    "replace method": "{{ ('a' * 9**6).replace('', 'b' * 9**6) }}",
    "join": "{{ range(99999) | join('b' * 9**6) }}{{ (range(99999) | map('string') | list) | join('b' * 9**6) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format star": "{{ '%*d' % (1000000000, 1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "padding": "{{ 'a'.center(10**9) }}{{ 'a'.zfill(10**9) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "long output": "{% for i in range(9999) %}{{ 'a' * 9**6 }}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_templates_are_refused(source: str) -> None:
    template = ChatTemplate(source, NAMED)
    with pytest.raises(RequestError, match=r"the chat template (refuses these messages|calls itself too often)"):
        template.render(MESSAGES)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% endif %}", "a" * (1 << 18) + "a"])
def test_templates_that_do_not_compile_are_checkpoint_errors(source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template"):
        ChatTemplate(source, {})


def test_messages_are_plain_values_and_stay_unchanged() -> None:
    class Hidden:
        pass

    template = ChatTemplate("{% set messages = messages[1:] %}{{ messages[0].content }}", {})
    before = [dict(m) for m in MESSAGES]
    assert template.render(MESSAGES) == MESSAGES[1]["content"]
    assert before == MESSAGES
    with pytest.raises(RequestError, match="type Hidden"):
        template.render([{"role": "user", "content": Hidden()}])
    with pytest.raises(RequestError, match="at least one message"):
        template.render([])


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": role, "content": "word " * 400} for _ in range(500) for role in ("user", "assistant")]
    assert len(ChatTemplate(CHATML, {}).render(messages)) > 2_000_000
