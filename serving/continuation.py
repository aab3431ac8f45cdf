"""Answers that outlive their engines: when one is lost, another goes on where it was, and the caller sees a pause.

Decisions. What comes next depends on seed, position and the tokens so far alone, so the gateway draws the seed, keeps the
tokens and sends both with the prompt; whatever the request asks for then goes on as if nothing had been (engine/begun.py).
Until there is an engine again it waits, as long as its caller would. A request that loses engine after engine before its next
token may be what ends them, or stands beside it, or engines are ended one after the other by something else. So its last tries
are made alone: what ends engines goes on doing so, and the others get a token.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, Protocol

from serving.pins import Pins
from trinity.config import AdapterRef, Client
from trinity.engine import samples
from trinity.engine.begun import Begun
from trinity.engine.request import Delta, SamplingParams
from trinity.errors import EngineLost, Overloaded, Unavailable
from trinity.utils.lines import named

log = logging.getLogger("trinity.serving")
MAX_LOSSES, NUM_ALONE = 5, 3  # in a row, without a token in between; of these, as the only one that is suspected
MAX_LOSSES_IN_ALL = 16
GIVEN_UP_S = 30.0  # until clients that would send it again all the same may
PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)  # before the next try, while no token comes


class Engines(Protocol):
    """Some engine of several, or the only one (serving/frontend.py, EngineClient)."""

    def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        deadline_s: float,
        client: Client,
        adapter: AdapterRef | None = None,
        *,
        begun: Begun | None = None,
    ) -> AsyncGenerator[Delta, None]: ...


class Answer:
    """Tokens of one answer as its caller has them, and the engines that it has lost."""

    def __init__(self, keep: Callable[[int], None] | None) -> None:
        """`keep` hears of the version that it is pinned to, by its name."""
        self._keep = keep
        self._token_ids: list[int] = []
        self._first_version = self._version = self._num_cached = 0
        self.num_losses = self._num_in_a_row = self._num_tries = 0
        self.is_complete = False
        self._lost_s: float | None = None

    def add(self, delta: Delta) -> float | None:
        """Note what has come; -> the seconds since its engine was lost, with the first Delta after that."""
        if self._keep is not None and delta.token_ids and not self._token_ids:
            self._keep(delta.weights)
        self._token_ids += delta.token_ids
        self._first_version, self._version = named(delta.line, delta.first_version), delta.weights
        self._num_cached = delta.num_cached_tokens
        self._num_in_a_row = self._num_tries = 0
        self.is_complete = delta.finish_reason is not None
        lost_s, self._lost_s = self._lost_s, None
        return None if lost_s is None else time.perf_counter() - lost_s

    @property
    def begun(self) -> Begun:
        return Begun(tuple(self._token_ids), self._first_version, self._version, self._num_cached)

    @property
    def is_suspect(self) -> bool:
        """Say whether it may be what ends engines."""
        return self._num_in_a_row >= MAX_LOSSES - NUM_ALONE

    def fail(self, error: Unavailable | Overloaded) -> None:
        """Its engine is lost, or there is none: raises what its caller is to hear instead of waiting for another."""
        if isinstance(error, EngineLost):
            self._lose()
        elif self._lost_s is None:
            raise error

    def _lose(self) -> None:
        self.num_losses, self._num_in_a_row = self.num_losses + 1, self._num_in_a_row + 1
        self._lost_s = self._lost_s or time.perf_counter()
        if self._num_in_a_row == MAX_LOSSES or self.num_losses == MAX_LOSSES_IN_ALL:
            raise Unavailable(
                f"{self.num_losses} engines were lost while they worked on this request, {self._num_in_a_row} of them in a row "
                f"before its next token; it may be what ends them, so it is given up (at {MAX_LOSSES} in a row, "
                f"{MAX_LOSSES_IN_ALL} in all). Change it before you send it again",
                retry_after_s=GIVEN_UP_S,
            )

    async def pause(self) -> None:
        """Wait before the next try: not at all the first time, then longer and longer."""
        pause_s = PAUSES_S[min(self._num_tries, len(PAUSES_S) - 1)]
        self._num_tries += 1
        await asyncio.sleep(pause_s)


class Continuing:
    """An EngineClient's `generate`, over engines that may be lost. `observe` hears how long each answer was without one.
    Borrows `pins`."""

    def __init__(self, engines: Engines, observe: Callable[[float], None], pins: Pins):
        self._engines, self._observe, self._pins = engines, observe, pins
        self._alone = asyncio.Lock()  # held by the only suspect that has an engine

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        deadline_s: float,
        client: Client,
        adapter: AdapterRef | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas up to and including the one with a finish reason. Its caller ends it at the deadline; engines are told it."""
        clock, seeded = asyncio.get_running_loop().time, samples.with_seed(params)
        end_s = clock() + deadline_s
        with self._pins.kept() as kept:
            answer = Answer(kept.hold if params.version_policy == "pinned" else None)
            while not answer.is_complete:
                asked = (request_id, prompt_ids, seeded, max(0.0, end_s - clock()), client, adapter)
                try:
                    async with aclosing(self._attempt(answer, *asked)) as deltas:
                        async for delta in deltas:
                            yield delta
                except (Unavailable, Overloaded) as error:
                    answer.fail(error)
                    log.warning("request %s goes on with another engine: %s", request_id, error)
                    await answer.pause()

    async def _attempt(self, answer: Answer, request_id: str, *asked: Any) -> AsyncGenerator[Delta, None]:
        """Deltas of one engine. Raises EngineLost where that is not all."""
        begun: dict[str, Any] = {"begun": answer.begun} if answer.num_losses else {}
        name = f"{request_id}-{answer.num_losses}" if begun else request_id  # the old one may yet be in use
        asks = partial(self._engines.generate, name, *asked, **begun)
        stream = self._first_alone(asks) if answer.is_suspect else asks()
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                if (paused_s := answer.add(delta)) is not None:
                    self._observe(paused_s)
                yield delta
                if answer.is_complete:
                    return
        raise EngineLost("the engine ended the stream early")

    async def _first_alone(self, asks: Callable[[], AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
        """Deltas of what is asked when no other suspect has an engine; until the first one none gets one."""
        async with AsyncExitStack() as alone:
            await alone.enter_async_context(self._alone)
            async with aclosing(asks()) as deltas:
                async for delta in deltas:
                    await alone.aclose()
                    yield delta
