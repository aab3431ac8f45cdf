"""Answers in the shape of OpenAI's Responses API: items of output, and the events that announce, fill and end them.

Decision: the response that ends a stream, and the one that is sent as a whole, hold the items that were streamed.
"""

from dataclasses import dataclass, field
from typing import Any

from serving.errors import TABLE
from serving.frontend import new_request_id
from serving.http.parts import Message, Part, Parts
from serving.http.responses.request import ResponsesRequest
from trinity.engine.numerics import Numerics
from trinity.engine.request import Delta
from trinity.errors import Code, TrinityError
from trinity.text.tool_calls.events import Event

PREFIXES = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}
FILLS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
STATUS = {None: "in_progress", True: "completed", False: "incomplete"}


@dataclass
class OutputItem(Part):
    """One item of the output."""

    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = PREFIXES[self.kind] + new_request_id()

    def shown(self) -> dict[str, Any]:
        text, head, status = self.text, {"id": self.id}, {"status": STATUS[self.ended]}
        if self.call is not None:
            called = {"call_id": self.call.id, "name": self.call.name, "arguments": text}
            return head | {"type": "function_call"} | called | status
        has_ended = self.ended is not None
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if has_ended else []
            return head | {"type": "reasoning", "summary": [], "content": content} | status
        return head | {"type": "message", "role": "assistant", "content": [_part(text)] if has_ended else []} | status

    def begin(self) -> list[Message]:
        added = {"type": "response.output_item.added", "output_index": self.index, "item": self.shown()}
        return [added, self._say("response.content_part.added", part=_part(""))] if self.kind == "text" else [added]

    def delta(self, piece: str) -> Message:
        return self._say(f"{FILLS[self.kind]}.delta", delta=piece, **self._logprobs)

    def end(self) -> list[Message]:
        text = self.text
        whole = {"name": self.call.name, "arguments": text} if self.call else {"text": text}
        done = [self._say(f"{FILLS[self.kind]}.done", **whole, **self._logprobs)]
        if self.kind == "text":
            done.append(self._say("response.content_part.done", part=_part(text)))
        return [*done, {"type": "response.output_item.done", "output_index": self.index, "item": self.shown()}]

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.kind == "text" else {}

    def _say(self, kind: str, **more: Any) -> Message:
        place = {} if self.kind == "call" else {"content_index": 0}
        return {"type": kind, "item_id": self.id, "output_index": self.index, **place, **more}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponsesAnswer:
    """One answer, as its events come."""

    def __init__(self, body: ResponsesRequest, model: str, created_s: int, numerics: Numerics):
        self.parts = Parts(OutputItem)
        self._head = {"id": f"resp_{new_request_id()}", "object": "response", "created_at": created_s, "model": model}
        self._asked = _asked(body)
        self._end: dict[str, Any] = {}
        self._num_events, self._numerics = 0, numerics

    def opening(self, first: Delta) -> list[Message]:
        return self._numbered(
            [{"type": f"response.{what}", "response": self.whole()} for what in ("created", "in_progress")]
        )

    def add(self, event: Event) -> list[Message]:
        return self._numbered(self.parts.add(event))

    def closing(self, last: Delta, num_calls: int, num_reasoning_tokens: int) -> list[Message]:
        is_whole = last.finish_reason == "stop"
        ended = self.parts.end(is_whole)
        self._end = {
            "status": STATUS[is_whole],
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "usage": _usage(last, num_reasoning_tokens),
            "weights_versions": {"first": last.first_version, "last": last.version},
            **self._numerics.told,
        }
        return self._numbered([*ended, {"type": f"response.{STATUS[is_whole]}", "response": self.whole()}])

    def failure(self, error: TrinityError) -> list[Message]:
        """The event that ends a stream which cannot go on."""
        self.parts.end(is_whole=False)
        code = "rate_limit_exceeded" if error.code is Code.OVERLOADED else "server_error"
        told = {"code": code, "message": error.message, "type": TABLE[error.code].kind}
        self._end = {"status": "failed", "error": told}
        return self._numbered([{"type": "response.failed", "response": self.whole()}])

    def whole(self) -> dict[str, Any]:
        """The response as it is now."""
        output = [part.shown() for part in self.parts.all]
        return {**self._head, "status": "in_progress", "error": None, **self._asked, "output": output, **self._end}

    def _numbered(self, events: list[Message]) -> list[Message]:
        start, self._num_events = self._num_events, self._num_events + len(events)
        return [event | {"sequence_number": start + i} for i, event in enumerate(events)]


def _asked(body: ResponsesRequest) -> dict[str, Any]:
    """Fields of its request that a response repeats."""
    choice = body.tool_choice
    return {
        "background": False,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "store": False,
        "temperature": body.carried.get("temperature"),
        "text": body.text.model_dump(by_alias=True, exclude_none=True),
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools],
        "top_p": body.carried.get("top_p"),
        "truncation": "disabled",
        "usage": None,
    }


def _usage(last: Delta, num_reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": last.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": last.num_generated_tokens,
        "output_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
        "total_tokens": last.num_prompt_tokens + last.num_generated_tokens,
    }
