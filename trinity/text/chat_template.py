"""Chat templates: a conversation as the text that a model was trained on.

Decision: a chat template is a program that comes with a checkpoint. It runs in processes of its own (template_worker.py), which
may use so much memory and time; they are kept, so that a chat costs a fraction of a millisecond more than in this one.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trinity.errors import InvalidRequest
from trinity.text.special_tokens import BOS, EOS
from trinity.utils.boxes import Boxes

NUM_WORKERS, CPU_S = 2, 2.0
WORKER = Path(__file__).with_name("template_worker.py")
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
            {%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
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
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a chat, as transformers' `apply_chat_template`; encode it without `add_special`. The template must
    come from the checkpoint; `arguments` are what else it may use, by name. Blocks; safe from any thread. Raises
    InvalidRequest for what the template refuses, and where it exceeds 4 MiB characters of output, 512 MiB of memory or 2 s of
    processor time."""
    chat = {"messages": list(messages), "tools": tools, "add_generation_prompt": add_generation_prompt}
    values = {**(arguments or {}), **chat, "bos_token": bos_token, "eos_token": eos_token}
    reply = _workers().ask(json.dumps({"template": template, "values": values}).encode())
    said = {"error": f"it ran for {CPU_S:g} s and longer"} if reply is None else json.loads(reply)
    if "text" in said:
        return str(said["text"])
    raise InvalidRequest(f"the chat template refused the messages: {said['error']}", param="messages")


@cache
def _workers() -> Boxes:
    return Boxes(NUM_WORKERS, [sys.executable, "-I", str(WORKER), str(CPU_S)], {})


os.register_at_fork(after_in_child=_workers.cache_clear)  # two processes would read from one pipe
