"""An EngineClient over engines by name: requests go where they cost least, long prompts by way of a prefill engine.

Decisions: all engines are asked once in each probe of the gateway, each with a time-out of its own, so that a stopped one holds
up nobody; one more question goes to an engine that is not known yet, if there is one. What is sent to an engine that has gone
goes to another one; the next account tells. A prompt whose prefill engine is lost is computed where it is answered.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from serving.frontend import EngineInfo
from serving.roles import Roles, newest
from serving.routing import Chain, Routing, Seat
from trinity.config import AdapterRef, Client, EngineConfig, Role, check_roles
from trinity.engine.begun import Begun
from trinity.engine.key_log import KeyChanges
from trinity.engine.request import Delta, SamplingParams
from trinity.errors import EngineLost, InvalidRequest, Overloaded, Unavailable

if TYPE_CHECKING:
    from trinity.engine.handoff import Prefilled

log = logging.getLogger("trinity.serving")
POLL_S, AGAIN_S = 4.0, 0.2
LARGE_TOKENS = 1 << 13  # whose names take more than a millisecond


@dataclass(frozen=True)
class Status:
    """Facts of an engine, of its cache since an earlier account, and the roles that it has heard of."""

    info: EngineInfo
    changes: KeyChanges | None = None
    roles: Roles | None = None


class Fleet(Protocol):
    """Engines by id. One that is not there (any more), or None, stands for any other."""

    def generate(self, engine: str | None, *asked: Any, **more: Any) -> AsyncGenerator[Delta, None]: ...

    async def prefill(self, engine: str, *asked: Any) -> "Prefilled":
        """Raises EngineLost and what AsyncEngine.prefill raises."""
        ...

    async def status(self, engine: str | None, besides: Collection[str], **told: Any) -> Status:
        """One that is not among `besides`, where it may choose. `told`: what EngineReplica.status takes."""
        ...

    async def reset_prefix_cache(self) -> None: ...


class RoutedClient:
    """The engines of a fleet as one."""

    def __init__(self, fleet: Fleet, settings: EngineConfig):
        self._fleet, self._settings = fleet, settings
        self._routing, self._roles = Routing(), Roles(0, settings.role)

    def generate(self, *asked: Any, **more: Any) -> AsyncGenerator[Delta, None]:
        """Deltas of the engine where it costs least. Arguments are those that Engines says (serving/continuation.py)."""
        if len(self._routing.seats) < 2:
            return self._fleet.generate(next(iter(self._routing.seats), None), *asked, **more)
        return self._routed(Request(*asked), more)

    async def info(self) -> EngineInfo:
        return (await self.infos())[0]

    async def first(self) -> EngineInfo:
        """Facts of some engine, once there is one."""
        while not (found := await self._poll()):
            await asyncio.sleep(AGAIN_S)
        return found[0]

    async def infos(self) -> list[EngineInfo]:
        if not (found := await self._poll()):
            raise Unavailable("no engine answers right now; send the request again")
        return found

    async def _poll(self) -> list[EngineInfo]:
        """Ask all engines how they are, and one more; -> what those say that answer."""
        before = list(self._routing.seats.values())
        roles, own = self._roles, self._roles.of(seat.info for seat in before)
        asks = (self._ask(seat, role=own[seat.info.engine_id], roles=roles) for seat in before)
        await asyncio.gather(*asks, self._discover())
        self._assign()
        return [seat.info for seat in self._routing.seats.values() if seat.is_there]

    async def set_roles(self, names: Sequence[Role]) -> None:
        """Have engines do this from now on. Raises InvalidRequest for what the settings would refuse."""
        try:
            check_roles(names, self._settings.tier_bytes, self._settings.max_replicas or self._settings.replicas)
        except ValueError as error:
            raise InvalidRequest(str(error), param="roles") from None
        self._roles = self._roles.after(names)
        await self._poll()

    async def reset_prefix_cache(self) -> None:
        await self._fleet.reset_prefix_cache()

    async def _routed(self, request: "Request", more: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        begun: Begun | None = more.get("begun")
        until_s = asyncio.get_running_loop().time() + request.deadline_s
        chain = await self._chain(request, () if begun is None else begun.token_ids)
        seat = self._routing.choose(chain, self._able(request, chain))
        if begun is None and (prefilled := await self._prefilled(request, chain, seat)) is not None:
            more |= {"prefilled": prefilled}
            request = request._replace(deadline_s=max(0.0, until_s - asyncio.get_running_loop().time()))
        with seat.holding(chain) as sent, losing(seat):
            async with aclosing(self._fleet.generate(seat.info.engine_id, *request, **more)) as deltas:
                async for delta in deltas:
                    sent.said(delta.token_ids)
                    yield delta

    async def _chain(self, request: "Request", begun_ids: Sequence[int]) -> Chain:
        params, adapter = request.params, request.adapter
        whose = params.trace, request.client.name, params.cache_salt, None if adapter is None else adapter.content
        chain = self._routing.chain(*whose)
        for ids in (request.prompt_ids, begun_ids):
            await asyncio.to_thread(chain.add, ids) if len(ids) > LARGE_TOKENS else chain.add(ids)
        return chain

    def _able(self, request: "Request", chain: Chain) -> Iterable[Seat]:
        """Engines to answer it. A long prompt that nothing is to follow disturbs nobody where prompts are computed."""
        is_alone = not request.params.max_tokens and chain.num_tokens >= self._settings.min_prefill_tokens
        alone = self._with_role("prefill") if is_alone else []
        return alone or self._with_role("decode", "both") or self._routing.seats.values()  # each can do everything

    def _with_role(self, *names: Role) -> list[Seat]:
        return [seat for seat in self._routing.seats.values() if seat.is_there and seat.role in names]

    async def _prefilled(self, request: "Request", chain: Chain, seat: Seat) -> "Prefilled | None":
        """Have a long prompt computed by an engine that answers nobody meanwhile; None where it is none, or none is there."""
        params = request.params
        reads_cache = params.prompt_logprobs is None and not params.trace
        while reads_cache and chain.num_tokens - seat.num_cached(chain) >= self._settings.min_prefill_tokens:
            seats = self._with_role("prefill")
            if not seats or seat.role == "prefill":
                return None
            first = self._routing.choose(chain, seats)
            try:
                with first.holding(chain), losing(first):
                    return await self._fleet.prefill(first.info.engine_id, *request)
            except EngineLost as error:
                log.warning("request %s is computed elsewhere: %s", request.request_id, error)
            except (Overloaded, Unavailable) as error:
                log.warning("request %s is computed where it is answered: %s", request.request_id, error)
                return None
        return None

    async def _ask(self, seat: Seat, **told: Any) -> None:
        """Hear from an engine that is known; it is forgotten where Ray Serve has another one answer."""
        engine, asked = seat.info.engine_id, seat.ask()
        try:
            async with asyncio.timeout(POLL_S):
                status = await self._fleet.status(engine, (), since=seat.number, **told)
        except (Unavailable, TimeoutError) as error:
            log.warning("an engine does not answer: %s", type(error).__name__)
            seat.is_there = False
            return
        if status.info.engine_id == engine:
            seat.told(status.info, status.changes, asked)
        else:  # of which only its own account says what is there
            self._routing.seats.pop(engine, None)
        self._meet(status)

    async def _discover(self) -> None:
        """Hear from an engine that is not known yet, if there is one."""
        try:
            async with asyncio.timeout(POLL_S):
                self._meet(await self._fleet.status(None, tuple(self._routing.seats), roles=self._roles))
        except (Unavailable, TimeoutError):
            return  # those that are known say more

    def _meet(self, status: Status) -> None:
        self._roles = newest(self._roles, status.roles) or self._roles
        self._routing.seats.setdefault(status.info.engine_id, Seat(status.info))

    def _assign(self) -> None:
        roles = self._roles.of(seat.info for seat in self._routing.seats.values() if seat.is_there)
        for name, seat in self._routing.seats.items():
            seat.role = roles.get(name, seat.role)


class Request(NamedTuple):
    """Arguments of Engines.generate."""

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    deadline_s: float
    client: Client
    adapter: AdapterRef | None = None


@contextmanager
def losing(seat: Seat) -> Iterator[None]:
    """An engine that is lost inside the block gets nothing more until it has answered."""
    try:
        yield
    except EngineLost:
        seat.is_there = False
        raise
