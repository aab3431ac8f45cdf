"""The gRPC API `trinity.v1.Inference`, with standard health and reflection, on our own `grpc.aio` server.

Decisions: our own server, because Ray Serve's binds every interface without TLS and has no interceptors
(docs/serving.md has the measurements). Keys and statuses are serving/grpc/guard.py's. A call without a deadline gets
serve.request_timeout_s. Cancelling a call cancels its coroutine, which closes the engine's stream.
"""

import asyncio
import functools
from contextlib import aclosing

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.frontend import Frontend
from serving.grpc.guard import Context
from serving.http.schema import sampling_params
from trinity.engine.request import Delta, SamplingParams, TokenLogprobs
from trinity.errors import InvalidRequest
from trinity.text.detokenizer import token_text

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name


ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}


POLICIES = {pb.VERSION_POLICY_LIVE: "live", pb.VERSION_POLICY_PINNED: "pinned"}


FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
MOST_BYTES = 4_000_000  # a client takes messages of 4 MiB, unless it says otherwise


class InferenceServicer(rpc.InferenceServicer):
    """The rpcs of trinity.v1.Inference, over the Frontend that HTTP uses too."""

    def __init__(self, front: Frontend):
        self.front = front

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        front = self.front
        front.check_model(request.model)
        prompt_ids = await self._prompt(request)
        room = front.room(prompt_ids) if request.WhichOneof("prompt") == "chat" else DEFAULT_MAX_TOKENS
        params = to_params(request.sampling, room)
        async with asyncio.timeout(front.config.request_timeout_s + 1):  # a client that does not read ends here
            stream = front.generate(prompt_ids, params, context.time_remaining())
            async with aclosing(stream):
                async for delta in stream:
                    await context.write(pb.GenerateResponse(delta=self._delta(delta)))
                    if delta.finish_reason is not None:
                        await context.write(pb.GenerateResponse(final=to_final(delta)))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        info, size = self.front.info, self.front.tokenizer.vocab_size
        card = pb.Model(name=info.model, max_model_len=info.max_model_len, vocab_size=size, version=info.version)
        return pb.ListModelsResponse(models=[card])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=await self._prompt(request))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=await self.front.decode(request.token_ids, MOST_BYTES))

    async def _prompt(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return await self.front.encode(request.text)
        if kind == "chat":
            return await self.front.encode_chat(to_messages(request.chat))
        if isinstance(request, pb.GenerateRequest) and kind == "token_ids":
            return list(request.token_ids.ids)
        raise InvalidRequest("the request has no prompt; set one of its kinds", param="prompt")

    def _delta(self, delta: Delta) -> pb.Delta:
        logprobs = [self._logprobs(position) for position in delta.logprobs or ()]
        return pb.Delta(text=delta.text, token_ids=delta.token_ids, logprobs=logprobs, version=delta.version)

    def _logprobs(self, position: TokenLogprobs) -> pb.TokenLogprobs:
        name = functools.partial(token_text, self.front.tokenizer)
        top = [pb.Alternative(token_id=i, token=name(i), logprob=value) for i, value in position.top]
        return pb.TokenLogprobs(
            token_id=position.token_id, token=name(position.token_id), logprob=position.logprob, top=top
        )


def to_messages(chat: pb.Chat) -> list[dict[str, str]]:
    return [to_message(message) for message in chat.messages]


def to_message(message: pb.ChatMessage) -> dict[str, str]:
    if message.role not in ROLES:
        raise InvalidRequest(
            f"role {message.role} is unknown; set one of {', '.join(pb.Role.keys()[1:])}", param="role"
        )
    return {"role": ROLES[message.role], "content": message.content}


def to_params(sampling: pb.SamplingParams, default_max_tokens: int) -> SamplingParams:
    """The fields that the client set, over the engine's defaults."""
    fields = {field.name: value for field, value in sampling.ListFields()}
    for name, make in (("stop", tuple), ("stop_token_ids", tuple), ("logit_bias", dict)):
        fields[name] = make(getattr(sampling, name))
    if (policy := sampling.version_policy) != pb.VERSION_POLICY_UNSPECIFIED:
        fields["version_policy"] = POLICIES.get(policy, str(policy))
    return sampling_params({"max_tokens": default_max_tokens, **fields})


def to_final(delta: Delta) -> pb.Final:
    assert delta.finish_reason is not None
    usage = pb.Usage(prompt_tokens=delta.num_prompt_tokens, completion_tokens=delta.num_generated_tokens)
    final = pb.Final(finish_reason=FINISH[delta.finish_reason], usage=usage)
    final.version, final.first_version = delta.version, delta.first_version
    if isinstance(delta.stop_reason, str):
        final.stop = delta.stop_reason
    elif delta.stop_reason is not None:
        final.stop_token_id = delta.stop_reason
    return final
