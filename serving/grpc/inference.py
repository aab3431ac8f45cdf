"""The gRPC API `trinity.v1.Inference`, with standard health and reflection, on our own `grpc.aio` server.

Decisions: our own server, because Ray Serve's binds every interface without TLS and has no interceptors
(docs/serving.md has the measurements). Keys and statuses are serving/grpc/guard.py's. A call without a deadline gets
serve.request_timeout_s. Cancelling a call cancels its coroutine, which closes the engine's stream.
"""

import asyncio
import functools
import itertools
from collections.abc import AsyncGenerator, Iterator, MutableMapping, MutableSequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.frontend import Frontend, Served
from serving.grpc.chat import to_deltas, to_request
from serving.grpc.guard import Context
from serving.grpc.structured import structured_outputs
from serving.http.extras import npy
from serving.http.logprobs import in_parts
from serving.http.schema import ChatRequest, sampling_params
from serving.streams import merge
from trinity.engine import samples
from trinity.engine.deltas import joined
from trinity.engine.request import Delta, SamplingParams, TokenLogprobs
from trinity.errors import InvalidRequest
from trinity.text.answers import Parser, Verbatim, read
from trinity.text.detokenizer import token_text
from trinity.text.tool_calls.events import Reasoning

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name


POLICIES = {pb.VERSION_POLICY_LIVE: "live", pb.VERSION_POLICY_PINNED: "pinned"}


FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


BESIDE: tuple[Literal["n", "priority"], ...] = ("n", "priority")  # fields of the request that SamplingParams has, too
MOST_BYTES = 4_000_000  # a client takes messages of 4 MiB, unless it says otherwise


class InferenceServicer(rpc.InferenceServicer):
    """The rpcs of trinity.v1.Inference, over the Frontend that HTTP uses too."""

    def __init__(self, front: Frontend):
        self.front = front

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        front = self.front
        served = front.served(request.model)
        front.check_routed_experts(request.return_routed_experts)
        chat = chat_of(request)
        prompt_ids, params = await self._asked(request, chat)
        front.check_number(params.num_drawn)
        answer = Answer(front, prompt_ids, params, chat, request.return_token_ids)
        async with asyncio.timeout(front.config.request_timeout_s + 1):  # a client that does not read ends here
            stream = self._drawn(prompt_ids, params, context.time_remaining(), served)
            async with aclosing(stream):
                async for index, delta in stream:
                    for response in answer.responses(index, delta):
                        await context.write(response)

    async def _asked(self, request: pb.GenerateRequest, chat: ChatRequest | None) -> tuple[list[int], SamplingParams]:
        """The prompt as the request wants it to be cut, and its parameters."""
        front = self.front
        prompt_ids = await self._prompt(request, chat)
        asked = to_params(request, 1 if chat else front.completion_limit)
        prompt_ids = front.truncated(prompt_ids, asked)
        if chat is None:
            return prompt_ids, asked
        return prompt_ids, chat.bound(to_params(request, front.chat_limit(prompt_ids)), front.answers.tool_format)

    async def _drawn(
        self, prompt_ids: list[int], params: SamplingParams, deadline_s: float | None, served: Served
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of every continuation as they come; where the best are chosen, one for each of these at the end."""
        front, every = self.front, samples.each(params)
        events = merge([front.generate(prompt_ids, one, deadline_s, served) for one in every])
        drawn: list[list[Delta]] = [[] for _ in every]
        async with aclosing(events):
            async for index, delta in events:
                drawn[index].append(delta)
                if not samples.chooses(params):
                    yield index, delta
        if samples.chooses(params):
            logprobs = [[lp for delta in deltas for lp in delta.logprobs or ()] for deltas in drawn]
            for place, index in enumerate(samples.best(params, logprobs)):
                whole = joined(drawn[index])
                yield place, whole if params.logprobs is not None else replace(whole, logprobs=None)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        info, size = self.front.info, self.front.tokenizer.vocab_size
        facts = {"max_model_len": info.max_model_len, "vocab_size": size, "version": info.version}
        parents = [(served.model, info.model if served.adapter else "") for served in self.front.models]
        return pb.ListModelsResponse(models=[pb.Model(name=name, parent=parent, **facts) for name, parent in parents])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=await self._prompt(request, chat_of(request)))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=await self.front.decode(request.token_ids, MOST_BYTES))

    async def _prompt(self, request: pb.GenerateRequest | pb.TokenizeRequest, chat: ChatRequest | None) -> list[int]:
        kind = request.WhichOneof("prompt")
        if chat is not None:
            return await self.front.encode_chat(chat.chat)
        if kind == "text":
            return await self.front.encode(request.text)
        if isinstance(request, pb.GenerateRequest) and kind == "token_ids":
            return list(request.token_ids.ids)
        raise InvalidRequest("the request has no prompt; set one of its kinds", param="prompt")


def chat_of(request: pb.GenerateRequest | pb.TokenizeRequest) -> ChatRequest | None:
    return to_request(request.chat) if request.WhichOneof("prompt") == "chat" else None


class Answer:
    """Deltas as messages. What an answer holds besides text is told where it answers a chat."""

    def __init__(
        self,
        front: Frontend,
        prompt_ids: list[int],
        params: SamplingParams,
        chat: ChatRequest | None,
        sends_prompt: bool,
    ):
        self._name, self._numerics = functools.partial(token_text, front.tokenizer), front.info.numerics
        self._prompt_ids = prompt_ids if sends_prompt else []
        self._shows_reasoning = chat is None or chat.include_reasoning
        self._parsers: list[Parser] = [Verbatim() for _ in range(params.n)]
        if chat is not None:
            asked = (prompt_ids, chat.chat.tools, chat.most_calls, params.skip_special_tokens)
            self._parsers = [front.answers.parser(*asked) for _ in range(params.n)]

    def responses(self, index: int, delta: Delta) -> Iterator[pb.GenerateResponse]:
        """Deltas about the prompt, then those of the answer, the first of which has the tokens; after the last the Final."""
        for part in itertools.chain(self._prompt_logprobs(delta), self._deltas(self._parsers[index], delta)):
            part.index = index
            yield pb.GenerateResponse(delta=part)
        if delta.finish_reason is not None:
            yield pb.GenerateResponse(final=self._final(index, delta))

    def _deltas(self, parser: Parser, delta: Delta) -> Iterator[pb.Delta]:
        events = read(parser, delta.token_ids, delta.text, delta.finish_reason is not None)
        shown = [event for event in events if self._shows_reasoning or not isinstance(event, Reasoning)]
        first, *others = to_deltas(shown)
        first.token_ids.extend(delta.token_ids)
        first.logprobs.extend(map(self._logprobs, delta.logprobs or ()))
        for each in (first, *others):
            each.version, each.num_reasoning_tokens = delta.version, parser.num_reasoning_tokens
            yield each

    def _prompt_logprobs(self, delta: Delta) -> Iterator[pb.Delta]:
        for _, positions in in_parts(delta.prompt_logprobs) if delta.prompt_logprobs else ():
            known = [self._logprobs(position) for position in positions if position is not None]
            yield pb.Delta(prompt_logprobs=known, version=delta.version)

    def _logprobs(self, position: TokenLogprobs) -> pb.TokenLogprobs:
        name = self._name
        top = [pb.Alternative(token_id=i, token=name(i), logprob=value) for i, value in position.top]
        return pb.TokenLogprobs(
            token_id=position.token_id,
            token=name(position.token_id),
            logprob=position.logprob,
            top=top,
            rank=position.rank,
        )

    def _final(self, index: int, delta: Delta) -> pb.Final:
        final = to_final(delta, self._parsers[index].num_calls > 0)
        final.index, final.system_fingerprint = index, self._numerics.fingerprint(delta.version)
        if self._numerics.is_mixed:
            final.weights_formats.extend(self._numerics.formats)
            final.is_not_reproducible = True
        final.prompt_token_ids.extend(self._prompt_ids)
        if delta.experts_TLK is not None:
            final.routed_experts = npy(delta.experts_TLK)
        return final


def to_params(request: pb.GenerateRequest, default_max_tokens: int) -> SamplingParams:
    """The fields that the client set, over the defaults."""
    fields = {field.name: _plain(value) for field, value in request.sampling.ListFields()}
    fields |= {name: getattr(request, name) for name in BESIDE if request.HasField(name)}
    if "structured_outputs" in fields:
        fields["structured_outputs"] = structured_outputs(request.sampling.structured_outputs)
    if (policy := fields.pop("version_policy", pb.VERSION_POLICY_UNSPECIFIED)) != pb.VERSION_POLICY_UNSPECIFIED:
        fields["version_policy"] = POLICIES.get(policy, str(policy))
    fields["trace"] = request.return_routed_experts
    return sampling_params({"max_tokens": default_max_tokens, "seed": samples.drawn_seed(), **fields})


def _plain(value: Any) -> Any:
    """Lists and maps of the library as Python's."""
    if isinstance(value, MutableMapping):
        return dict(value)
    return tuple(value) if isinstance(value, MutableSequence) else value


def to_final(delta: Delta, has_calls: bool) -> pb.Final:
    assert delta.finish_reason is not None
    usage = pb.Usage(prompt_tokens=delta.num_prompt_tokens, completion_tokens=delta.num_generated_tokens)
    usage.cached_tokens = delta.num_cached_tokens
    final = pb.Final(finish_reason=FINISH[delta.finish_reason], usage=usage)
    if has_calls and delta.finish_reason == "stop":
        final.finish_reason = pb.FINISH_REASON_TOOL_CALLS
    final.version, final.first_version = delta.version, delta.first_version
    if isinstance(delta.stop_reason, str):
        final.stop = delta.stop_reason
    elif delta.stop_reason is not None:
        final.stop_token_id = delta.stop_reason
    return final
