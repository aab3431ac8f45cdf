"""Conversations to train on, whoever wrote the rows: OpenAI, TRL, ShareGPT or Alpaca.

Decisions: a row becomes the messages of a request (trinity/text/conversation.py), so that training renders what serving
renders. Nulls say nothing: Arrow pads unlike rows with them. `weight` 0 of a message, as OpenAI has it, keeps it out of the
loss; so does being the first: nobody asked.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trinity.errors import DataError, InvalidRequest
from trinity.text.conversation import Chat

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system", "developer": "developer", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
KEPT = ("role", "content", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "name")
KINDS = "messages; prompt and completion; conversations; or instruction and output"


class Conversation(NamedTuple):
    """A chat, and which of its messages are trained: the assistant's, but for those of weight 0."""

    chat: Chat
    is_trained: tuple[bool, ...]

    @classmethod
    def of(cls, row: Any, where: str) -> "Conversation":
        """Read a row. Raises DataError that names its place and what is wrong."""
        if not isinstance(row, dict):
            raise DataError(f"{where} is a {type(row).__name__}; a conversation is an object with {KINDS}")
        messages = _messages({key: value for key, value in row.items() if value is not None}, where)
        if not messages:
            raise DataError(f"{where} has no messages")
        trained = tuple(
            at > 0 and message["role"] == "assistant" and weight != 0 for at, (message, weight) in enumerate(messages)
        )
        arguments = _parsed(row.get("chat_template_kwargs"), where) or {}
        try:
            chat = Chat([message for message, _ in messages], _tools(row, where), False, arguments=arguments)
        except (InvalidRequest, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is no conversation: {error}") from None
        return cls(chat, trained)


Weighted = tuple[dict[str, Any], Any]  # a message, and its weight


def _messages(row: Mapping[str, Any], where: str) -> list[Weighted]:
    """Messages of whichever kind of row; those of a prompt weigh nothing."""
    if "messages" in row:
        return _listed(row["messages"], where)
    if "prompt" in row and "completion" in row:
        prompt = [(message, 0) for message, _ in _side(row["prompt"], "user", where)]
        return [*prompt, *_side(row["completion"], "assistant", where)]
    if "conversations" in row:
        return _of_sharegpt(row, where)
    if "instruction" in row and "output" in row:
        return _of_alpaca(row)
    raise DataError(f"{where} has {', '.join(sorted(row)) or 'nothing'}; a conversation has {KINDS}")


def _of_alpaca(row: Mapping[str, Any]) -> list[Weighted]:
    asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    system = [("system", row["system"])] if row.get("system") else []
    told = (*system, ("user", asked), ("assistant", row["output"]))
    return [({"role": role, "content": text}, 1) for role, text in told]


def _side(value: Any, role: str, where: str) -> list[Weighted]:
    """A prompt or a completion: a text of that role, or messages."""
    return [({"role": role, "content": value}, 1)] if isinstance(value, str) else _listed(value, where)


def _listed(value: Any, where: str) -> list[Weighted]:
    found = _parsed(value, where)
    if not isinstance(found, list):
        raise DataError(f"{where}: messages are a {type(found).__name__}, no list")
    return [_message(each, f"{where}, message {i}") for i, each in enumerate(found)]


def _message(value: Any, where: str) -> Weighted:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise DataError(f"{where} has no role; it is an object with role and content")
    told = {key: value[key] for key in KEPT if value.get(key) is not None}
    if isinstance(told.get("content"), list):
        told["content"] = _joined(told["content"], where)
    if not isinstance(told.get("content", ""), str):
        raise DataError(f"{where} has a {type(told['content']).__name__} as content; give a text or parts of type text")
    if told["role"] not in ROLES.values():
        raise DataError(f"{where} has role {told['role'][:80]!r}; there are {', '.join(dict.fromkeys(ROLES.values()))}")
    if "tool_calls" in told:
        told["tool_calls"] = [_call(call, where) for call in _parsed(told["tool_calls"], where)]
    return told, value.get("weight", 1)


def _joined(parts: Sequence[Any], where: str) -> str:
    if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in parts):
        raise DataError(f"{where} has parts that are no text; only text is trained on")
    return "".join(part["text"] for part in parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as requests have it: its arguments as JSON text."""
    call = _parsed(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has a call without the name of a function")
    arguments = function.get("arguments", function.get("parameters"))
    text = arguments if isinstance(arguments, str) else json.dumps(without_nulls(arguments or {}), ensure_ascii=False)
    ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": text}}


def without_nulls(value: Any) -> Any:
    """The value without the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _of_sharegpt(row: Mapping[str, Any], where: str) -> list[Weighted]:
    turns = _parsed(row["conversations"], where)
    if not isinstance(turns, list):
        raise DataError(f"{where}: conversations are a {type(turns).__name__}, no list")
    system = [_message({"role": "system", "content": row["system"]}, where)] if row.get("system") else []
    return [*system, *(_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(turns))]


def _turn(turn: Any, where: str) -> Weighted:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is a {type(turn).__name__}; a turn has from and value")
    if "role" in turn:
        return _message(turn, where)
    who, text = turn.get("from"), turn.get("value")
    if who not in ROLES or not isinstance(text, str):
        raise DataError(f"{where} is from {str(who)[:80]!r}; there are {', '.join(ROLES)}, each with a text as value")
    if who == "function_call":
        calls = _parsed(text, where)
        return _message({"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}, where)
    return _message({"role": ROLES[who], "content": text, "weight": turn.get("weight", 1)}, where)


def _tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Tools as requests have them; a bare schema of a function is one, too."""
    tools = _parsed(row.get("tools"), where) or []
    found = [without_nulls(_parsed(tool, where)) for tool in tools]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def _parsed(value: Any, where: str) -> Any:
    """The value, or what it is the JSON text of: tables have nested values as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} has {value[:80]!r} where JSON is expected: {error}") from None
