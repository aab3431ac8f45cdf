"""Conversations: messages, tools and what a request tells the chat template, checked and rendered.

Decisions: messages are OpenAI's, with the arguments of calls as JSON text, as answers have them; a template gets them as
objects, which it writes in the model's own way. What a model wrote never makes a later request fail: arguments that are no
JSON go to the template as they are, and as a field of an object to a template that wants one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from trinity.errors import InvalidRequest
from trinity.text.chat_template import render_chat
from trinity.text.tokenizer import Tokenizer

MAX_TOOLS, MAX_TOOLS_BYTES, MAX_TOOLS_DEPTH = 256, 256 << 10, 32
MAX_NESTED = 16_384  # lists and objects of tools, and of the template's arguments: to count them takes a millisecond
MAX_CALLS = 1024  # in all messages of a conversation
MAX_ARGUMENTS_DEPTH = 64
MAX_TEMPLATE_BYTES, MAX_TEMPLATE_DEPTH = 256 << 10, 8
MESSAGE_CHARS = 64  # what a message costs beside its text
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"})
TAIL = "\ue000trinity goes on here\ue001"  # of private use: in nobody's template or text
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """`continues`: the last message is to be continued, not answered. `arguments` are the template's, by name."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    add_generation_prompt: bool = True
    continues: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tools(self.tools)
        check_arguments(self.arguments)
        check_calls(self.messages)

    @property
    def size(self) -> int:
        """About as many characters as the template gets."""
        return sum(map(_size, self.messages)) + (len(json.dumps(self.tools)) if self.tools else 0)


def _size(message: Message) -> int:
    calls = sum(MESSAGE_CHARS + len(call["function"]["arguments"]) for call in message.get("tool_calls") or ())
    return MESSAGE_CHARS + len(message.get("content") or "") + len(message.get("reasoning") or "") + calls


def check_tools(tools: Sequence[dict[str, Any]]) -> None:
    """Raise InvalidRequest for too many, too large or too deep ones, or two of a name."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools; up to {MAX_TOOLS} are taken. Offer fewer.", param="tools")
    check_nesting(tools, MAX_TOOLS_DEPTH, "tools")
    if (size := len(json.dumps(tools).encode())) > MAX_TOOLS_BYTES:
        raise InvalidRequest(
            f"tools have {size:,} bytes as JSON, at most {MAX_TOOLS_BYTES:,} are taken; shorten them", param="tools"
        )
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"two tools are called {twice[:100]!r}; give each a name of its own", param="tools")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for arguments of the template that are too large, too deep, or not a request's to give."""
    param = "chat_template_kwargs"
    if taken := RESERVED & arguments.keys():
        raise InvalidRequest(f"{min(taken)!r} is a field of the request, not of the template's arguments", param=param)
    check_nesting(arguments, MAX_TEMPLATE_DEPTH, param)
    if (size := len(json.dumps(arguments).encode())) > MAX_TEMPLATE_BYTES:
        raise InvalidRequest(f"{size:,} bytes as JSON; at most {MAX_TEMPLATE_BYTES:,} are taken", param=param)


def check_calls(messages: Sequence[Message]) -> None:
    if (num := sum(len(message.get("tool_calls") or ()) for message in messages)) > MAX_CALLS:
        raise InvalidRequest(
            f"{num} calls in the messages; up to {MAX_CALLS} are taken. Leave old ones out.", param="messages"
        )


def check_nesting(value: Any, most_levels: int, param: str) -> None:
    """Raise InvalidRequest for lists and objects within lists and objects at too many levels, and for too many of them."""
    level, num = [value], 0
    for _ in range(most_levels):
        if (num := num + len(level)) > MAX_NESTED:
            raise InvalidRequest(f"{param} has over {MAX_NESTED:,} lists and objects; flatten it", param=param)
        below = chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [each for each in below if isinstance(each, dict | list)]
    if level:
        raise InvalidRequest(f"{param} is nested deeper than {most_levels} levels; flatten it", param=param)


def render(chat: Chat, tokenizer: Tokenizer) -> str:
    """The prompt of a conversation under the model's own template. Blocks; safe from any thread. Raises InvalidRequest."""
    if tokenizer.chat_template is None:
        raise InvalidRequest(
            "this model has no chat template; complete a plain prompt instead (/v1/completions, LLM.generate)",
            param="messages",
        )
    if not chat.messages:
        raise InvalidRequest("messages is empty; send at least one", param="messages")
    messages = [for_template(message) for message in chat.messages]
    try:
        return _rendered(chat, messages, tokenizer)
    except InvalidRequest:
        if (objects := [with_objects(message) for message in messages]) == messages:
            raise
        return _rendered(chat, objects, tokenizer)


def _rendered(chat: Chat, messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    assert tokenizer.chat_template is not None
    if chat.continues:
        messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + TAIL}]
    text = render_chat(
        tokenizer.chat_template,
        messages,
        add_generation_prompt=chat.add_generation_prompt and not chat.continues,
        tools=chat.tools or None,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        arguments=chat.arguments,
    )
    if not chat.continues:
        return text
    before, tail, _ = text.rpartition(TAIL)
    if not tail:
        raise InvalidRequest("the chat template does not show the last message", param="continue_final_message")
    return before


def shown_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates get it: what a model is to know of the function, whatever else is said of it, in one order."""
    names = ("name", "description", "parameters")
    return {"type": "function", "function": {key: function[key] for key in names if function.get(key) is not None}}


def for_template(message: Message) -> dict[str, Any]:
    """A message as templates read it: no content is an empty one (they would write `None`), arguments are objects, `developer`
    is today's name of `system`, and only tools have one."""
    told = dict(message) | {"content": message.get("content") or ""}
    told["role"] = "system" if told["role"] == "developer" else told["role"]
    if told["role"] != "tool":
        told.pop("name", None)
    if calls := told.pop("tool_calls", None):
        told["tool_calls"] = [_call(call) for call in calls]
    if reasoning := told.pop("reasoning", None) or told.pop("reasoning_content", None):
        told |= {"reasoning": reasoning, "reasoning_content": reasoning}  # templates know it by either name
    return told


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    parsed = parsed_arguments(arguments) if isinstance(arguments, str) else arguments
    return {**call, "type": "function", "function": {**function, "arguments": parsed}}


def parsed_arguments(text: str) -> Any:
    """The object that a model's text is the JSON of, or the text, where a template could not be given that."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair is no text
        check_nesting([value], MAX_ARGUMENTS_DEPTH, "arguments")
    except (ValueError, RecursionError, InvalidRequest):  # what a model wrote may be anything
        return text
    return value if isinstance(value, dict) else text


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with arguments that are no object as the only field of one."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_as_object(call) for call in calls]} if calls else message


def _as_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": {"arguments": function["arguments"]}}}
