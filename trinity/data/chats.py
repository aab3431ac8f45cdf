"""Conversations to train on, whoever wrote the rows: OpenAI, TRL, ShareGPT or Alpaca.

Decisions: a row becomes the messages of a request (trinity/text/conversation.py), so that training renders what serving
renders. Fields that are null say nothing. `weight` 0 of a message, as OpenAI has it, keeps it out of the loss; so does being
the first: nobody asked. OpenAI's names of 2023 (functions, function_call) are today's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trinity.errors import DataError, InvalidRequest
from trinity.text.conversation import Chat, shown_tool

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system", "developer": "developer", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function": "tool", "function_call": "assistant",
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
        row = {key: value for key, value in row.items() if value is not None}
        messages = _messages(row, where)
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
        return _of_alpaca(row, where)
    raise DataError(f"{where} has {', '.join(sorted(row)) or 'nothing'}; a conversation has {KINDS}")


def _of_alpaca(row: Mapping[str, Any], where: str) -> list[Weighted]:
    """Instruction and output, after what was said before in `history`."""
    asked = "\n\n".join(filter(None, (_text(row, name, where) for name in ("instruction", "input"))))
    before = _parsed(row.get("history"), where) or []
    if not isinstance(before, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in before):
        raise DataError(f"{where} has a history that is no list of pairs of a question and an answer")
    told = [("system", _text(row, "system", where))] if row.get("system") else []
    for question, answer in [*before, (asked, row["output"])]:
        told += [("user", question), ("assistant", answer)]
    return [_message({"role": role, "content": text}, where) for role, text in told]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(text := row.get(name, ""), str):
        raise DataError(f"{where} has a {type(text).__name__} as {name}; give a text")
    return text


def _side(value: Any, role: str, where: str) -> list[Weighted]:
    """A prompt or a completion: a text of that role, or messages."""
    if isinstance(value, str) and (told := messages_in(value)) is None:
        return [({"role": role, "content": value}, 1)]
    return _listed(told if isinstance(value, str) else value, where)


def messages_in(text: str) -> list[Any] | None:
    """The messages that a text is the JSON of, as tables have them; None for a text of another kind."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(found, list) and found and all(isinstance(each, dict) and "role" in each for each in found)
    return found if is_one else None


def _listed(value: Any, where: str) -> list[Weighted]:
    found = _parsed(value, where)
    if not isinstance(found, list):
        raise DataError(f"{where}: messages are a {type(found).__name__}, no list")
    return [_message(each, f"{where}, message {i}") for i, each in enumerate(found)]


def _message(value: Any, where: str) -> Weighted:
    """A message as requests have it, and its weight."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise DataError(f"{where} has no role; it is an object with role and content")
    told = {key: value[key] for key in KEPT if value.get(key) is not None}
    told["role"] = ROLES["function"] if told["role"] == "function" else told["role"]  # calls as they were in 2023
    if told["role"] not in ROLES.values():
        raise DataError(f"{where} has role {told['role'][:80]!r}; there are {', '.join(dict.fromkeys(ROLES.values()))}")
    if isinstance(told.get("content"), list):
        told["content"] = _joined(told["content"], where)
    if not told.get("content") and isinstance(refusal := value.get("refusal"), str):
        told["content"] = refusal
    for name in ("content", "reasoning", "reasoning_content"):
        if not isinstance(told.get(name, ""), str):
            raise DataError(f"{where} has a {type(told[name]).__name__} as {name}; give a text, or parts of type text")
    if calls := _calls(value, where):
        told["tool_calls"] = calls
    if "content" not in value and told.keys() <= {"role", "name", "tool_call_id"}:
        raise DataError(f"{where} has {', '.join(sorted(map(str, value)))}, and neither content nor tool_calls")
    return told, _weight(value, where)


def _weight(value: Mapping[str, Any], where: str) -> int:
    """1, or 0 for what is not to be learned."""
    weight = value.get("weight")
    if isinstance(weight, str) or weight not in (None, 0, 1):
        raise DataError(f"{where} has weight {str(weight)[:80]!r}; it is 1, or 0 for what is not to be learned")
    return 1 if weight is None else int(weight)


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = [_text_of(part) for part in parts]
    if any(text is None for text in texts):
        raise DataError(f"{where} has parts that are no text; only text is trained on")
    return "".join(text for text in texts if text)


def _text_of(part: Any) -> str | None:
    """Text of a part, or its refusal; None where it has neither."""
    told = [part.get(name) for name in ("text", "refusal")] if isinstance(part, dict) else []
    return next((text for text in told if isinstance(text, str)), None)


def _calls(value: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls = _parsed(value.get("tool_calls"), where)
    if calls is None and value.get("function_call") is not None:
        calls = [value["function_call"]]
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls are a {type(calls).__name__}, no list")
    return [_call(call, where) for call in calls or ()]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as requests have it: its arguments as JSON text."""
    call = _parsed(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has a call without the name of a function")
    arguments = function.get("arguments", function.get("parameters"))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": text}}


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
    if not isinstance(who, str) or who not in ROLES or not isinstance(text, str):
        raise DataError(f"{where} is from {str(who)[:80]!r}; there are {', '.join(ROLES)}, each with a text as value")
    if who == "function_call":
        calls = _parsed(text, where)
        told = {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    else:
        told = {"role": ROLES[who], "content": text}
    return _message(told | {"weight": turn.get("weight")}, where)


def _tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Tools as a template gets them from a request; a bare schema of a function is one, too."""
    tools = _parsed(row.get("tools", row.get("functions")), where) or []
    found = [_parsed(tool, where) for tool in tools]
    return [shown_tool(tool.get("function", tool)) for tool in found]


def _parsed(value: Any, where: str) -> Any:
    """The value, or what it is the JSON text of: tables have nested values as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} has {value[:80]!r} where JSON is expected: {error}") from None
