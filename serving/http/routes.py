"""The OpenAI-compatible HTTP API: routes, their access, and how one request becomes streams of Deltas.

Decisions: a route is a line in ROUTES and says there whether it needs the key. The first Delta is awaited before the
answer begins, so that an error that comes at once has its proper status; a later one is an event inside the stream.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route

import trinity
from serving.access import ASKS, Access
from serving.errors import RouteError, openai_body, to_typed
from serving.frontend import DECODED_IDS, Frontend, Served, new_request_id, now_s, off_loop
from serving.http import pages, schema
from serving.http.bodies import parse
from serving.http.edge import REQUEST_ID, Edge, Message, Receive, Send
from serving.http.extras import Extras
from serving.http.jobs import INLINE_BYTES, GenerationRequest, chain, chat_job, check_size
from serving.http.logprobs import Echo
from serving.http.models import model_card, model_list
from serving.http.openai import DONE, ChatFormat, Choice, CompletionFormat, Envelope, Format, encoded, sse, usage
from serving.http.streamed import Streamed, with_numbers, with_text
from serving.http.turns import count_tokens, messages, responses
from serving.streams import merge
from trinity.engine import samples
from trinity.engine.request import Delta, SamplingParams
from trinity.errors import InvalidRequest, Unavailable

Handler = Callable[[Frontend, Request], Awaitable[Response]]
ROUTING = {404: "no such path", 405: "this path does not take this method"}
Events = AsyncGenerator[tuple[int, Delta], None]


async def completions(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.CompletionRequest, request)
    served = front.served(body.model)
    given = body.prompts()
    front.check_number(len(given) * body.sampling.num_drawn)
    limit = front.completion_limit if body.max_tokens is None else body.max_tokens
    params = body.params(limit, body.logprobs)
    prompts = [await _ids(front, prompt, body.add_special_tokens, params) for prompt in given]
    echoes = [await _echo(front, body, *each) for each in zip(given, prompts, strict=True)]
    form = CompletionFormat(front.tokenizer, body, [echo for echo in echoes for _ in range(body.n)])
    return await respond(front, request, body, served, _jobs(prompts, params), form)


def _jobs(prompts: list[list[int]], params: SamplingParams) -> list[GenerationRequest]:
    return [GenerationRequest(ids, one) for ids in prompts for one in samples.each(params)]


async def _ids(front: Frontend, prompt: str | list[int], add_special: bool, params: SamplingParams) -> list[int]:
    if isinstance(prompt, str):
        return front.truncated(await front.encode(prompt, add_special), params)
    prompt = front.truncated(prompt, params)
    front.check_length(prompt)
    return prompt


async def _echo(
    front: Frontend, body: schema.CompletionRequest, prompt: str | list[int], ids: list[int]
) -> Echo | None:
    if not body.echo:
        return None
    if not isinstance(prompt, str) or body.sampling.truncate_prompt_tokens:
        return Echo(await front.decode(ids, front.config.max_answer_bytes))
    if body.logprobs is None:
        return Echo(prompt)
    return await off_loop(len(ids) > DECODED_IDS, Echo.of, front.tokenizer, prompt, ids)


async def chat_completions(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.ChatRequest, request)
    served = front.served(body.model)
    front.check_number(body.sampling.num_drawn)
    ids, params = await chat_job(front, body)
    jobs = _jobs([ids], params)
    skips = body.sampling.skip_special_tokens
    parsers = [front.answers.parser(ids, body.chat.tools, body.most_calls, skips) for _ in jobs]
    includes_reasoning = body.include_reasoning if front.answers.reasons else None
    form = ChatFormat(front.tokenizer, body, parsers, includes_reasoning)
    return await respond(front, request, body, served, jobs, form)


async def respond(
    front: Frontend,
    request: Request,
    body: schema.Generation,
    served: Served,
    jobs: list[GenerationRequest],
    form: Format,
) -> Response:
    """Run all jobs side by side and answer as a stream or as a whole."""
    envelope = Envelope(form.prefix + new_request_id(), now_s(), served.model, front.info.numerics)
    front.check_routed_experts(body.return_routed_experts)
    for job in jobs:
        front.check(job.prompt_ids, job.params)
    check_size(front, jobs, body.stream)
    if body.stream and samples.chooses(body.sampling):
        raise InvalidRequest("best_of above n cannot be streamed: the best is known at the end", param="best_of")
    prompts = [job.prompt_ids for job in jobs[:: body.sampling.num_drawn] for _ in range(body.n)]
    extras = Extras(body, prompts)
    events = merge([front.generate(job.prompt_ids, job.params, served=served) for job in jobs])
    if body.stream:
        first = await anext(events)
        chunks = _chunks(chain(first, events), envelope, form, extras, request.scope[REQUEST_ID])
        return Streamed(chunks, "text/event-stream", {"cache-control": "no-cache"})
    choices = [Choice(index) for index in range(len(jobs))]
    async with aclosing(events):
        async for index, delta in events:
            choices[index].add(delta)
    is_large = sum(choice.size for choice in choices) > INLINE_BYTES
    return Response(await off_loop(is_large, _whole, form, envelope, extras, choices), media_type="application/json")


def _whole(form: Format, envelope: Envelope, extras: Extras, drawn: list[Choice]) -> bytes:
    """The best of what was drawn for each prompt; `usage` counts all of it."""
    sampling = extras.body.sampling
    groups = [drawn[start : start + sampling.num_drawn] for start in range(0, len(drawn), sampling.num_drawn)]
    choices = [group[i] for group in groups for i in samples.best(sampling, [choice.logprobs for choice in group])]
    for index, choice in enumerate(choices):
        choice.index = index
    full = [form.full(c) | extras.of_choice(c.index) | extras.of_tokens(c.token_ids, c.experts_TLK) for c in choices]
    last = [_last(choice) for choice in drawn]
    used = usage(last, sampling.num_drawn) | form.usage_details()
    more = {"usage": used, **form.more(choices), **extras.of_answer()}
    return encoded(envelope.wrap(form.whole, full, max(d.version for d in last), **more))


def _last(choice: Choice) -> Delta:
    assert choice.last is not None, "a stream ends with its finish reason or raises"
    return choice.last


async def _chunks(
    events: Events, envelope: Envelope, form: Format, extras: Extras, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Chunks, then usage where asked for, then [DONE]; a failure is one error event instead of the rest."""
    last: dict[int, Delta] = {}
    first = extras.of_answer()
    try:
        async with aclosing(events):
            async for index, delta in events:
                is_first, is_large = index not in last, _is_large(delta)
                last[index] = delta
                parts = _parts(form, extras, index, delta, is_first)
                for part in await off_loop(True, list[dict[str, Any]], parts) if is_large else parts:
                    chunk = envelope.wrap(form.chunk, version=delta.version, **first, **part, **extras.so_far(delta))
                    yield await off_loop(is_large, sse, chunk)
                    first = {}
                    if is_first:  # what is said of a long prompt has many parts
                        await asyncio.sleep(0)
        if extras.body.include_usage:
            deltas = [last[index] for index in range(len(extras.prompts))]
            used = usage(deltas, extras.body.n) | form.usage_details()
            yield sse(envelope.wrap(form.chunk, [], deltas[-1].version, usage=used))
    except Exception as error:
        yield sse(openai_body(to_typed(error, request_id)))
    yield DONE


def _is_large(delta: Delta) -> bool:
    """Would what is made of it hold up other streams? The last Delta may have the experts of every token."""
    return delta.experts_TLK is not None and delta.experts_TLK.nbytes > INLINE_BYTES


def _parts(form: Format, extras: Extras, index: int, delta: Delta, is_first: bool) -> Iterator[dict[str, Any]]:
    """Parts of the chunks that one Delta becomes: one choice each, and what is said beside it."""
    own = extras.of_choice(index) if is_first else {}
    for opening in form.openings(index, delta) if is_first else ():
        [choice] = opening["choices"]
        yield opening | {"choices": [choice | own]}
        own = {}
    first, *others = form.pieces(index, delta)
    for choice in (first | own | extras.of_tokens(delta.token_ids, delta.experts_TLK), *others):
        yield {"choices": [choice]}


async def tokenize(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.TokenizeRequest, request)
    front.check_model(body.model)
    if (body.prompt is None) == (not body.messages):
        raise InvalidRequest("send either prompt or messages", param="prompt")
    if body.prompt is None:
        ids = await front.encode_chat(body.chat, bool(body.add_special_tokens))
    else:
        ids = await front.encode(body.prompt, body.add_special_tokens is not False)
    return Streamed(with_numbers("tokens", ids, {"count": len(ids), "max_model_len": front.info.max_model_len}))


async def detokenize(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.DetokenizeRequest, request)
    front.check_model(body.model)
    texts = front.decoded(body.tokens)
    first = await anext(texts)
    return Streamed(with_text("prompt", chain(first, texts)))


async def tokenizer_info(front: Frontend, request: Request) -> Response:
    """Tell a client how to write prompts as this model's own tokenizer would, by the names that transformers gives."""
    own = front.tokenizer
    info = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": front.info.max_model_len}
    info |= {"bos_token": own.bos_token, "eos_token": own.eos_token, "pad_token": own.pad_token}
    return JSONResponse(info | {"chat_template": own.chat_template})


async def models(front: Frontend, request: Request) -> Response:
    return JSONResponse(model_list(front.info, front.started_s, front.models))


async def model(front: Frontend, request: Request) -> Response:
    served = front.served(request.path_params["name"])
    return JSONResponse(model_card(front.info, front.started_s, served))


async def load_adapter(front: Frontend, request: Request) -> Response:
    """Serve an adapter beside the base, as vLLM's route of that name does."""
    body = await parse(front, schema.LoadAdapterRequest, request)
    await front.load_adapter(body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(front: Frontend, request: Request) -> Response:
    body = await parse(front, schema.UnloadAdapterRequest, request)
    await front.placement.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def reset_prefix_cache(front: Frontend, request: Request) -> Response:
    """Have all engines forget what no running request has."""
    await front.engine.reset_prefix_cache()
    return Response()


async def engine_roles(front: Frontend, request: Request) -> Response:
    """Have engines compute prompts, answers or both from now on."""
    body = await parse(front, schema.RolesRequest, request)
    await front.engine.set_roles(body.roles)
    return Response()


async def health(front: Frontend, request: Request) -> Response:
    """Liveness: this process answers."""
    return JSONResponse({"status": "alive"})


async def ready(front: Frontend, request: Request) -> Response:
    """Readiness: an engine answers and nobody is draining us."""
    if not front.ready:
        raise Unavailable("not ready: draining" if front.leaving else "not ready: no engine answers")
    return JSONResponse({"status": "ready"})


async def healthz(front: Frontend, request: Request) -> Response:
    """Answer KubeRay's question to a node that serves: the word `success`, until it drains."""
    if front.leaving:
        raise Unavailable("draining")
    return PlainTextResponse("success")


async def version(front: Frontend, request: Request) -> Response:
    return JSONResponse({"version": trinity.__version__, "weights_version": front.info.version})


async def metrics(front: Frontend, request: Request) -> Response:
    front.metrics.admitted(front.admission.held, front.admission.num_gateways)
    text, kind = front.metrics.render(load_alone=ASKS.get().name in front.config.clients)
    return Response(text, headers={"content-type": kind})


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
    Endpoint("POST", "/v1/responses", responses, "key"),
    Endpoint("POST", "/v1/messages", messages, "key"),
    Endpoint("POST", "/v1/messages/count_tokens", count_tokens, "key"),
    Endpoint("GET", "/v1/models", models, "key"),
    Endpoint("GET", "/v1/models/{name:path}", model, "key"),
    Endpoint("POST", "/v1/load_lora_adapter", load_adapter, "admin"),
    Endpoint("POST", "/v1/unload_lora_adapter", unload_adapter, "admin"),
    Endpoint("POST", "/tokenize", tokenize, "key"),
    Endpoint("POST", "/detokenize", detokenize, "key"),
    Endpoint("GET", "/tokenizer_info", tokenizer_info, "key"),
    Endpoint("POST", "/reset_prefix_cache", reset_prefix_cache, "admin"),
    Endpoint("POST", "/engine_roles", engine_roles, "admin"),
    Endpoint("GET", "/version", version, "key"),
    Endpoint("GET", "/metrics", metrics, "key"),
    Endpoint("GET", "/health", health, "open"),
    Endpoint("GET", "/ready", ready, "open"),
    Endpoint("GET", "/-/healthz", healthz, "open"),
    Endpoint("GET", "/", pages.chat_page, "open"),
    Endpoint("GET", "/page/data", pages.chat_data, "key"),
    Endpoint("GET", "/dashboard", pages.dashboard_page, "open"),
    Endpoint("GET", "/dashboard/data", pages.dashboard_data, "admin"),
    Endpoint("GET", "/dashboard/training", pages.training_data, "admin"),
)


class Api:
    """The ASGI application over one Frontend, which it does not own."""

    def __init__(self, front: Frontend):
        self._front = front
        self.routes = [(Route(each.path, each.handler, methods=each.methods), each) for each in ROUTES]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        response = await self._found(scope).handler(self._front, Request(scope, receive))
        await response(scope, receive, send)

    def _found(self, scope: Message) -> Endpoint:
        """The endpoint of that path and method, noted as the scope's route. Raises RouteError."""
        status = 404
        for route, endpoint in self.routes:
            match, more = route.matches(scope)
            if match is Match.FULL:
                scope.update(more, route=endpoint)
                return endpoint
            status = 405 if match is Match.PARTIAL else status
        raise RouteError(ROUTING[status], status)


def build_app(front: Frontend) -> Edge:
    return Edge(Api(front), front, {route.path: route.access for route in ROUTES})
