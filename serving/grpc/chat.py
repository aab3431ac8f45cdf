"""Chats over gRPC: the same requests as over HTTP, and the events of an answer as Deltas.

Decision: a message becomes the tree that HTTP would have sent and is checked by the same models, so bounds and errors are the
same.
"""

from typing import Any

from protos.trinity.v1 import inference_pb2 as pb
from serving.http.schema import ChatRequest, load_object, validated
from trinity.errors import InvalidRequest
from trinity.text.tool_calls.events import CallArguments, CallBegan, Event, Reasoning, Text

ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
NAMED = "function:"


def to_request(chat: pb.Chat) -> ChatRequest:
    """The chat, checked. Raises InvalidRequest."""
    tree: dict[str, Any] = {
        "messages": [to_message(message) for message in chat.messages],
        "tools": [to_tool(tool) for tool in chat.tools],
        "documents": [to_object(text, "documents_json") for text in chat.documents_json],
        "tool_choice": to_choice(chat.tool_choice),
        "reasoning_effort": chat.reasoning_effort or None,
        "chat_template_kwargs": to_object(chat.template_arguments_json or "{}", "template_arguments_json"),
        "continue_final_message": chat.continue_final_message,
    }
    for name in ("parallel_tool_calls", "include_reasoning"):
        if chat.HasField(name):
            tree[name] = getattr(chat, name)
    return validated(ChatRequest, tree)


def to_message(message: pb.ChatMessage) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidRequest(
            f"role {message.role} is unknown; set one of {', '.join(pb.Role.keys()[1:])}", param="role"
        )
    calls = [
        {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls
    ]
    more = {
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id,
        "reasoning": message.reasoning,
        "name": message.name,
    }
    return {"role": ROLES[message.role], "content": message.content, **{k: v for k, v in more.items() if v}}


def to_tool(tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description or None}
    if tool.parameters_json:
        function["parameters"] = to_object(tool.parameters_json, "parameters_json")
    if tool.HasField("strict"):
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def to_object(text: str, param: str) -> dict[str, Any]:
    """A JSON object, as strictly as a body."""
    try:
        return load_object(text.encode())
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: {error.message.replace('the body', 'it')}", param=param) from None


def to_choice(text: str) -> Any:
    if text.startswith(NAMED):
        return {"type": "function", "function": {"name": text.removeprefix(NAMED)}}
    return text or None


def to_deltas(events: list[Event]) -> list[pb.Delta]:
    """One for each event that shows; at least one, for the tokens."""
    return [found for event in events if (found := _delta(event)) is not None] or [pb.Delta()]


def _delta(event: Event) -> pb.Delta | None:
    match event:
        case Text(text):
            return pb.Delta(text=text)
        case Reasoning(text):
            return pb.Delta(reasoning=text)
        case CallBegan(index, call_id, name):
            return pb.Delta(tool_calls=[pb.ToolCallPiece(index=index, id=call_id, name=name)])
        case CallArguments(index, piece):
            return pb.Delta(tool_calls=[pb.ToolCallPiece(index=index, arguments=piece)])
    return None
