"""Chat templates in the manner of others, and tokenizers with their control tokens.

Each shows something that ChatML does not: what trims, alternates, moves tools or the system's words, drops or keeps reasoning,
ends an answer with what comes next, or writes on after its end. Those of GENERATION have tags for training masks.
"""

from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from trinity.text.tokenizer import Tokenizer

PARTS = {
    "@CALLS": """{% for c in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first }}<tool_call>
{{ '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}""",
    "@TOOLS": "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}",
    "@ASKED": """{% set ns = namespace(asked=-1) %}{% for m in messages if m.role == 'user' %}
{%- set ns.asked = messages.index(m) %}{% endfor %}""",
    "@BEGIN": "{{ '<|im_start|>' + m.role + '\\n' }}",
    "@END": "{{ '<|im_end|>\\n' }}",
    "@PROMPT": "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
GENERATION = ("chatml", "headers", "alternates")
WRITTEN = {
    "chatml": """@TOOLS{% for m in messages %}@BEGIN{% if m.role == 'assistant' %}{% generation %}{{ m.content }}@CALLS
{{- '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content }}@END{% endif %}{% endfor %}@PROMPT""",
    "headers": """{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\\n\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{% if m.tool_calls %}{% for c in m.tool_calls %}
{{- '{"name": "' + c.function.name + '", "parameters": ' + (c.function.arguments | tojson) + '}' }}{% endfor %}
{%- else %}{{ m.content | trim }}{% endif %}{{ '<|eot|>' }}{% endgeneration %}
{%- else %}{{ (m.content | trim) + '<|eot|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}""",
    "alternates": """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{{- '<|turn|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{% if m.role == 'assistant' %}{% generation %}
{{- (m.content | trim) + '<|/turn|>' }}{% endgeneration %}{% else %}{{ (m.content | trim) + '<|/turn|>' }}{% endif %}
{{- '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>model\\n' }}{% endif %}""",
    "system with the last question": """{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}
{{- '[INST] ' + (messages[0].content + '\\n\\n' if loop.last and messages[0].role == 'system' else '') }}
{{- m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}""",
    "tools with the last question": """{{ bos_token }}@ASKED{% for m in messages %}{% if m.role == 'user' %}
{{- '[TOOLS]' + (tools | tojson) if tools and loop.index0 == ns.asked else '' }}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + '[/RESULT]' }}
{%- elif m.tool_calls %}{{ '[CALLS] ' + (m.tool_calls[0].function | tojson) + eos_token }}
{%- else %}{{ ' ' + (m.content | trim) + eos_token }}{% endif %}{% endfor %}""",
    "drops reasoning": """@TOOLS@ASKED{% for m in messages %}@BEGIN
{%- if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content }}@CALLS@END{% endfor %}@PROMPT""",
    "keeps reasoning": """{{ bos_token }}@TOOLS{% for m in messages %}@BEGIN{% if m.role == 'assistant' %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n' }}{% endif %}{{ m.content }}@CALLS@END{% endfor %}@PROMPT
{%- if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}""",
    "strips reasoning": """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|bot|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|me|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|bot|><think>\\n' }}{% endif %}""",
    "no end of its own": """<sop>@ASKED{% if tools %}{{ '<|system|>\\n' + (tools | tojson) }}{% endif %}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\\n' + m.content }}{% elif m.role == 'tool' %}{{ '<|observation|>\\n' + m.content }}
{%- elif m.role == 'system' %}{{ '<|system|>\\n' + m.content }}{% else %}
{{- '<|assistant|>\\n<think>' + (m.reasoning_content or '' if loop.index0 > ns.asked else '') + '</think>' }}
{{- ('\\n' + m.content.strip() if m.content.strip() else '') }}@CALLS{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    "text after its end": """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "always asks": "{% for m in messages %}@BEGIN{{ m.content }}@END{% endfor %}{{ '<|im_start|>assistant\\n' }}",
    "no end at all": """{% for m in messages %}{{ 'ASSISTANT: ' if m.role == 'assistant' else 'USER: ' }}{{ m.content + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
}
ENDS = {  # eos, and what else ends a text of the model
    "headers": ("<|eot|>",),
    "alternates": ("</s>", "<|/turn|>"),
    "system with the last question": ("</s>",),
    "tools with the last question": ("</s>",),
    "strips reasoning": ("</s>",),
    "no end of its own": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "text after its end": ("<|endoftext|>", "<|end|>"),
    "no end at all": ("</s>",),
}
CONTROL = ["<s>", "</s>", *(f"<|{name}|>" for name in (
    "im_start", "im_end", "endoftext", "head", "/head", "eot", "turn", "/turn", "bot", "me", "system", "user", "assistant",
    "observation", "end",
)), "<sop>", *(f"[{name}]" for name in ("INST", "/INST", "TOOLS", "CALLS", "RESULT", "/RESULT"))]  # fmt: skip


def template(name: str) -> str:
    """The template of that name."""
    text = WRITTEN[name]
    for part, written in PARTS.items():
        text = text.replace(part, written)
    return text


def foreign(name: str) -> Tokenizer:
    """A tokenizer with that template, of a model whose texts end as such a model's do."""
    words = iter(
        ["what is it? it is so. hello there, the weather. user assistant system tool name arguments \n\n 12 34 " * 9]
    )
    core = Core.from_str(Tokenizer.train(words, 420).to_json())
    core.add_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    eos, *others = ENDS.get(name, ("<|im_end|>",))
    made = Tokenizer(core, {"bos_token": "<s>", "eos_token": eos}, template(name))
    return made.of_model([made.added_ids[token] for token in others])
