"""The OpenAI-compatible HTTP API: routes, their access, and how one request becomes streams of Deltas.

Decisions: a route is a line in ROUTES and says there whether it needs the key. The first Delta is awaited before the
answer begins, so that an error that comes at once has its proper status; a later one is an event inside the stream.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

import trinity
from serving.access import Access
from serving.errors import RouteError, openai_body, to_typed
from serving.frontend import Frontend, new_request_id, now_s, off_loop
from serving.http import schema
from serving.http.bodies import parsed
from serving.http.edge import REQUEST_ID, Edge, error_response
from serving.http.openai import DONE, ChatFormat, Choice, CompletionFormat, Envelope, Format, encoded, sse, usage
from serving.http.streamed import Streamed, with_numbers, with_text
from serving.page import dashboard
from serving.streams import merge
from trinity.engine.request import Delta, SamplingParams
from trinity.errors import InvalidRequest, TrinityError, Unavailable

Handler = Callable[[Frontend, Request], Awaitable[Response]]
Events = AsyncGenerator[tuple[int, Delta], None]
T = TypeVar("T")
M = TypeVar("M", bound=schema.Strict)
INLINE_BYTES = 64 << 10  # some milliseconds of writing JSON


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to generate."""

    prompt_ids: list[int]
    params: SamplingParams


async def completions(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.CompletionRequest, request)
    front.check_model(body.model)
    given = body.prompts()
    front.check_number(len(given) * body.n)
    prompts = [await _ids(front, prompt, body.add_special_tokens) for prompt in given]
    jobs = [
        GenerationRequest(ids, body.params(body.max_tokens, body.logprobs, sample))
        for ids in prompts
        for sample in range(body.n)
    ]
    echoes = [await _echo(front, prompt) if body.echo else "" for prompt in given for _ in range(body.n)]
    form = CompletionFormat(front.tokenizer, body.logprobs is not None, echoes)
    return await respond(front, request, body, jobs, form)


async def _ids(front: Frontend, prompt: str | list[int], add_special: bool) -> list[int]:
    if isinstance(prompt, str):
        return await front.encode(prompt, add_special)
    front.check_length(prompt)
    return prompt


async def _echo(front: Frontend, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else await front.decode(prompt, front.config.max_answer_bytes)


async def chat_completions(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.ChatRequest, request)
    front.check_model(body.model)
    front.check_number(body.n)
    messages = [message.flat() for message in body.messages]
    ids = await front.encode_chat(messages, body.add_generation_prompt, body.add_special_tokens)
    limit = body.limit or front.room(ids)
    jobs = [GenerationRequest(ids, body.params(limit, body.num_logprobs(), sample)) for sample in range(body.n)]
    return await respond(front, request, body, jobs, ChatFormat(front.tokenizer, body.logprobs))


async def respond(
    front: Frontend, request: Request, body: schema.Generation, jobs: list[GenerationRequest], form: Format
) -> Response:
    """Run all jobs side by side and answer as a stream or as a whole."""
    envelope = Envelope(form.prefix + new_request_id(), now_s(), front.info.model)
    for job in jobs:
        front.check(job.prompt_ids, job.params)
    if not body.stream:
        _check_size(front, jobs)
    events = merge([front.generate(job.prompt_ids, job.params) for job in jobs])
    if body.stream:
        first = await anext(events)
        chunks = _chunks(_chain(first, events), envelope, form, body, len(jobs), request.scope[REQUEST_ID])
        return Streamed(chunks, "text/event-stream", {"cache-control": "no-cache"})
    choices = [Choice(index) for index in range(len(jobs))]
    async with aclosing(events):
        async for index, delta in events:
            choices[index].add(delta)
    is_large = sum(choice.size for choice in choices) > INLINE_BYTES
    return Response(await off_loop(is_large, _whole, form, envelope, choices, body.n), media_type="application/json")


def _whole(form: Format, envelope: Envelope, choices: list[Choice], n: int) -> bytes:
    last = [_last(choice) for choice in choices]
    full = [form.full(choice) for choice in choices]
    return encoded(envelope.wrap(form.whole, full, max(d.version for d in last), usage=usage(last, n)))


def _check_size(front: Frontend, jobs: list[GenerationRequest]) -> None:
    """Refuse an answer that is too large to be held before it is sent."""
    tokens = [min(job.params.max_tokens, front.room(job.prompt_ids)) for job in jobs]
    size = sum(Choice.most_bytes(num, job.params.logprobs) for num, job in zip(tokens, jobs, strict=True))
    if size > (most := front.config.max_answer_bytes):
        raise InvalidRequest(
            f"the answer may have {size:,} bytes; serve.max_answer_bytes is {most:,}. Stream it, or ask for less: "
            "fewer max_tokens, logprobs, n or prompts."
        )


def _last(choice: Choice) -> Delta:
    assert choice.last is not None, "a stream ends with its finish reason or raises"
    return choice.last


async def _chain(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _chunks(
    events: Events, envelope: Envelope, form: Format, body: schema.Generation, num: int, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Chunks, then usage where asked for, then [DONE]; a failure is one error event instead of the rest."""
    last: dict[int, Delta] = {}
    try:
        async with aclosing(events):
            async for index, delta in events:
                opening = form.opening(index) if index not in last else None
                last[index] = delta
                for choice in filter(None, (opening, form.piece(index, delta))):
                    yield sse(envelope.wrap(form.chunk, [choice], delta.version))
        if body.include_usage:
            deltas = [last[index] for index in range(num)]
            yield sse(envelope.wrap(form.chunk, [], deltas[-1].version, usage=usage(deltas, body.n)))
    except Exception as error:
        yield sse(openai_body(to_typed(error, request_id)))
    yield DONE


async def tokenize(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.TokenizeRequest, request)
    front.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    if body.messages is not None:
        messages = [message.flat() for message in body.messages]
        ids = await front.encode_chat(messages, body.add_generation_prompt, bool(body.add_special_tokens))
    else:
        ids = await front.encode(body.prompt or "", body.add_special_tokens is not False)
    return Streamed(with_numbers("tokens", ids, {"count": len(ids), "max_model_len": front.info.max_model_len}))


async def detokenize(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.DetokenizeRequest, request)
    front.check_model(body.model)
    texts = front.decoded(body.tokens)
    first = await anext(texts)
    return Streamed(with_text("prompt", _chain(first, texts)))


async def models(front: Frontend, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(front)]})


async def model(front: Frontend, request: Request) -> Response:
    front.check_model(request.path_params["name"])
    return JSONResponse(_card(front))


def _card(front: Frontend) -> dict[str, Any]:
    info = front.info
    return {
        "id": info.model,
        "object": "model",
        "created": 0,
        "owned_by": "trinity",
        "max_model_len": info.max_model_len,
    }


async def health(front: Frontend, request: Request) -> Response:
    """Liveness: this process answers."""
    return JSONResponse({"status": "alive"})


async def ready(front: Frontend, request: Request) -> Response:
    """Readiness: an engine answers and nobody is draining us."""
    if not front.ready:
        raise Unavailable("not ready: draining" if front.admission.draining else "not ready: no engine answers")
    return JSONResponse({"status": "ready"})


async def healthz(front: Frontend, request: Request) -> Response:
    """Answer KubeRay's question to a node that serves: the word `success`, until it drains."""
    if front.admission.draining:
        raise Unavailable("draining")
    return PlainTextResponse("success")


async def version(front: Frontend, request: Request) -> Response:
    return JSONResponse({"version": trinity.__version__, "weights_version": front.info.version})


async def metrics(front: Frontend, request: Request) -> Response:
    front.metrics.clients(front.admission.held)
    text, kind = front.metrics.render()
    return Response(text, headers={"content-type": kind})


async def dashboard_page(front: Frontend, request: Request) -> Response:
    """The page holds no data: it asks for the key, where one is needed, and then for the data."""
    return Response(dashboard.PAGE, headers=dashboard.HEADERS, media_type="text/html")


async def dashboard_data(front: Frontend, request: Request) -> Response:
    body = dashboard.encode(*front.placement.latest())
    return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")


@dataclass(frozen=True)
class Endpoint:
    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    access: Access

    @property
    def methods(self) -> tuple[str, ...]:
        """HEAD is GET whose body the listener leaves out."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


ROUTES = (
    Endpoint("POST", "/v1/completions", completions, "key"),
    Endpoint("POST", "/v1/chat/completions", chat_completions, "key"),
    Endpoint("GET", "/v1/models", models, "key"),
    Endpoint("GET", "/v1/models/{name:path}", model, "key"),
    Endpoint("POST", "/tokenize", tokenize, "key"),
    Endpoint("POST", "/detokenize", detokenize, "key"),
    Endpoint("GET", "/version", version, "key"),
    Endpoint("GET", "/metrics", metrics, "key"),
    Endpoint("GET", "/health", health, "open"),
    Endpoint("GET", "/ready", ready, "open"),
    Endpoint("GET", "/-/healthz", healthz, "open"),
    Endpoint("GET", "/dashboard", dashboard_page, "open"),
    Endpoint("GET", "/dashboard/data", dashboard_data, "admin"),
)


def build_app(front: Frontend) -> FastAPI:
    """The ASGI application over one Frontend. Does not own it."""
    app = FastAPI(
        title="Trinity",
        version=trinity.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={TrinityError: _show, HTTPException: _show},
    )
    for route in ROUTES:
        app.add_api_route(route.path, _bind(route.handler, front), methods=list(route.methods), response_model=None)
    access = {route.path: route.access for route in ROUTES}
    app.add_middleware(Edge, front=front, access=access)  # type: ignore[arg-type]
    return app


def _bind(handler: Handler, front: Frontend) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(front, request)

    return endpoint


async def _show(request: Request, error: Exception) -> Response:
    return error_response(error, request.scope[REQUEST_ID])


async def parse(front: Frontend, kind: type[M], request: Request) -> M:
    """The typed body. Raises RouteError for another content type and InvalidRequest for what is wrong in it."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RouteError(f"the body's content type is {content_type[:100]!r}; send application/json", 415)
    return await parsed(kind, await request.body(), front.info.max_model_len)
