"""The gRPC API `trinity.v1.Inference`, with standard health and reflection, on our own `grpc.aio` server.

Decisions: our own server, because Ray Serve's binds every interface without TLS and has no interceptors
(docs/serving.md has the measurements). The interceptor checks the key before any method, reflection included; health is
open, for load balancers. A call without a deadline gets serve.request_timeout_s. Cancelling a call cancels its coroutine,
which closes the engine's stream.
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.edge import key_matches
from serving.errors import TABLE, grpc_trailers, to_typed
from serving.frontend import Frontend, new_request_id
from serving.openai import token_text
from serving.schema import sampling_params
from trinity.config import ServeConfig
from trinity.engine.request import Delta, SamplingParams, TokenLogprobs
from trinity.errors import ConfigError, InvalidRequest

Context: TypeAlias = grpc.aio.ServicerContext
SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
OPEN_SERVICES = (health.SERVICE_NAME,)
ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
DEFAULT_MAX_TOKENS = SamplingParams().max_tokens


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for every method outside OPEN_SERVICES, known or not, without `authorization: Bearer KEY`."""

    def __init__(self, key: str):
        self.key = key
        # Stream-stream, so that it answers without waiting for a message of the client's.
        self.refuse = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        service = details.method.lstrip("/").rpartition("/")[0]
        headers = dict(details.invocation_metadata or ())
        if service in OPEN_SERVICES or key_matches(headers.get("authorization"), self.key):
            return await continuation(details)
        return self.refuse


async def _refuse(requests: Any, context: Context) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "send the server's key as metadata `authorization: Bearer KEY`"
    )


def guarded(method: Callable[[Any, Any, Context], Awaitable[Any]]) -> Callable[[Any, Any, Context], Awaitable[Any]]:
    """An rpc method whose exceptions become statuses: the process edge of gRPC."""

    @functools.wraps(method)
    async def call(self: "InferenceServicer", request: Any, context: Context) -> Any:
        started, status = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            answer = await method(self, request, context)
            status = grpc.StatusCode.OK
            return answer
        except Exception as error:
            typed = to_typed(error, new_request_id())
            status = TABLE[typed.code].grpc
            await context.abort(status, typed.message, grpc_trailers(typed))
        finally:
            self.front.metrics.answered(f"/{SERVICE}/{method.__name__}", status.name, time.perf_counter() - started)

    return call


class InferenceServicer(rpc.InferenceServicer):
    """The rpcs of trinity.v1, over the Frontend that HTTP uses too."""

    def __init__(self, front: Frontend):
        self.front = front

    @guarded
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

    @guarded
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        info, size = self.front.info, self.front.tokenizer.vocab_size
        card = pb.Model(name=info.model, max_model_len=info.max_model_len, vocab_size=size, version=info.version)
        return pb.ListModelsResponse(models=[card])

    @guarded
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=await self._prompt(request))

    @guarded
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=self.front.decode(request.token_ids))

    async def _prompt(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return await self.front.encode(request.text)
        if kind == "chat":
            return await self.front.encode_chat([to_message(message) for message in request.chat.messages])
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


def to_message(message: pb.ChatMessage) -> dict[str, str]:
    if message.role not in ROLES:
        raise InvalidRequest(
            f"role {message.role} is unknown; set one of {', '.join(pb.Role.keys()[1:])}", param="role"
        )
    return {"role": ROLES[message.role], "content": message.content}


def to_params(sampling: pb.SamplingParams, default_max_tokens: int) -> SamplingParams:
    """The fields that the client set, over the engine's defaults."""
    fields = {field.name: value for field, value in sampling.ListFields()}
    for name in ("stop", "stop_token_ids"):
        fields[name] = tuple(fields.get(name, ()))
    fields["logit_bias"] = dict(sampling.logit_bias)
    return sampling_params({"max_tokens": default_max_tokens, **fields})


def to_final(delta: Delta) -> pb.Final:
    assert delta.finish_reason is not None
    usage = pb.Usage(prompt_tokens=delta.num_prompt_tokens, completion_tokens=delta.num_generated_tokens)
    final = pb.Final(finish_reason=FINISH[delta.finish_reason], usage=usage, version=delta.version)
    if isinstance(delta.stop_reason, str):
        final.stop = delta.stop_reason
    elif delta.stop_reason is not None:
        final.stop_token_id = delta.stop_reason
    return final


class GrpcServer:
    """The listening server. `start` binds, `set_ready` tells health, `stop` lets running calls end within `grace_s`."""

    def __init__(self, front: Frontend):
        config = front.config
        interceptors = [KeyInterceptor(config.api_key)] if config.api_key else []
        options = [("grpc.max_receive_message_length", config.max_body_bytes), ("grpc.so_reuseport", 0)]
        self.server = grpc.aio.server(interceptors=interceptors, options=options)
        self.health = health.aio.HealthServicer()
        self.port = 0
        self._config = config
        rpc.add_InferenceServicer_to_server(InferenceServicer(front), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> None:
        """Raises ConfigError where the port is taken or the certificate cannot be read."""
        address = f"{bracketed(self._config.host)}:{self._config.grpc_port}"
        try:
            if self._config.tls_cert:
                self.port = self.server.add_secure_port(address, credentials(self._config))
            else:
                self.port = self.server.add_insecure_port(address)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"gRPC cannot listen on {address}: {error}; choose another serve.grpc_port") from None
        await self.server.start()

    async def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self.health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)


def credentials(config: ServeConfig) -> grpc.ServerCredentials:
    assert config.tls_key
    assert config.tls_cert
    return grpc.ssl_server_credentials([(Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())])


def bracketed(host: str) -> str:
    """IPv6 addresses take brackets in front of a port."""
    return f"[{host}]" if ":" in host else host
