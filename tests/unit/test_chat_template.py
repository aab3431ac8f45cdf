"""Chat templates in their box: what published ones need, and what hostile ones get."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from trinity.errors import InvalidRequest
from trinity.text import chat_template
from trinity.text.chat_template import render_chat

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def hasty(monkeypatch):
    """Templates have a quarter of a second: what would go on for ever is found out sooner."""
    monkeypatch.setattr(chat_template, "CPU_S", 0.25)
    monkeypatch.setattr(chat_template, "_workers", cache(chat_template._workers.__wrapped__))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('only one system turn') }}", "only one system turn"),
        ("{% if", "refused"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].missing.deeper }}", "missing"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ render_chat.__globals__ }}", "undefined"),
        ("{{ 'a' * 1000000000 }}", "only allowed to multiply numbers"),
        ("{{ 9 ** 9 }}", "only allowed to multiply numbers"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.25 s and longer"),
        ("{% for a in range(99999) %}{{ messages }}{% endfor %}", "exceeds 4,194,304 characters"),
        ("{% include '/etc/passwd' %}", "refused"),
    ],
)
def test_a_hostile_template_ends_in_a_refusal(hasty, template, says):
    with pytest.raises(InvalidRequest, match=says):
        render_chat(template, [{"role": "user", "content": "x" * 100}])


def test_what_published_templates_use():
    template = (
        "{%- for m in messages -%}\n    {%- if loop.index > 1 -%}{%- break -%}{%- endif -%}\n"
        "{{ m.content | trim | upper }}{{ m | tojson(indent=1) }}\n{%- endfor -%}{{ 2 * 3 }}"
        "{{ strftime_now('%Y')[:1] }}"
    )
    assert render_chat(template, [*USER, *USER]) == 'HI{\n "role": "user",\n "content": "hi"\n}62'


BOMBS = {  # a line of a template that asks for gigabytes, or for ever
    "ljust": "{{ 'a'.ljust(1000000000)|length }}",
    "% width": "{{ ('%1000000000d' % 1)|length }}",
    "format width": "{{ '{:>1000000000}'.format(1)|length }}",
    "center": "{{ ('a'|center(1000000000))|length }}",
    "replace": "{{ ('a'|center(30000)|replace(' ','b'|center(30000)))|length }}",
    "join": "{{ range(99999)|join('a'|center(99999))|length }}",
    "indent": "{{ 'a\nb'|indent(1000000000)|length }}",
    "tojson": "{{ ([1]|tojson(indent=1000000000))|length }}",
    "doubling": "{% set n = namespace(a='aa') %}{% for i in range(30) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a|length }}",
    "doubling a list": "{% set n = namespace(a=[1]) %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "squaring": "{% set n = namespace(a=3) %}{% for i in range(32) %}{% set n.a = n.a * n.a %}{% endfor %}{{ n.a > 1 }}",
    "map": "{{ range(100000)|map('center',100000)|list|length }}",
    "slice": "{{ range(100000)|slice(100000000)|list|length }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list|length }}",
    "lipsum": "{{ lipsum(n=100000000)|length }}",
    "in": "{{ range(100000)|select('in', range(100000)|list)|list|length }}",
    "recursion": "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "shifting": "{% for i in range(100000) %}{% for j in range(100000) %}{% set x = 1 %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_may_use_so_much_memory_and_time(hasty, name):
    """Its own process's; this one grows by what it says, and the next chat is rendered."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=r"memory|s and longer|recursion|refused"):
        render_chat(BOMBS[name], USER)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB
    assert render_chat("{{ messages[0].content }}", USER) == "hi"


def test_a_template_sees_nothing_of_its_server(monkeypatch):
    """Its process has neither our keys nor our folder: it was started without them."""
    monkeypatch.setenv("TRINITY_API_KEY", "very secret")
    monkeypatch.setattr(chat_template, "NUM_WORKERS", 1)
    monkeypatch.setattr(chat_template, "_workers", cache(chat_template._workers.__wrapped__))
    render_chat("{{ 1 }}", USER)
    process = Path("/proc", str(chat_template._workers()._idle.get()._process.pid))
    assert (process / "environ").read_bytes() == b""
    assert (process / "cwd").readlink() == Path("/")


def test_chats_side_by_side_get_each_their_own():
    with ThreadPoolExecutor(8) as threads:
        texts = list(
            threads.map(lambda n: render_chat("{{ messages[0].content }}", [{"content": f"n{n}"}]), range(200))
        )
    assert texts == [f"n{n}" for n in range(200)]


def test_a_child_of_this_process_has_workers_of_its_own():
    render_chat("{{ 1 }}", USER)
    child = os.fork()
    if child == 0:
        os._exit(0 if render_chat("{{ messages[0].content }}", USER) == "hi" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_chat("{{ messages[0].content }}", USER) == "hi"
