"""Requests of the gRPC API from their bytes: small ones are parsed at once, large ones elsewhere (serving/bodies.py).

Decision: a message of two megabytes may hold a million others, so what it lists is counted before anything is made of it.
"""

from collections.abc import Sequence

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import placement_pb2
from serving.bodies import INLINE_BYTES, read_elsewhere
from serving.http.chat import MAX_DOCUMENTS, MAX_MESSAGES
from trinity.engine.request import MAX_LISTED_TOKENS, check_length
from trinity.errors import InvalidRequest
from trinity.text.conversation import MAX_CALLS, MAX_TEMPLATE_BYTES, MAX_TOOLS, MAX_TOOLS_BYTES
from trinity.text.grammar.constraint import MAX_CHOICES

KINDS: dict[str, type[Message]] = {  # by the path of its rpc
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for module in (pb, placement_pb2, health_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


async def parsed(path: str, raw: bytes, max_model_len: int) -> Message:
    """The request of a call of that rpc. Raises InvalidRequest where it is none, or lists more than is taken."""
    if len(raw) > INLINE_BYTES:
        raw = await read_elsewhere(path, raw, max_model_len)
    return parse(path, raw, max_model_len)


def pack(path: str, raw: bytes, max_model_len: int) -> bytes:
    """A large message, checked, without what nobody knows."""
    request = parse(path, raw, max_model_len)
    request.DiscardUnknownFields()  # type: ignore[attr-defined]  # the stubs lack it
    return request.SerializeToString()


def parse(path: str, raw: bytes, max_model_len: int) -> Message:
    try:
        request = KINDS[path].FromString(raw)
    except DecodeError:
        raise InvalidRequest(f"the message is no {KINDS[path].DESCRIPTOR.full_name}") from None
    if isinstance(request, pb.GenerateRequest):
        if request.HasField("token_ids") and not request.sampling.HasField("truncate_prompt_tokens"):
            check_length(request.token_ids.ids, max_model_len)
        for name in ("stop", "stop_token_ids", "logit_bias", "bad_words", "allowed_token_ids"):
            check_number(len(getattr(request.sampling, name)), MAX_LISTED_TOKENS, name)
        check_number(len(request.sampling.structured_outputs.choice.texts), MAX_CHOICES, "structured_outputs")
    if isinstance(request, pb.GenerateRequest | pb.TokenizeRequest):
        check_chat(request.chat)
    return request


def check_chat(chat: pb.Chat) -> None:
    check_number(len(chat.messages), MAX_MESSAGES, "messages")
    check_number(len(chat.tools), MAX_TOOLS, "tools")
    check_number(len(chat.documents_json), MAX_DOCUMENTS, "documents_json")
    check_number(sum(len(message.tool_calls) for message in chat.messages), MAX_CALLS, "tool_calls")
    check_size([tool.parameters_json for tool in chat.tools], MAX_TOOLS_BYTES, "parameters_json")
    check_size([*chat.documents_json, chat.template_arguments_json], MAX_TEMPLATE_BYTES, "the template's arguments")


def check_size(texts: Sequence[str], most: int, name: str) -> None:
    """Refuse JSON that is too large before it is read."""
    if (size := sum(map(len, texts))) > most:
        raise InvalidRequest(f"{name} has {size:,} characters, at most {most:,} are taken", param=name)


def check_number(num: int, most: int, name: str) -> None:
    if num > most:
        raise InvalidRequest(f"{name} has {num} entries, at most {most} are taken", param=name)
