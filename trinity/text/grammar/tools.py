"""Tool calls as grammars, each in the words that its family of checkpoints was trained on.

Decisions. `required` and a named tool bind the answer from its first token; with `auto` an answer is free text, and what is
between the markers of a call follows the tool's schema where the tool is strict. A tool that is not strict is held to what the
compiler knows of its schema; a strict one that it cannot follow is refused. Markers are tokens of their own where the
tokenizer has them, which no text or value can contain. In XML a parameter of type string is plain text up to its end mark;
any other is JSON. Parameters come in the schema's order.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from trinity.text.grammar.constraint import WHITESPACE, Constraint, check_bytes
from trinity.text.grammar.lark import embedded, quoted
from trinity.text.grammar.schemas import OBJECT, bounded

CallForm = Literal["hermes", "qwen3_coder"]
OPENING, CLOSING = "<tool_call>", "</tool_call>"
END_OF_PARAMETER = "\n</parameter>\n"
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tools_constraint(
    form: CallForm,
    tools: Sequence[dict[str, Any]],
    choice: str | dict[str, Any],
    parallel: bool = True,
    answer: Constraint | None = None,
) -> Constraint | None:
    """Constraint of an answer with these tools (OpenAI's `tools` and `tool_choice`); None where it is free: with `none`, and
    with `auto` unless a tool is strict. With `answer`, of JSON, and `auto` it is either calls or that. Raises ValueError for a
    tool that is not there, and for too many bytes."""
    functions, is_free = [tool["function"] for tool in tools], choice == "auto"
    if isinstance(choice, dict):
        name, parallel = choice["function"]["name"], False
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise ValueError(f"tool_choice names {str(name)[:100]!r}, which is not in tools")
    elif choice == "none" or (is_free and answer is None and not any(function.get("strict") for function in functions)):
        return None
    said = answer and asdict(answer)
    tree = {"form": form, "functions": functions, "is_free": is_free, "parallel": parallel, "answer": said}
    text = json.dumps(tree, ensure_ascii=False)
    check_bytes("tools", text)
    return Constraint("tools", text)


def tools_grammar(tree: dict[str, Any], names: frozenset[str]) -> str:
    """The grammar of such a text, in Lark's notation; `names` are the tokens it may name. Raises ValueError for a schema over
    our bounds."""
    body = {"hermes": _hermes, "qwen3_coder": _qwen3_coder}[tree["form"]]
    opening, closing = (marker if marker in names else quoted(marker) for marker in (OPENING, CLOSING))
    rules = [f"body_{i}: {body(function, tree['is_free'])}" for i, function in enumerate(tree["functions"])]
    bodies = " | ".join(f"body_{i}" for i in range(len(rules)))
    has_text = tree["is_free"] and tree["answer"] is None
    head = f"head: TEXT {opening}" if OPENING in names else f"head[lazy]: TEXT {opening}"
    rest = [head, f"value[suffix={quoted(END_OF_PARAMETER)}]: TEXT", r"TEXT: /(.|\n)*/", r"GAP: /[ \n]{0,4}/"]
    call = f"call: {'head' if has_text else f'GAP {opening}'} ({bodies}) {closing}"
    return "\n".join([_start(tree, has_text), call, *_answer(tree["answer"]), *rules, *rest])


def _start(tree: dict[str, Any], has_text: bool) -> str:
    if has_text:
        return f"start: call{'*' if tree['parallel'] else '?'} TEXT"
    return f"start: call{'+' * tree['parallel']}{' | answer' * (tree['answer'] is not None)}"


def _answer(asked: dict[str, Any] | None) -> list[str]:
    """The rule of what is said instead of calls."""
    if asked is None:
        return []
    answer = Constraint(**asked)
    schema = OBJECT if answer.kind == "json_object" else bounded(json.loads(answer.text), answer.is_closed)
    return [f"answer: {embedded(schema, answer.whitespace)}"]


def _hermes(function: dict[str, Any], is_free: bool) -> str:
    beginning = quoted(f'\n{{"name": {quoted(function["name"])}, "arguments": ')
    return f"{beginning} {_json(_arguments(function, is_free), function)} {quoted('}' + chr(10))}"


def _arguments(function: dict[str, Any], is_free: bool) -> dict[str, Any]:
    """The schema of all arguments: any object where nobody asked for more."""
    if is_free and not function.get("strict"):
        return OBJECT
    return bounded(function.get("parameters") or NOTHING, is_closed=bool(function.get("strict")))


def _qwen3_coder(function: dict[str, Any], is_free: bool) -> str:
    schema: dict[str, Any] = function.get("parameters") or NOTHING
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError(f"parameters of {function['name']!r}: properties must be an object, and required a list")
    parameters = [
        f"({quoted(f'<parameter={name}>' + chr(10))} {_value(part, schema, function)}){'' if name in required else '?'}"
        for name, part in properties.items()
    ]
    return " ".join([quoted(f"\n<function={function['name']}>\n"), *parameters, quoted("</function>\n")])


def _value(part: Any, schema: dict[str, Any], function: dict[str, Any]) -> str:
    """A value up to the end of its parameter."""
    end = quoted(END_OF_PARAMETER)
    part = part if isinstance(part, dict) else {}
    if part.get("type") == "string":
        options = part.get("enum")
        return (
            f"({' | '.join(quoted(str(option)) for option in options)}) {end}" if isinstance(options, list) else "value"
        )
    defs: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    whole = bounded({**defs, **part}, is_closed=bool(function.get("strict")))
    return f"{_json(whole, function)} {end}"


def _json(schema: dict[str, Any], function: dict[str, Any]) -> str:
    return embedded(schema, WHITESPACE, is_lenient=not function.get("strict"))
