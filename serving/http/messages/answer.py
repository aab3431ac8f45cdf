"""Answers in the shape of Anthropic's Messages API: blocks of content, and the events that announce, fill and end them.

Decision: a call's input is the object that its arguments are the JSON of; where the model wrote something else, it is the only
field of one, as in prompts (trinity/text/conversation.py). In a stream it comes as the model writes it.
"""

from dataclasses import dataclass
from typing import Any

from serving.errors import anthropic_body
from serving.frontend import new_request_id
from serving.http.parts import Message, Part, Parts
from trinity.engine.numerics import Numerics
from trinity.engine.request import Delta
from trinity.errors import TrinityError
from trinity.text.conversation import parsed_arguments
from trinity.text.tool_calls.events import Event

SIGNATURE = "trinity"  # clients leave out thinking that has none


@dataclass
class Block(Part):
    """One block of content."""

    def shown(self) -> dict[str, Any]:
        if self.call is not None:
            return {"type": "tool_use", "id": self.call.id, "name": self.call.name, "input": self._input()}
        if self.kind == "reasoning":
            signature = SIGNATURE if self.ended is not None else ""
            return {"type": "thinking", "thinking": self.text, "signature": signature}
        return {"type": "text", "text": self.text}

    def begin(self) -> list[Message]:
        return [{"type": "content_block_start", "index": self.index, "content_block": self.shown()}]

    def delta(self, piece: str) -> Message:
        match self.kind:
            case "call":
                return self._say({"type": "input_json_delta", "partial_json": piece})
            case "reasoning":
                return self._say({"type": "thinking_delta", "thinking": piece})
            case "text":
                return self._say({"type": "text_delta", "text": piece})

    def end(self) -> list[Message]:
        signed = [self._say({"type": "signature_delta", "signature": SIGNATURE})] if self.kind == "reasoning" else []
        return [*signed, {"type": "content_block_stop", "index": self.index}]

    def _say(self, delta: dict[str, Any]) -> Message:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}

    def _input(self) -> dict[str, Any]:
        found = parsed_arguments(self.text or "{}")
        return found if isinstance(found, dict) else {"arguments": found}


class MessagesAnswer:
    """One answer, as its events come."""

    def __init__(self, model: str, request_id: str, numerics: Numerics):
        self.parts = Parts(Block)
        self._request_id, self._numerics = request_id, numerics
        self._head = {"id": f"msg_{new_request_id()}", "type": "message", "role": "assistant", "model": model}
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._usage: dict[str, Any] = {}

    def opening(self, first: Delta) -> list[Message]:
        self._usage = {
            "input_tokens": first.num_prompt_tokens - first.num_cached_tokens,  # clients add the three
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": first.num_cached_tokens,
            "output_tokens": 0,
        }
        return [{"type": "message_start", "message": self.whole()}]

    def add(self, event: Event) -> list[Message]:
        return self.parts.add(event)

    def closing(self, last: Delta, num_calls: int, num_reasoning_tokens: int) -> list[Message]:
        ended = self.parts.end(is_whole=last.finish_reason == "stop")
        self._end = _end(last, num_calls)
        self._usage |= {"output_tokens": last.num_generated_tokens}
        self._usage |= {"output_tokens_details": {"thinking_tokens": num_reasoning_tokens}}
        versions = {"weights_versions": {"first": last.first_version, "last": last.version}, **self._numerics.told}
        delta = {"type": "message_delta", "delta": self._end, "usage": self._usage, **versions}
        self._end = self._end | versions
        return [*ended, delta, {"type": "message_stop"}]

    def failure(self, error: TrinityError) -> list[Message]:
        """The event that ends a stream which cannot go on."""
        return [anthropic_body(error, self._request_id)]

    def whole(self) -> dict[str, Any]:
        """The message as it is now."""
        return {**self._head, "content": [part.shown() for part in self.parts.all], **self._end, "usage": self._usage}


def _end(last: Delta, num_calls: int) -> dict[str, Any]:
    """Reason why the answer ended. A stop after calls is theirs; clients act on them."""
    if last.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if num_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(last.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
    return {"stop_reason": "end_turn", "stop_sequence": None}
