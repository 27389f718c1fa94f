"""Chat templates: rendered as transformers renders them; hostile ones are refused quickly and without harm."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import pytest

from minillm.errors import CheckpointError, RequestError
from minillm.text import template as template_module
from minillm.text.template import MAX_TOTAL, ChatTemplate

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
{% set block %}{{ bos_token }}-{{ messages | length }}{% endset %}{{ block }}
{%- for m in messages[::-1] %}{{ loop.index0 }}{{ (messages | length - 1) - loop.index0 }}{{ loop.previtem is defined }}
{%- if m.content is string and not (m.content.startswith('<tool>') and m.content.endswith('</tool>')) %}
{{- m.content.split('</think>')[-1].lstrip('\n') ~ m.content.split('</think>')[0].rstrip('\n').strip() }}{% endif %}
{%- endfor %}
{%- for name, value in {'x': 'y', 'n': 1} | items %}{{ name ~ '=' ~ value }}{% endfor %}
{%- set builtin = ['search', 'code'] %}{{ builtin | reject('equalto', 'code') | join(', ') }}
{{- '{} of {:>5}'.format('é', 3) }}{{ [1, 2] | tojson(indent=4) }}{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true) }}
{{- [] | tojson(indent=2) }}{{ [1, {'a': []}] | tojson(separators=(',', ':')) }}{{ '"' + 'a' | title + '"' }}
{%- macro kind(obj, context='x') %}{{ obj }}{{ context }}{% endmacro %}{{ kind(obj=1, context=2) }}
{%- for k in {'b': 1, 'a': 2} | dictsort %}{{ k[0] }}{% endfor %}{{ none | default('d') }}{{ nothing | d('e', true) }}
{{- 'x' in messages[0].values() }}{{ 'role' in messages[0].keys() }}{{ messages[0].get('name', 'nobody') }}
{{- {'a': 1}.items() | list }}{{ messages | map(attribute='role') | unique | list }}{{ 'a\nb' | indent(2) }}
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
    "hidden variable": "{% set ns = namespace(_a={'x': 1}) %}{{ ns._a.x }}",
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
    "bytes": "{{ ('x'.encode() * 2000000000) | length }}",
    "padded bytes": "{{ 'x'.encode().ljust(2000000000) | length }}",
    "whole numbers' methods": "{{ (5).to_bytes(2000000000) | length }}",
    "huge powers": "{% set ns = namespace(x=7) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "indented JSON": "{{ range(20000) | list | tojson(indent=65536) | length }}",
    "JSON indented by text": "{{ range(20000) | list | tojson(indent='x' * 65536) | length }}",
    "JSON separators": "{{ range(2000) | list | tojson(separators=('x' * 50000, ':')) | length }}",
    "JSON of shared texts": "{% set x = ['x' * 100000] * 200 %}{{ x | tojson | length }}",
    "join of a range": "{{ range(20000) | join('x' * 100000) | length }}",
    "join of a generator": "{{ ('x' * 100000).join(range(20000) | map('string')) | length }}",
    "join by keyword": "{{ range(20000) | join(d='x' * 100000) | length }}",
    "replace by keyword": "{{ ('a' * 9999) | replace(new='b' * 99999, old='a') | length }}",
    "indented carriage returns": "{{ ('\r' * 99999) | indent(9999) | length }}",
    "wide strftime": "{{ strftime_now('%099999999d') | length }}",
    "wide named format": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "repeated named format": "{{ ('%(a)s' * 9999) % {'a': 'x' * 99999} }}",
    "repeated format method": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "nested format method": "{{ '{:{}}'.format(1, 1000000000) }}",
    "long characters to strip": "{{ ('a' * 99999).strip('b' * 99999 + 'a') }}",
    "long attribute": "{{ range(9999) | map(attribute='0.' * 9999) | list }}",
    "block set": "{% set x %}{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}{% endset %}",
    "constant text": "{% macro f() %}{% for i in range(99999) %}" + "a" * 50000 + "{% endfor %}{% endmacro %}{{ f() }}",
    "many values": "".join(f"{{% set x{i} = 'a' * 150000 + '{i}' %}}" for i in range(999)),
    "many slices": "{% set x = 'a' * 150000 %}" + "".join(f"{{% set x{i} = x[{i}:] %}}" for i in range(999)),
    "many arguments": "{% set x = 'a' * 150000 %}{% macro f() %}{{ varargs | string | length }}{% endmacro %}{{ f("
    + "x, " * 999
    + "x) }}",
    "namespace in lists": "{% set ns = namespace() %}{% set l = [ns] * 9999 %}{% set ns.x = 'a' * 99999 %}{{ l }}"
    "{{ raise_exception('small') if (l | string | length) < 999999 }}",
    "long output": "{% for i in range(9999) %}{{ 'a' * 9**6 }}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_templates_are_refused_with_little_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_TURNS", 5_000)  # since traced memory is slow
    template = ChatTemplate(source, NAMED)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=r"the chat template (refuses these messages|calls itself too often)"):
            template.render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_TOTAL
    finally:
        tracemalloc.stop()


LATE = {
    "select": (10_000, "{{ range(50000) | select('in', range(50000) | list) }}"),
    "reject": (10_000, "{{ range(50000) | reject('in', range(50000) | list) }}"),
    "attributes": (10_000, "{{ range(50000) | selectattr('real') }}"),
    "list": (10_000, "{{ range(50000) | list }}"),
    "loops": (10_000, "{% for i in range(50000) %}{% endfor %}"),
    "filtered loops": (10_000, "{% for i in range(50000) if false %}{% endfor %}"),
    "comparisons": (3, "{% if 1 == 1 and 2 == 2 and 3 == 3 %}{% endif %}"),
    "filters": (3, "{% if 1 | string | string | string %}{% endif %}"),
    "tests": (3, "{% if 1 is number and 2 is number and 3 is number %}{% endif %}"),
    "methods": (3, "{% if 'a'.strip().strip().strip() %}{% endif %}"),
    "output": (3, "{{ 1 }}{{ 2 }}{{ 3 }}"),
}


@pytest.mark.parametrize(("num_looks", "source"), LATE.values(), ids=list(LATE))
def test_the_clock_is_looked_at_everywhere(num_looks: int, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock moves when it is looked at: so many looks use the time up."""
    template = ChatTemplate(source, NAMED)
    seconds = itertools.count(step=10.5 / num_looks)
    monkeypatch.setattr(template_module.time, "monotonic", lambda: next(seconds))
    with pytest.raises(RequestError, match="more than 10 seconds"):
        template.render(MESSAGES[:1])


DEEP = {
    "loops": "{% for a in messages %}" * 25 + "{% endfor %}" * 25,
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "operators": "{{ " + "not " * 3000 + "1 }}",
    "sums": "{{ " + "1+" * 20000 + "1 }}",
    "digits": "{{ " + "9" * 5000 + " }}",
}


@pytest.mark.parametrize(
    "source",
    [
        *("{% for %}", "{{ x | no_such_filter }}", "{% endif %}", "a" * (1 << 16) + "a", *DEEP.values()),
        *("{% include '/etc/passwd' %}", "{% block x %}{% endblock %}", "{% extends 'x' %}", "{% import 'x' as y %}"),
        *("{% filter upper %}a{% endfilter %}", "{% autoescape true %}{% endautoescape %}"),
        "{% set x | replace('a', 'b') %}a{% endset %}",
    ],
)
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
