"""Frontend that both edges share: prompts into token ids, requests into an engine, one place for limits, deadlines and health.

Decisions: errors are raised, never sent as a Delta; a stream ends with a finish reason or with an exception. Work whose size
a client chooses is done in a thread where it is large, so that one request does not stall every stream.
"""

import asyncio
import codecs
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from serving.access import ASKS
from serving.continuation import Continuing, Engines
from serving.limits import Admission, Slot
from serving.metrics import Exporter
from serving.pins import Pins
from serving.pool_operator import Operator, Placement
from serving.tracing import Tracing
from serving.training_run import TrainingRun
from trinity.config import AdapterRef, Client, Role, ServeConfig
from trinity.engine.defaults import SamplingDefaults
from trinity.engine.numerics import Numerics
from trinity.engine.prefix_keys import KeyBase
from trinity.engine.request import Delta, SamplingParams, check_length, check_numbers, truncated
from trinity.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, PromptTooLong, Unavailable
from trinity.text.answers import AnswerFormat
from trinity.text.chat_template import NUM_WORKERS
from trinity.text.conversation import Chat, render
from trinity.text.tokenizer import Tokenizer

log = logging.getLogger("trinity.serving")
DEFAULT_MAX_TOKENS = SamplingParams().max_tokens
T = TypeVar("T")
INLINE_CHARS, DECODED_IDS = 4096, 1024  # about a millisecond of tokenising, and less of its contrary
SILENT_S = 4.0  # of all engines, until balancers are told that none answers: on a busy machine a probe may be late
LARGE_CHAT_CHARS = 1 << 16  # some ten milliseconds of a template
MAX_CHARS_PER_TOKEN = 64  # a longer text cannot fit the context, whatever the tokenizer makes of it


@dataclass(frozen=True)
class EngineInfo:
    """Facts that an engine says of itself. `max_model_len` counts prompt and generated tokens together."""

    model: str
    max_model_len: int
    version: int
    engine_id: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    routed_bytes: int = 0  # of the experts that one token goes to
    moe_layers: tuple[int, ...] = ()  # layers with routed experts
    started: int = 0  # when, in seconds
    keys: KeyBase | None = None  # how its blocks are named, where they are cached
    role: Role = "both"  # which it has heard of
    line: int = 0  # of its version (trinity/utils/lines.py)
    numerics: Numerics = field(default_factory=Numerics)


class Served(NamedTuple):
    """A model that can be asked for: the base, or an adapter beside it."""

    model: str
    adapter: AdapterRef | None = None


class EngineClient(Engines, Protocol):
    """An engine near or far. Closing the generator frees what the request holds. EngineLost: another one can go on."""

    async def info(self) -> EngineInfo: ...

    async def infos(self) -> list[EngineInfo]:
        """Facts of all engines that answer. Raises Unavailable where none does."""
        ...

    async def set_roles(self, names: Sequence[Role]) -> None:
        """Have engines compute prompts, answers or both (serving/roles.py). Raises InvalidRequest."""
        ...

    async def reset_prefix_cache(self) -> None: ...


def new_request_id() -> str:
    return uuid4().hex


async def off_loop(is_large: bool, work: Callable[..., T], *arguments: Any) -> T:
    """Result of work that would stall every stream where it is large: then in a thread."""
    return await asyncio.to_thread(work, *arguments) if is_large else work(*arguments)


class Frontend:
    """Owns admission, health and pins; holds the tokenizer; borrows the engine. `operator` finds the pool's, where there is
    one; `source` is where the weights are from."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        info: EngineInfo,
        config: ServeConfig,
        operator: Callable[[], Operator] | None = None,
        source: str | None = None,
        pins: Pins | None = None,
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.info = info
        self.started_s = now_s()
        self.config = config
        self.answers = AnswerFormat.of(tokenizer, config.tool_format, config.reasoning_format)
        self.metrics = Exporter(info.model)
        self.admission = Admission(config, self.metrics["trinity_displaced_total"].inc)
        self.pins = pins or Pins()
        self.streams = Continuing(engine, self.metrics.continued, self.pins)
        self.tracing = Tracing(config.otlp_endpoint, info.model)
        self.placement = Placement(operator, self.metrics.placement)
        self.training = TrainingRun(source)
        self.engine_healthy, self._heard_s = True, time.monotonic()
        self._renderers = ThreadPoolExecutor(NUM_WORKERS, "trinity-chat")  # each waits for a process
        self._large_chats = asyncio.Semaphore(NUM_WORKERS - 1)

    @property
    def leaving(self) -> bool:
        """Say whether balancers are to send nothing more."""
        return self.admission.leaving or self.admission.draining

    @property
    def ready(self) -> bool:
        return self.engine_healthy and not self.leaving

    def check_number(self, num: int) -> None:
        """Raise InvalidRequest for a request of so many sequences that others would find no slot."""
        self.admission.check(num, ASKS.get())

    def served(self, name: str | None) -> Served:
        """The model of that name: `base`, `base:adapter`, or `adapter` alone. Raises ModelNotFound."""
        base = self.info.model
        if not name or name == base:
            return Served(base)
        own = name.removeprefix(f"{base}:")
        for ref in self.placement.adapters:
            if ref.name == own:
                return Served(f"{base}:{own}", ref)
        self.placement.check_known()
        raise ModelNotFound(f"model {name[:100]!r} is not served here; there is {base!r}", param="model")

    def check_model(self, name: str | None) -> None:
        self.served(name)

    @property
    def models(self) -> tuple[Served, ...]:
        """All that can be asked for, the base first."""
        base = self.info.model
        return Served(base), *(Served(f"{base}:{ref.name}", ref) for ref in self.placement.adapters)

    async def load_adapter(self, name: str, source: str) -> None:
        """Serve an adapter under that name. Raises InvalidRequest for one that is another model's here."""
        if name == self.info.model:
            raise InvalidRequest(f"{name!r} is the base's name; take another one", param="lora_name")
        await self.placement.load_adapter(name, source, self.config.request_timeout_s)

    async def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text. Raises PromptTooLong, before tokenising, where it cannot fit."""
        limit = MAX_CHARS_PER_TOKEN * self.info.max_model_len
        if len(text) > limit:
            raise PromptTooLong(f"the prompt has {len(text)} characters; this model takes at most {limit}. Shorten it.")
        return await off_loop(len(text) > INLINE_CHARS, self.tokenizer.encode, text, add_special)

    async def encode_chat(self, chat: Chat, add_special: bool = False) -> list[int]:
        """Token ids of a conversation under the model's own template. Of large ones one is rendered at a time, so that those
        of usual size never wait for a process that renders."""
        self.answers.check_tools(chat.tools)
        async with self._large_chats if chat.size > LARGE_CHAT_CHARS else nullcontext():
            text = await asyncio.wrap_future(self._renderers.submit(render, chat, self.tokenizer))
        return await self.encode(text, add_special)

    async def decode(self, token_ids: Sequence[int], most_bytes: int) -> str:
        """Text of token ids. Raises InvalidRequest where it is longer, in UTF-8."""
        texts, size = list[str](), 0
        async with aclosing(self.decoded(token_ids)) as decoded:
            async for text in decoded:
                texts.append(text)
                size += len(text.encode())
                if size > most_bytes:
                    raise InvalidRequest(f"the text has over {most_bytes:,} bytes; send fewer ids", param="tokens")
        return "".join(texts)

    async def decoded(self, token_ids: Sequence[int]) -> AsyncGenerator[str, None]:
        """Parts of that text, once all are known to be ids: a thread would hold the interpreter for the whole of it."""
        starts, characters = range(0, len(token_ids), DECODED_IDS), codecs.getincrementaldecoder("utf-8")("replace")
        for start in starts:
            self.check_ids(token_ids[start : start + DECODED_IDS], "tokens")
            await asyncio.sleep(0)
        for start in starts:
            yield characters.decode(self.tokenizer.decode_bytes(token_ids[start : start + DECODED_IDS]))
            await asyncio.sleep(0)
        yield characters.decode(b"", final=True)

    def check_ids(self, token_ids: Sequence[int], param: str = "prompt") -> None:
        size = self.tokenizer.vocab_size
        for bad in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= bad < size:
                raise InvalidRequest(f"{param} has token id {bad}; ids are 0 to {size - 1}", param=param)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what the engine would refuse too, before it costs anything."""
        self.check_length(prompt_ids)
        self.check_ids(prompt_ids)
        check_numbers(params)
        _check_priority(params.priority, ASKS.get())
        for name, ids in params.listed_ids.items():
            self.check_ids(tuple(ids), name)

    def check_length(self, prompt_ids: Sequence[int]) -> None:
        check_length(prompt_ids, self.info.max_model_len)

    def check_routed_experts(self, is_asked: bool) -> None:
        if is_asked and not self.config.routed_experts:
            raise InvalidRequest(
                "this server does not tell to which experts tokens went; it does with serve.routed_experts true",
                param="return_routed_experts",
            )

    def truncated(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The part of its prompt that the request wants to keep."""
        keep = params.truncate_prompt_tokens
        return list(truncated(prompt_ids, keep, params.max_tokens, self.info.max_model_len))

    @property
    def completion_limit(self) -> int:
        """Tokens after text or ids where the request does not say."""
        return self.info.defaults.max_tokens or DEFAULT_MAX_TOKENS

    def chat_limit(self, prompt_ids: Sequence[int]) -> int:
        """Tokens after a conversation where the request does not say."""
        room = self.room(prompt_ids)
        return min(room, self.info.defaults.max_tokens or room)

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that may follow this prompt; at least 1, so that the error about its length is the engine's."""
        return max(1, self.info.max_model_len - len(prompt_ids))

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        deadline_s: float | None = None,
        served: Served | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas up to and including the one with a finish reason. `deadline_s` from now, capped by the server's own.

        Raises InvalidRequest, PromptTooLong, Overloaded, Unavailable, DeadlineExceeded. Leaving it frees the engine.
        """
        client, adapter = ASKS.get(), None if served is None else served.adapter
        self.check(prompt_ids, params)
        longest_s = self.config.request_timeout_s
        budget_s = longest_s if deadline_s is None else min(deadline_s, longest_s)
        deadline = asyncio.get_running_loop().time() + budget_s
        request_id = new_request_id()
        with (
            self.admission.slot(client, params.priority) as slot,
            self.metrics.sequence(adapter and adapter.name) as clock,
            self.tracing.sequence(request_id, len(prompt_ids), params, served and served.model) as span,
        ):
            stream = self.streams.generate(request_id, prompt_ids, params, budget_s, client, adapter)
            async with aclosing(stream):
                while (delta := await self._next(stream, slot, deadline, budget_s)) is not None:
                    _raise_failure(delta)
                    slot.claim.has_begun, self._heard_s = True, time.monotonic()
                    clock.tick(delta)
                    span.tick(delta)
                    yield delta
                    if delta.finish_reason is not None:
                        return

    async def monitor(self, period_s: float = 1.0, on_change: Any = None) -> None:
        """Probe the engine for ever; `on_change(ready)` is awaited whenever readiness changes."""
        was = None
        while True:
            await self.probe(timeout_s=5 * period_s)
            if on_change is not None and self.ready is not was:
                was = self.ready
                await on_change(was)
            await asyncio.sleep(period_s)

    async def probe(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                infos = await self.engine.infos()
            self.info, self.engine_healthy, self._heard_s = infos[0], True, time.monotonic()
            self.metrics.engines(infos)
        except Exception as error:
            if self.engine_healthy and time.monotonic() - self._heard_s >= SILENT_S:
                log.warning("no engine answers: %s", type(error).__name__)
                self.engine_healthy = False
                self.metrics.engines(())

    async def drain(self) -> bool:
        """Refuse new requests, wait for the running ones up to serve.drain_timeout_s. True if all ended by themselves."""
        return await self.admission.drain(self.config.drain_timeout_s)

    def cut(self) -> None:
        """End the requests that still run, with Unavailable."""
        self.admission.cut(Unavailable("the server is stopping; send the request to another", retry_after_s=1.0))

    async def _next(
        self, stream: AsyncGenerator[Delta, None], slot: Slot, deadline: float, budget_s: float
    ) -> Delta | None:
        """The next delta, None at the end; DeadlineExceeded once the loop's clock passes `deadline`, or what took its slot."""
        try:
            async with asyncio.timeout_at(0.0 if slot.error else deadline) as slot.wait:
                delta = await anext(stream, None)
            if slot.claim.error:  # it came too late by a moment
                raise slot.claim.error
            return delta
        except TimeoutError:
            raise slot.error or DeadlineExceeded(
                f"not finished within {budget_s:.3g} s; ask for fewer tokens or wait longer"
            ) from None
        finally:
            slot.wait = None


def _check_priority(priority: int, client: Client) -> None:
    if priority < client.first_priority:
        raise InvalidRequest(
            f"priority {priority} is more urgent than {client.first_priority}, the most that "
            f"serve.clients.{client.name}.first_priority allows; ask for a higher number, or none",
            param="priority",
        )


def _raise_failure(delta: Delta) -> None:
    if delta.finish_reason in ("error", "abort"):
        if delta.cause is not None:
            raise delta.cause
        log.warning("request %s ended by its engine: %s", delta.request_id, delta.error)
        raise Unavailable("the engine could not finish this request; send it again")


def now_s() -> int:
    return int(time.time())
