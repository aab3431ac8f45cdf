"""One answer to one conversation, through the doors beside the chat's: /v1/responses, /v1/messages and its count_tokens.

As in routes.py: the first Delta is awaited before the answer begins, so that an error that comes at once has its proper
status; a later one is the event with which the door's streams fail.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.errors import to_typed
from serving.frontend import Frontend, Served, now_s, off_loop
from serving.http.bodies import parse
from serving.http.door import Door
from serving.http.edge import REQUEST_ID
from serving.http.jobs import INLINE_BYTES, GenerationRequest, chain, chat_job, check_size
from serving.http.messages.answer import MessagesAnswer
from serving.http.messages.request import CountRequest, MessagesRequest
from serving.http.openai import encoded, sse
from serving.http.parts import Message, Parts
from serving.http.responses.answer import ResponsesAnswer
from serving.http.responses.request import ResponsesRequest
from serving.http.streamed import Streamed
from trinity.engine import samples
from trinity.engine.request import Delta
from trinity.errors import TrinityError
from trinity.text.answers import Parser, read
from trinity.text.tool_calls.events import Event, Reasoning

Deltas = AsyncGenerator[Delta, None]


class Answer(Protocol):
    """The answer of one door: what its stream says as the answer comes, and the whole."""

    parts: Parts

    def opening(self, first: Delta) -> list[Message]: ...

    def add(self, event: Event) -> list[Message]: ...

    def closing(self, last: Delta, num_calls: int, num_reasoning_tokens: int) -> list[Message]: ...

    def failure(self, error: TrinityError) -> list[Message]: ...

    def whole(self) -> Message: ...


async def responses(front: Frontend, request: Request) -> Response:
    body = await parse(front, ResponsesRequest, request)
    served = front.served(body.model)
    return await _respond(
        front, request, body, served, ResponsesAnswer(body, served.model, now_s(), front.info.numerics)
    )


async def messages(front: Frontend, request: Request) -> Response:
    body = await parse(front, MessagesRequest, request)
    served = front.served(body.model)
    return await _respond(
        front, request, body, served, MessagesAnswer(served.model, request.scope[REQUEST_ID], front.info.numerics)
    )


async def count_tokens(front: Frontend, request: Request) -> Response:
    body = await parse(front, CountRequest, request)
    front.check_model(body.model)
    return JSONResponse({"input_tokens": len(await front.encode_chat(body.chat.chat, body.chat.add_special_tokens))})


async def _respond(front: Frontend, request: Request, body: Door, served: Served, answer: Answer) -> Response:
    """Answer as a stream or as a whole."""
    front.check_number(1)
    ids, params = await chat_job(front, body.chat)
    [job] = [GenerationRequest(ids, one) for one in samples.each(params)]
    front.check(job.prompt_ids, job.params)
    check_size(front, [job], body.stream)
    parser = front.answers.parser(ids, body.chat.chat.tools, body.chat.most_calls, params.skip_special_tokens)
    deltas = front.generate(job.prompt_ids, job.params, served=served)
    first = await anext(deltas)
    said = _said(chain(first, deltas), answer, parser, body.chat.include_reasoning)
    if body.stream:
        stream = _stream(said, answer, request.scope[REQUEST_ID])
        return Streamed(stream, "text/event-stream", {"cache-control": "no-cache"})
    async with aclosing(said):
        async for _ in said:
            pass
    is_large = answer.parts.num_chars > INLINE_BYTES
    return Response(await off_loop(is_large, _encoded, answer.whole), media_type="application/json")


def _encoded(whole: Callable[[], Message]) -> bytes:
    return encoded(whole())


async def _said(
    deltas: Deltas, answer: Answer, parser: Parser, includes_reasoning: bool
) -> AsyncGenerator[Message, None]:
    """Everything that a stream says."""
    last = None
    async with aclosing(deltas):
        async for delta in deltas:
            for message in [] if last else answer.opening(delta):
                yield message
            last = delta
            for event in read(parser, delta.token_ids, delta.text, delta.finish_reason is not None):
                for message in answer.add(event) if includes_reasoning or not isinstance(event, Reasoning) else ():
                    yield message
    assert last is not None, "a stream ends with its finish reason or raises"
    for message in answer.closing(last, parser.num_calls, parser.num_reasoning_tokens):
        yield message


async def _stream(said: AsyncGenerator[Message, None], answer: Answer, request_id: str) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(said):
            async for message in said:
                yield _named(message)
    except Exception as error:
        for message in answer.failure(to_typed(error, request_id)):
            yield _named(message)


def _named(message: Message) -> bytes:
    return f"event: {message['type']}\n".encode() + sse(message)
