"""Conversations in templates: what transformers renders, and what models wrote before."""

import json
from dataclasses import replace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from trinity.errors import InvalidRequest
from trinity.text.chat_template import CHATML, render_chat
from trinity.text.conversation import (
    MAX_CALLS,
    MAX_TOOLS,
    Chat,
    check_nesting,
    for_template,
    parsed_arguments,
    render,
)
from trinity.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": " oh \n"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "default": None, "b": "ä", "a": 1}},
}


def call(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(iter(["some words of a text \n" * 20]), 300)


def with_template(tokenizer, template):
    return Tokenizer(tokenizer._core, {}, template)


TEMPLATES = {
    "tags for training masks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    ),
    "tags with white space": (
        "{% for m in messages %}\n  {%- generation -%}\n {{ m.content }} \n{%- endgeneration -%}\n {% endfor %}"
    ),
    "tags around loops": (
        "{% generation %}{% for m in messages %}{{ loop.index }}{% set x = 1 %}{% endfor %}{% endgeneration %}{{ x }}"
    ),
    "a name in tags": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "tojson as in Python": (
        "{{ tools | tojson(ensure_ascii=True) }}{{ tools | tojson(2) }}"
        "{{ tools | tojson(sort_keys=True, separators=(',', ':')) }}"
    ),
    "tools": "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ extra }}",
    "ours": CHATML,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    template, messages = TEMPLATES[name], [USER, SAID, USER]
    own = {"bos_token": "<s>", "eos_token": "</s>"}
    wanted, _ = render_jinja_template(
        [messages], [TOOL], chat_template=template, add_generation_prompt=True, extra=1, **own
    )
    assert render_chat(template, messages, tools=[TOOL], arguments={"extra": 1}, **own) == wanted[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        ("{}", {}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ("1", "1"),
        ("", ""),
        ('{"a": "\\ud83d"}', '{"a": "\\ud83d"}'),
        ('{"a": "\\ud83d\\udc31"}', {"a": "\U0001f431"}),
        ('{"a": Infinity}', '{"a": Infinity}'),
        ('{"a": ' * 70 + "1" + "}" * 70, '{"a": ' * 70 + "1" + "}" * 70),
        ("[" * 100_000, "[" * 100_000),
        ('{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
    ],
)
def test_arguments_are_objects_or_stay_text(text, wanted):
    assert parsed_arguments(text) == wanted


def test_a_template_that_wants_objects_gets_some(trained):
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}@{% endfor %}{% endfor %}"
    pairs = "{% for key, value in c.function.arguments | items %}{{ key }}={{ value }};{% endfor %}"
    own = with_template(trained, template.replace("@", pairs))
    assert render(Chat([USER, call('{"a": 1, "b": "c"}')]), own) == "a=1;b=c;"
    assert render(Chat([USER, call('{"a": '), call('{"b": 2}')]), own) == 'arguments={"a": ;b=2;'
    with pytest.raises(InvalidRequest, match="refused"):
        render(Chat([call("{")]), with_template(trained, "{{ raise_exception('no') }}"))


def test_no_content_is_an_empty_one_and_reasoning_has_both_names():
    assert for_template({"role": "assistant", "content": None, "reasoning": "r"}) == {
        "role": "assistant",
        "content": "",
        "reasoning": "r",
        "reasoning_content": "r",
    }
    assert "tool_calls" not in for_template({"role": "assistant", "content": "x", "tool_calls": []})


@pytest.mark.parametrize("content", ["So", "So ", " \n", ""])
def test_the_last_message_goes_on(trained, content):
    told = render(Chat([USER, {"role": "assistant", "content": content}], continues=True), trained)
    assert told == render(Chat([USER]), trained) + content
    with pytest.raises(InvalidRequest, match="does not show"):
        render(Chat([USER, SAID], continues=True), with_template(trained, "{{ messages[0].content }}"))


def test_bounds():
    chat = Chat([USER])
    deep = json.loads("[" * 33 + "]" * 33)
    many = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)]
    for change, said in (
        ({"tools": many}, "257 tools; up to 256"),
        ({"tools": [{**TOOL, "x": deep}]}, "deeper than 32"),
        ({"tools": [{**TOOL, "x": "y" * (256 << 10)}]}, "262,.* bytes"),
        ({"tools": [TOOL, TOOL]}, "two tools are called 'f'"),
        ({"arguments": {"tools": 1}}, "'tools' is a field"),
        ({"arguments": {"x": deep}}, "deeper than 8"),
        ({"arguments": {"x": "y" * (256 << 10)}}, "262,.* bytes"),
        ({"messages": [call("")] * (MAX_CALLS + 1)}, "1025 calls"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            replace(chat, **change)
    replace(chat, tools=many[1:], messages=[call("")] * MAX_CALLS)
    check_nesting([[]] * 1000, 2, "x")
    for value, said in (([[[]]], "deeper than 2"), ([[]] * 20_000, "over 16,384 lists")):
        with pytest.raises(InvalidRequest, match=said):
            check_nesting(value, 2, "x")
