"""The two ways to ask a server for a stream of tokens: OpenAI completions over HTTP, and trinity.v1 over gRPC.

Prompts are token ids, so that their lengths are exact. No client limits its connections or repeats a request: both would
close the loop that the load keeps open.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import httpx

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from trinity.bench.open_load import Mark, RequestFailed
from trinity.errors import ConfigError, ModelNotFound, Unavailable

MAX_VOCAB_SIZE = 1 << 24
LOOK_UP_S = 10  # for questions about the server, not for requests of the load
CHANNEL = (("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True)
class Card:
    """A server's words about the model it serves, `version` included."""

    model: str
    vocab_size: int
    max_model_len: int | None
    version: str


@dataclass(frozen=True)
class Ask:
    """Form of every request. `key` is the server's, `model` and `vocab_size` None: ask the server."""

    url: str
    key: str | None = None
    model: str | None = None
    vocab_size: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    priority: int = 0


class Client(Protocol):
    async def card(self) -> Card: ...

    async def generate(self, model: str, prompt_ids: list[int], num_tokens: int, mark: Mark) -> tuple[int, int]:
        """Ask and read to the end, `mark` each chunk's text; -> input and output tokens by the server's count.

        Raises RequestFailed.
        """
        ...


class HttpClient:
    """`POST /v1/completions` of any OpenAI-compatible server, as server-sent events."""

    def __init__(self, http: httpx.AsyncClient, ask: Ask):
        self.http, self.ask = http, ask

    async def card(self) -> Card:
        """Raises Unavailable, ModelNotFound, and ConfigError where the vocabulary's size cannot be found out."""
        models = (await self._look_up("GET", "/v1/models")).json()["data"]
        name = self.ask.model
        found = next((card for card in models if name in (None, card["id"])), None)
        if found is None:
            listed = ", ".join(card["id"] for card in models) or "none"
            raise ModelNotFound(f"the server lists no model {name or ''}; it lists {listed}")
        size = self.ask.vocab_size or await self._vocab_size(found["id"])
        answer = await self._look_up("GET", "/version", may_fail=True)
        version = answer.text if answer.status_code == 200 else "unknown"
        return Card(found["id"], size, found.get("max_model_len"), version)

    async def generate(self, model: str, prompt_ids: list[int], num_tokens: int, mark: Mark) -> tuple[int, int]:
        body = {"model": model, "prompt": prompt_ids, "max_tokens": num_tokens, "temperature": self.ask.temperature}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        more: dict[str, Any] = {"ignore_eos": True} if self.ask.ignore_eos else {}
        more |= {"priority": self.ask.priority} if self.ask.priority else {}
        try:
            async with self.http.stream("POST", "/v1/completions", json={**body, **options, **more}) as response:
                if response.status_code != 200:
                    raise RequestFailed(f"HTTP {response.status_code}", _words(await response.aread()))
                return await _read(response, mark)
        except httpx.HTTPError as error:
            raise RequestFailed(type(error).__name__, str(error)) from None

    async def _look_up(self, method: str, path: str, may_fail: bool = False, **more: Any) -> httpx.Response:
        try:
            answer = await self.http.request(method, path, timeout=LOOK_UP_S, **more)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"no server at {self.ask.url} ({error}); start one with `trinity serve`") from None
        if answer.status_code != 200 and not may_fail:
            raise Unavailable(f"{path}: the server answered {answer.status_code}: {_words(answer.content)}")
        return answer

    async def _vocab_size(self, model: str) -> int:
        """Find it by bisection: `POST /detokenize` refuses an id beyond the vocabulary. OpenAI's API does not tell it."""
        inside, outside = 0, MAX_VOCAB_SIZE
        while outside - inside > 1:
            middle = (inside + outside) // 2
            body = {"model": model, "tokens": [middle]}
            answer = await self._look_up("POST", "/detokenize", may_fail=True, json=body)
            inside, outside = (middle, outside) if answer.status_code == 200 else (inside, middle)
        if not 0 < inside < MAX_VOCAB_SIZE - 1:
            raise ConfigError("the server does not tell the size of its vocabulary; give --vocab-size")
        return outside


async def _read(response: httpx.Response, mark: Mark) -> tuple[int, int]:
    """Events up to [DONE]; -> usage. A chunk without text counts too: its token's bytes may be held back."""
    usage = None
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            if not usage:
                raise RequestFailed("no usage", "the server reports no token counts at the end of a stream")
            return usage["prompt_tokens"], usage["completion_tokens"]
        if line.startswith("data:"):
            event = _object(line[5:])
            if "error" in event:
                raise RequestFailed(f"error event: {event['error'].get('code')}", _words(line[5:]))
            if choices := event.get("choices"):
                mark(choices[0].get("text", ""))
            usage = event.get("usage") or usage
    raise RequestFailed("broken stream", "it ended without [DONE]")


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise RequestFailed("not JSON", repr(text[:200])) from None


def _words(body: str | bytes) -> str:
    """The message of an OpenAI error, or the beginning of whatever else came."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return repr(body[:200])


class GrpcClient:
    """`trinity.v1.Inference/Generate`. All requests share one HTTP/2 connection."""

    def __init__(self, channel: grpc.aio.Channel, ask: Ask):
        self.stub, self.ask = rpc.InferenceStub(channel), ask
        self.metadata = (("authorization", f"Bearer {ask.key}"),) if ask.key else ()

    async def card(self) -> Card:
        """Raises Unavailable and ModelNotFound."""
        try:
            call = self.stub.ListModels(pb.ListModelsRequest(), metadata=self.metadata, timeout=LOOK_UP_S)
            models = (await call).models
        except grpc.aio.AioRpcError as error:
            what = f"{error.code().name}: {error.details()}"
            raise Unavailable(f"no gRPC answer from {self.ask.url} ({what}); is it the server's gRPC port?") from None
        found = next((model for model in models if self.ask.model in (None, model.name)), None)
        if found is None:
            raise ModelNotFound(f"the server lists no model {self.ask.model or ''}")
        size = self.ask.vocab_size or found.vocab_size
        return Card(found.name, size, found.max_model_len, f"weights {found.version}")

    async def generate(self, model: str, prompt_ids: list[int], num_tokens: int, mark: Mark) -> tuple[int, int]:
        ask = self.ask
        how = pb.SamplingParams(max_tokens=num_tokens, temperature=ask.temperature, ignore_eos=ask.ignore_eos)
        ids = pb.TokenIds(ids=prompt_ids)
        request = pb.GenerateRequest(model=model, token_ids=ids, sampling=how, priority=ask.priority)
        usage = None
        try:
            async for response in self.stub.Generate(request, metadata=self.metadata):
                if response.WhichOneof("event") == "delta":
                    mark(response.delta.text)
                else:
                    usage = response.final.usage
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(error.code().name, error.details() or "") from None
        if usage is None:
            raise RequestFailed("broken stream", "it ended without a Final")
        return usage.prompt_tokens, usage.completion_tokens


@asynccontextmanager
async def http_client(ask: Ask) -> AsyncIterator[HttpClient]:
    headers = {"authorization": f"Bearer {ask.key}"} if ask.key else {}
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=ask.url, headers=headers, timeout=None, limits=unlimited) as http:  # noqa: S113
        yield HttpClient(http, ask)


@asynccontextmanager
async def grpc_client(ask: Ask) -> AsyncIterator[GrpcClient]:
    scheme, _, address = ask.url.rpartition("://")
    if scheme == "https":
        channel = grpc.aio.secure_channel(address.rstrip("/"), grpc.ssl_channel_credentials(), options=CHANNEL)
    else:
        channel = grpc.aio.insecure_channel(address.rstrip("/"), options=CHANNEL)
    async with channel:
        yield GrpcClient(channel, ask)


CLIENTS: dict[str, Callable[[Ask], AbstractAsyncContextManager[Client]]] = {
    "completions": http_client,
    "grpc": grpc_client,
}
