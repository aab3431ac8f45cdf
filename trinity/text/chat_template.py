"""Chat templates: a conversation as the text that a model was trained on.

Decision: a chat template is a program that comes with a checkpoint: it runs sandboxed, with bounded lines and output.
"""

import datetime
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trinity.errors import InvalidRequest
from trinity.text.special_tokens import BOS, EOS

MAX_TEMPLATE_CHARS, MAX_TEMPLATE_LINES = 4 << 20, 1_000_000
CHATML = r"""{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nThe functions you may call:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\n\nTo call one, answer with its name and arguments:\n<tool_call>\n' }}
    {{- '{"name": "...", "arguments": {...}}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set arguments = call.function.arguments %}
            {{- '\n<tool_call>\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
            {{- (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    bos_token: str = BOS,
    eos_token: str = EOS,
) -> str:
    """The prompt of a chat, as transformers' `apply_chat_template`; encode it without `add_special`. The template must
    come from the checkpoint. Raises InvalidRequest for what the template refuses, and beyond 4 MiB characters of
    output or a million executed lines."""
    values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    try:
        with _bounded_lines(MAX_TEMPLATE_LINES):
            pieces = _compile(template).generate(**values, bos_token=bos_token, eos_token=eos_token)
            return _join(pieces, MAX_TEMPLATE_CHARS)
    except InvalidRequest:
        raise
    except Exception as error:  # a template is a foreign program: it can raise anything
        raise InvalidRequest(f"the chat template refused the messages: {error}", param="messages") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Sandbox without writes, without attributes of Python's, and no `*` that could make a gigabyte of one character."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
            raise TemplateError(f"{operator} is only allowed to multiply numbers")
        return left * right


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment.from_string(template)


def _tojson(value: Any, indent: int | None = None) -> str:
    """Plain JSON: jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _join(pieces: Iterator[str], limit: int) -> str:
    done, size = [], 0
    for piece in pieces:
        done.append(piece)
        size += len(piece)
        if size > limit:
            raise InvalidRequest(f"the rendered chat exceeds {limit:,} characters; shorten it", param="messages")
    return "".join(done)


@contextmanager
def _bounded_lines(limit: int) -> Iterator[None]:
    """Stop a template after `limit` executed lines. Tracing, because a loop without output offers no other hook."""
    left = limit

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise InvalidRequest(f"the chat template ran {limit:,} lines; send fewer messages", param="messages")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
