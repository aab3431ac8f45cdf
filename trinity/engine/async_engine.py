"""The engine on a thread of its own, as async streams.

One daemon thread runs `engine.step()` while there is work and mostly sleeps on a condition otherwise. Event loops never touch
the engine: they post commands, which the thread runs between two passes, and get Deltas through one wake-up per loop
and pass. Whoever leaves a stream early (cancellation, deadline, a closed iterator) aborts its request. While it waits a request
is an entry in a table: no task, no queue, unless its caller has one.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Ids
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trinity.config import ANYBODY, AdapterRef, Client
from trinity.engine.begun import Begun, Handed
from trinity.engine.defaults import SamplingDefaults
from trinity.engine.engine import Engine
from trinity.engine.grammars import owner_of
from trinity.engine.handoff import AGAIN_S, HELD_S, SAVE_S, Handoff, Prefilled
from trinity.engine.key_log import KeyChanges
from trinity.engine.prefix_keys import KeyBase
from trinity.engine.request import Delta, SamplingParams, truncated
from trinity.engine.stats import EngineStats
from trinity.errors import DeadlineExceeded, EngineLost, InvalidRequest, TrinityError, Unavailable
from trinity.utils.lines import oldest_of
from trinity.utils.niceness import IDLE, LowPriorityExecutor

if TYPE_CHECKING:
    from trinity.models.common.adapted import BackboneAdapter

log = logging.getLogger(__name__)
DRAIN_POLL_S = 0.02
IDLE_S = 0.5  # between two looks at the newest version without work


Item = Delta | Exception
Put = Callable[[Item], None]


class Stream:
    """One request's way from the engine thread to the event loop that asked, where `put` is called and the rest belongs."""

    __slots__ = ("_leave", "_put", "ended", "loop", "preparing", "request_id", "timer")

    def __init__(self, request_id: str, put: Put, leave: "Callable[[Stream, bool], None]"):
        """`leave` hears of its end, and whether that comes before the request's."""
        self.request_id, self.loop, self._put, self._leave = request_id, asyncio.get_running_loop(), put, leave
        self.preparing: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.ended = False

    def take(self, item: Item) -> None:
        """Hand over a Delta, or the error that ends the request. After the end nothing more is."""
        if self.ended:
            return
        if isinstance(item, Delta) and item.finish_reason == "error":
            item = item.cause or TrinityError(item.error or "the request failed")
        if isinstance(item, Exception) or item.finish_reason is not None:
            self._end(is_early=isinstance(item, Exception))
        self._put(item)

    def close(self) -> None:
        """Abort the request, where it has not ended. Repeatable."""
        if not self.ended:
            self._end(is_early=True)

    def _end(self, is_early: bool) -> None:
        self.ended = True
        for pending in (self.timer, self.preparing):
            if pending is not None:
                pending.cancel()
        self._leave(self, is_early)


class AsyncEngine:
    """Serves requests of any number of event loops from one Engine. Owns the engine from now on, and its `handoff`, by which
    prompts come from other engines and go there."""

    def __init__(self, engine: Engine, handoff: Handoff | None = None):
        self._engine, self._handoff = engine, handoff
        self._changed = threading.Condition()  # guards the four below
        self._commands: deque[Callable[[], None]] = deque()
        self._open: set[Stream] = set()
        self._draining = self._closed = False
        self._routes: dict[str, Stream] = {}  # the engine thread's own
        self._gives_way = False
        self._patient = LowPriorityExecutor(IDLE, partial(torch.set_num_threads, engine.settings.num_threads))
        self._thread = threading.Thread(target=self._run, name="trinity-engine", daemon=True)
        self._thread.start()

    async def generate(self, *asked: Any, **begun: Any) -> AsyncGenerator[Delta, None]:
        """Deltas of one request; the last has a finish_reason. Arguments and errors are those of `submit`, and errors are
        raised. Leaving early aborts the request and frees its cache."""
        queue = asyncio.Queue[Item]()
        stream = self.submit(queue.put_nowait, *asked, **begun)
        try:
            while not (stream.ended and queue.empty()):
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stream.close()

    def submit(
        self,
        put: Put,
        request_id: str,
        prompt_ids: Ids[int],
        params: SamplingParams | None = None,
        deadline_s: float | None = None,
        client: Client = ANYBODY,
        adapter: AdapterRef | None = None,
        begun: Begun | None = None,
        prefilled: Prefilled | None = None,
        held_s: float = 0.0,
    ) -> Stream:
        """Begin one request, or the rest of one that has `begun` elsewhere: `put` hears, in this event loop, of each Delta up
        to the one with a finish_reason, or of the error that ends it. `deadline_s` counts from now. `adapter`: computed beside
        the weights for this request. `prefilled`: another engine's word on its prompt; what cannot be had from there is
        computed here. `held_s`: so long a pinned request's version is held after its end.

        Errors are what Engine.add raises, DeadlineExceeded, the TrinityError that ended the request, and EngineLost where the
        engine stops before its end. Raises Unavailable while draining or closed.
        """
        stream = Stream(request_id, put, self._leave)
        self._enter(stream)
        until_s = math.inf if deadline_s is None else time.monotonic() + deadline_s
        if deadline_s is not None:
            stream.timer = stream.loop.call_later(max(0.0, deadline_s), _expire, stream, deadline_s)
        handed = Handed(held_s=held_s)
        if adapter or prefilled or (params and (params.bad_words or params.structured_outputs)):
            asked = (prompt_ids, params, client, adapter, until_s, begun, prefilled, handed)
            stream.preparing = stream.loop.create_task(self._prepare(stream, *asked))
        else:
            self._begin(stream, prompt_ids, params, client, None, until_s, None, begun=begun, handed=handed)
        return stream

    async def prefill(
        self,
        request_id: str,
        prompt_ids: Ids[int],
        params: SamplingParams | None = None,
        deadline_s: float | None = None,
        client: Client = ANYBODY,
        adapter: AdapterRef | None = None,
    ) -> Prefilled:
        """Compute the prompt of a request that goes on at another engine, in its turn here. Its full blocks are in the node's
        tier then, and a pinned request's version is held for HELD_S.

        Raises what `generate` does, and Unavailable where this engine has no tier."""
        if self._handoff is None:
            raise Unavailable("this engine hands no prompts over: it has no KV tier (engine.kv_tier_bytes)")
        params = self._engine.defaults.fill(params or SamplingParams())
        limit = self._engine.max_model_len
        prompt_ids = truncated(prompt_ids, params.truncate_prompt_tokens, params.max_tokens, limit)
        names = ("priority", "version_policy", "cache_salt")
        alone = SamplingParams(max_tokens=0, temperature=0.0, **{name: getattr(params, name) for name in names})
        asked = (request_id, prompt_ids, alone, deadline_s, client, adapter)
        async with aclosing(self.generate(*asked, held_s=HELD_S)) as deltas:
            [done] = [delta async for delta in deltas]
        keys = self._engine.prefixes.keys_of(prompt_ids[:-1], alone, client, adapter)
        num = await self._saved(keys, self._oldest(alone, done.weights), done.weights)
        num_tokens = num * self._engine.settings.block_size
        return Prefilled(num_tokens, done.weights, self._handoff.place, done.num_cached_tokens)

    async def _saved(self, *blocks: Any) -> int:
        """Have them in the tier; -> how many, from the first on. Tries again while another process writes."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + SAVE_S
        while loop.time() < until_s:
            saved = loop.create_future()
            self._post(partial(self._save, saved, *blocks))
            while not saved.done():  # a pass may be long; a thread that has ended does nothing more
                await asyncio.wait((saved,), timeout=IDLE_S)
                if not self._thread.is_alive():
                    raise EngineLost("the engine has stopped; send the request again")
            if (num := saved.result()) is not None:
                return num
            await asyncio.sleep(AGAIN_S)
        return 0

    async def _bring(
        self,
        prefilled: Prefilled,
        prompt_ids: Ids[int],
        params: SamplingParams | None,
        client: Client,
        adapter: AdapterRef | None,
        left_s: float,
    ) -> None:
        if self._handoff is None:
            return
        params = self._engine.defaults.fill(params or SamplingParams())
        ids = truncated(prompt_ids, params.truncate_prompt_tokens, params.max_tokens, self._engine.max_model_len)
        keys = self._engine.prefixes.keys_of(ids[:-1], params, client, adapter)
        await self._handoff.bring(prefilled, keys, self._oldest(params, prefilled.version), left_s)

    def _oldest(self, params: SamplingParams, version: int) -> int:
        """The oldest version whose keys and values a request at that version may use."""
        return oldest_of(version, self._engine.settings.max_age if params.version_policy == "live" else 0)

    @property
    def healthy(self) -> bool:
        """Does the thread live and take requests? False while draining, and for good after close or a failure."""
        return self._thread.is_alive() and not (self._draining or self._closed)

    @property
    def num_open(self) -> int:
        """Streams that somebody is still reading."""
        return len(self._open)

    @property
    def defaults(self) -> SamplingDefaults:
        """Defaults of what a request leaves open."""
        return self._engine.defaults

    @property
    def routed_bytes(self) -> int:
        """Bytes of the experts that one token goes to, in a traced request's answer."""
        config = self._engine.config
        return len(config.moe_layers) * config.num_experts_per_tok * (1 if config.num_experts <= 256 else 2)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts."""
        return self._engine.config.moe_layers

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def version(self) -> int:
        """Version of the weights that the next pass will use, by its name."""
        return self._engine.version

    def validate(self, prompt_ids: Ids[int], params: SamplingParams) -> None:
        """Raise at once what `generate` would raise for a request that can never succeed."""
        self._engine.validate(prompt_ids, params)

    def reset_prefix_cache(self) -> None:
        """Forget, before the next pass, what is cached and no running request has."""
        self._post(self._engine.reset_prefix_cache)

    @property
    def key_base(self) -> KeyBase | None:
        """Facts by which others name the blocks of its prefix cache; None without one."""
        return self._engine.prefixes.base

    def key_changes(self, since: int) -> KeyChanges:
        """Account of what the prefix cache knows, or of what has changed since an earlier one."""
        return self._engine.prefixes.changes(since)

    def give_way(self, gives_way: bool) -> None:
        """Compute, from the next pass on, with what others leave of the cores, here and on the shards; or as usual again."""
        self._gives_way = gives_way
        self._engine.give_way(gives_way)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the open streams to end; False if some are still open after timeout_s."""
        with self._changed:
            self._draining = True
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._open and loop.time() < end_s:
            await asyncio.sleep(DRAIN_POLL_S)
        return not self._open

    def close(self) -> None:
        """Stop the thread after the running pass; open streams raise Unavailable. Calling twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._handoff is not None:
            self._handoff.close()
        self._engine.prefixes.close()

    # On the caller's side

    async def _prepare(
        self,
        stream: Stream,
        prompt_ids: Ids[int],
        params: SamplingParams | None,
        client: Client,
        ref: AdapterRef | None,
        until_s: float,
        begun: Begun | None,
        prefilled: Prefilled | None,
        handed: Handed,
    ) -> None:
        """Begin a request for which something is to be had first."""
        try:
            words = await asyncio.to_thread(self._engine.bad_words, params) if params and params.bad_words else None
            if params is not None and params.structured_outputs is not None:  # so that no pass waits for it
                asked = params.structured_outputs, owner_of(params, client)
                await asyncio.shield(asyncio.wrap_future(self._engine.grammars.compiled(*asked)))
            adapter = None if ref is None else await self._adapter(ref)
            if prefilled is not None:
                await self._bring(prefilled, prompt_ids, params, client, ref, until_s - time.monotonic())
                handed = handed._replace(version=prefilled.version, num_cached=prefilled.num_cached)
        except Exception as error:  # its caller waits for items alone
            stream.take(error)
            return
        self._begin(stream, prompt_ids, params, client, words, until_s, adapter, begun=begun, handed=handed)

    def _begin(self, stream: Stream, prompt_ids: Ids[int], *asked: Any, **begun: Any) -> None:
        self._post(partial(self._start, stream, list(prompt_ids), *asked, **begun))

    def _enter(self, stream: Stream) -> None:
        with self._changed:
            if self._closed or self._draining:
                state = "stopped" if self._closed else "draining"
                raise Unavailable(
                    f"the engine is {state}; send request {stream.request_id!r} to another", retry_after_s=1.0
                )
            self._open.add(stream)

    def _leave(self, stream: Stream, is_early: bool) -> None:
        with self._changed:
            self._open.discard(stream)
        if is_early:
            self._post(partial(self._stop, stream))

    async def _adapter(self, ref: AdapterRef) -> "BackboneAdapter":
        store = self._engine.adapters
        if store is None:
            raise InvalidRequest(f"this engine has no adapters, and none is called {ref.name!r}", param="model")
        known = store.known(ref)
        return await asyncio.to_thread(store.get, ref) if known is None else known

    def _post(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    # On the engine thread

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._engine.settings.num_threads)
            while self._wait():
                self._obey()
                self._deliver(self._patient.run(self._engine.step) if self._gives_way else self._engine.step())
        except Exception:  # the thread's edge: nobody else would tell the waiting streams
            log.critical("the engine has failed and takes no more requests", exc_info=True)
        self._shut()

    def _wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._commands or self._engine.has_work, IDLE_S)
            return not self._closed

    def _obey(self) -> None:
        with self._changed:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

    def _save(self, saved: "asyncio.Future[int | None]", *blocks: Any) -> None:
        tier = self._engine.prefixes.tier
        num = 0 if tier is None else tier.save(*blocks)
        with suppress(RuntimeError):  # its loop is closed
            saved.get_loop().call_soon_threadsafe(_settle, saved, num)

    def _start(self, stream: Stream, *request: Any, **begun: Any) -> None:
        try:
            self._engine.add(stream.request_id, *request, **begun)
        except TrinityError as error:
            _send({stream: [error]})
            return
        self._routes[stream.request_id] = stream

    def _stop(self, stream: Stream) -> None:
        if self._routes.get(stream.request_id) is stream:
            del self._routes[stream.request_id]
            self._engine.abort(stream.request_id)

    def _deliver(self, deltas: list[Delta]) -> None:
        items: dict[Stream, list[Item]] = {}
        for delta in deltas:
            items.setdefault(self._routes[delta.request_id], []).append(delta)
            if delta.finish_reason:
                del self._routes[delta.request_id]
        _send(items)

    def _shut(self) -> None:
        with self._changed:
            self._closed = True
            streams = list(self._open)
        self._routes.clear()
        _send({stream: [EngineLost("the engine has stopped; send the request again")] for stream in streams})


def _settle(future: "asyncio.Future[int | None]", value: int | None) -> None:
    if not future.done():
        future.set_result(value)


def _expire(stream: Stream, deadline_s: float) -> None:
    message = f"request {stream.request_id!r} was not done in its {deadline_s:g} s; allow more or ask for less"
    stream.take(DeadlineExceeded(message))


def _send(items: dict[Stream, list[Item]]) -> None:
    """Put the items into their streams' queues: one wake-up per event loop. A loop that is gone needs nothing."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in items:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, streams in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, [(stream, items[stream]) for stream in streams])
        except RuntimeError:
            log.debug("an event loop with %d streams is closed", len(streams))


def _put(batch: list[tuple[Stream, list[Item]]]) -> None:
    for stream, items in batch:
        for item in items:
            stream.take(item)
