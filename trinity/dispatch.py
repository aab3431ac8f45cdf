"""Dispatch: send each token's row to the shards that hold its experts, and add up what comes back.

Legend: T tokens, D model, K top-k, R rows of one shard, E experts, N replicas, L layers.
Decisions: one message per shard and layer; a row travels once, whatever the number of local experts; a data call carries
all it needs (epoch, version, op_id, deadline) and never asks the control plane; whatever a caller resends carries the
same op_id, and a shard applies it once.
"""

import itertools
import math
import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from trinity.errors import DeadlineExceeded, InputGone, TrinityError, Unavailable, WrongEpoch
from trinity.messages import ELSEWHERE, Backward, Forward, Rows, op_name
from trinity.metrics import DISPATCH_PHASES, DISPATCH_S
from trinity.placement.table import PlacementTable

FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 1.0  # before the same rows are sent again


class Reply(Protocol):
    """An answer on its way."""

    def result(self) -> Any:
        """Wait, return the answer or raise a TrinityError. Tensors are the receiver's own."""
        ...


class Transport(Protocol):
    """The one seam for distance. Verbs: infer, backward, prepare, commit, abort, and the shard's control verbs.

    `send` returns at once. A verb's message and answer are frozen values of tensors and numbers. Unavailable means
    that the verb may or may not have been applied: send it again, with the same op_id.
    """

    def send(self, shard: str, verb: str, message: Any) -> Reply: ...


def settle(transport: Transport, shard: str, verb: str, message: Any, reply: Reply, deadline_s: float) -> Any:
    """The answer, sending the same message again while its shard is away and there is time.

    Safe for every verb: they are pure, or applied once per op_id or step.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return reply.result()
        except Unavailable:
            if time.time() + pause_s >= deadline_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_PAUSE_S)
        reply = transport.send(shard, verb, message)


class View(Protocol):
    """What a caller knows of the placement. Somebody else keeps it fresh; reading it costs nothing."""

    @property
    def table(self) -> PlacementTable:
        """The newest known."""
        ...

    @property
    def away(self) -> frozenset[str]:
        """Shards that did not answer and have not been seen since."""
        ...

    def lost(self, shard: str) -> None:
        """It did not answer."""
        ...

    def refresh(self) -> None:
        """Ask for the newest table, and wait for it for a moment."""
        ...


class Fixed(NamedTuple):
    """A View of shards that never move and never die."""

    table: PlacementTable
    away: frozenset[str] = frozenset()

    def lost(self, shard: str) -> None:
        pass

    def refresh(self) -> None:
        pass


class Route(NamedTuple):
    """Which tokens' rows go to one shard, and which of their slots are meant for it."""

    shard: str
    token_R: Tensor | None  # the token of each row, ascending; None: every token
    ids_RK: Tensor  # ELSEWHERE in the other shards' slots

    def rows(self, x_TD: Tensor) -> Tensor:
        """The rows of x (or of anything else [T, ...]) that go to this shard."""
        return x_TD if self.token_R is None else x_TD.index_select(0, self.token_R.to(x_TD.device))

    def add(self, out_TD: Tensor, part_RD: Tensor) -> None:
        """out_TD[token] += part_RD, the transpose of `rows`."""
        part_RD = part_RD.to(out_TD)
        if self.token_R is None:
            out_TD.add_(part_RD)
        else:
            out_TD.index_add_(0, self.token_R.to(out_TD.device), part_RD)


class Times:
    """How long the phases of dispatch took: counts by bucket, and sums, since the start (trinity/metrics.py)."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[list[int], float]] = {
            p: ([0] * (len(DISPATCH_S) + 1), 0.0) for p in DISPATCH_PHASES
        }

    def add(self, phase: str, since_s: float) -> float:
        """`since_s`: time.perf_counter() at its beginning; -> now."""
        now_s = time.perf_counter()
        counts, sum_s = self.phases[phase]
        counts[bisect_left(DISPATCH_S, now_s - since_s)] += 1
        self.phases[phase] = counts, sum_s + now_s - since_s
        return now_s


class Dispatcher:
    """The routed experts of every layer, as the backbone sees them: `dispatcher(layer, x_TD, ids_TK, weights_TK)`.

    Differentiable in x and weights; expert gradients stay on their shards. `version` is the version of the weights that
    every shard must hold. `issued` counts the backward ops sent to each shard since `begin`, for the two-phase step.
    Not thread-safe: one dispatcher per caller thread.
    """

    def __init__(
        self,
        view: View | PlacementTable,
        transport: Transport,
        *,
        timeout_s: float,
        attempt_s: float = math.inf,
        version: int = 0,
    ):
        self.caller, self.attempt = uuid.uuid4().hex[:12], 0
        self.failure: TrinityError | None = None
        self.view: View = Fixed(view) if isinstance(view, PlacementTable) else view
        self.transport, self.timeout_s, self.attempt_s = transport, timeout_s, attempt_s
        self._ops = itertools.count()
        self.issued: Counter[str] = Counter()
        self.num_retries, self.times = 0, Times()
        self.version = version
        self.follow()

    def follow(self) -> None:
        """Use the newest table, without the shards that are away, from the next call on."""
        self.table, self._away = self.view.table, self.view.away
        self._row_of = {layer: i for i, layer in enumerate(self.table.layers)}
        self._shard_LEN, self._num_LE = self.table.present(self._away)
        self.is_replicated = bool((self._num_LE > 1).any())

    def use(self, version: int, attempt: int = 0, rank: int = 0) -> None:
        """Start work on weights of `version`. In a numbered `attempt` at a step, the worker's of that rank, an exchange that
        fails raises nothing: it is noted in `failure`, from then on all answers are zeros, and the attempt is void."""
        self.version, self.attempt, self.failure = version, attempt, None
        self.caller = str(rank) if attempt else self.caller
        self.issued.clear()

    def fail(self, error: TrinityError) -> None:
        if not self.attempt:
            raise error
        self.failure = self.failure or error

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.begin(layer, x_TD, ids_TK, weights_TK).result()

    def begin(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> "Exchange":
        """Send the rows; the answer's `result()` waits for what comes back. The backward, too, is sent and awaited apart.

        Slots that are ELSEWHERE are nobody's.
        """
        if self.view.table is not self.table or self.view.away != self._away:
            self.follow()
        started_s = time.perf_counter()
        routes = [] if self.failure else self._route(layer, x_TD, ids_TK)
        started_s = self.times.add("route", started_s)
        name = op_name(self.attempt, self.caller, next(self._ops))
        exchange = Exchange(self, layer, name, routes, self.deadline())
        keep = torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad)
        if keep:
            exchange.sent = _Send.apply(x_TD, weights_TK, exchange)
        exchange.send_forward(x_TD.detach(), weights_TK.detach(), keep)
        self.times.add("send", started_s)
        return exchange

    def again(self, call: Forward, until_s: float) -> "Exchange":
        """Rows that a shard did not compute, to whoever holds their experts now; it fails with the first of them that does."""
        if self.view.table is not self.table or self.view.away != self._away:
            self.follow()
        routes = self._route(call.layer, call.rows.x_RD, call.rows.ids_RK)
        exchange = Exchange(self, call.layer, call.op_id, routes, until_s, is_retry=True)
        exchange.send_forward(call.rows.x_RD, call.rows.weights_RK, False)
        return exchange

    def _route(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> list[Route]:
        """Pick a replica per (token, expert) and group the slots by shard."""
        ids_TK, shards = ids_TK.cpu(), self.table.shards
        if len(shards) == 1:
            return [Route(shards[0], None, ids_TK)] if len(ids_TK) else []
        host_TK = ids_TK.numpy()  # many small steps: numpy takes half of torch's time
        shard_TK = self._shards(self._row_of[layer], x_TD, host_TK)
        routes = []
        for position, name in enumerate(shards):
            here_TK = shard_TK == position
            token_R = here_TK.any(1).nonzero()[0]
            own_TK = np.where(here_TK, host_TK, ELSEWHERE)
            if len(token_R) == len(host_TK) > 0:
                routes.append(Route(name, None, torch.from_numpy(own_TK)))
            elif len(token_R):
                routes.append(Route(name, torch.from_numpy(token_R), torch.from_numpy(own_TK[token_R])))
        return routes

    def _shards(self, at: int, x_TD: Tensor, ids_TK: np.ndarray) -> np.ndarray:
        """The shard of each slot: the token's turn among the expert's replicas."""
        shard_EN = self._shard_LEN[at]
        if not self.is_replicated:
            shard_TK = shard_EN[:, 0].take(ids_TK)  # ELSEWHERE finds the last expert's
        else:
            turn_T1 = turns(x_TD)[:, None]
            shard_TK = shard_EN[ids_TK, turn_T1 % self._num_LE[at][ids_TK]]
        return np.where(ids_TK == ELSEWHERE, ELSEWHERE, shard_TK)

    def learn(self, shard: str, error: TrinityError) -> None:
        """What a failed call says about the placement."""
        self.num_retries += 1
        if isinstance(error, WrongEpoch):
            self.view.refresh()
        else:
            self.view.lost(shard)

    def deadline(self) -> float:
        return time.time() + self.timeout_s


class Exchange:
    """One layer's rows on their way: forward, and in training backward too. Made by `Dispatcher.begin`.

    For autograd it is two functions with one edge between them: `_Send` before whatever overlaps, `_Receive` after it.
    Backward runs the other way round, so that there, too, the rows are away while the rest of the layer is computed.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        layer: int,
        op_id: str,
        routes: list[Route],
        until_s: float,
        is_retry: bool = False,
    ):
        self.dispatcher, self.routes = dispatcher, routes
        self._until_s, self._is_retry = until_s, is_retry
        self._names = (op_id, layer, dispatcher.table.epoch, dispatcher.version)
        self._calls: list[Any] = []
        self._replies: list[Reply] = []
        self._like_TD: Tensor | None = None
        self.sent: Tensor | None = None

    def result(self) -> Tensor:
        """Wait; -> y_TD in x's dtype. Raises what the transport raises."""
        return self.receive_forward() if self.sent is None else _Receive.apply(self.sent, self)

    def send_forward(self, x_TD: Tensor, weights_TK: Tensor, keep: bool) -> None:
        """Where there are replicas, inference gives each shard `attempt_s` and then turns to another."""
        deadline_s, self._like_TD = self._until_s, x_TD
        if not keep and self.dispatcher.is_replicated:
            deadline_s = min(deadline_s, time.time() + self.dispatcher.attempt_s)
        self._send("infer", [Forward(*self._names, deadline_s, _rows(r, x_TD, weights_TK), keep) for r in self.routes])

    def receive_forward(self) -> Tensor:
        assert self._like_TD is not None
        like_TD, self._like_TD = self._like_TD, None
        times, started_s = self.dispatcher.times, time.perf_counter()
        partials = self._settled_all(self._forwarded)
        started_s = times.add("wait", started_s)
        self._calls, self._replies = [], []  # in training this object lives until the backward; its rows need not
        y_TD = combine(like_TD, self.routes, partials)
        times.add("combine", started_s)
        return y_TD

    def send_backward(self, dy_TD: Tensor) -> None:
        deadline_s = self.dispatcher.deadline()
        self.dispatcher.issued.update(route.shard for route in self.routes)
        self._send("backward", [Backward(*self._names, deadline_s, route.rows(dy_TD)) for route in self.routes])

    def receive_backward(self, x_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """-> dx_TD, dweights_TK."""
        pairs = self._settled_all(lambda i: self._gradient(i, x_TD, weights_TK))
        self._calls, self._replies = [], []
        dx_TD = combine(x_TD, self.routes, [dx_RD for dx_RD, _ in pairs])
        return dx_TD, combine(weights_TK, self.routes, [dweights_RK for _, dweights_RK in pairs])

    def _settled_all(self, settled: Callable[[int], Any]) -> list[Any]:
        """What all shards answered. In an attempt at a step that has failed: nothing, as if no rows had been sent."""
        try:
            return [settled(i) for i in range(len(self.routes))]
        except TrinityError as error:
            if self.sent is None:  # inference
                raise
            self.dispatcher.fail(error)
            self.routes = []
            return []

    def _send(self, verb: str, calls: list[Any]) -> None:
        """All before waiting for any: the shards work side by side."""
        transport, self._calls = self.dispatcher.transport, calls
        self._replies = [transport.send(r.shard, verb, call) for r, call in zip(self.routes, calls, strict=True)]

    def _forwarded(self, i: int) -> Tensor:
        """A shard's rows; from whoever holds their experts now, where it has gone or no longer holds them.

        Rows whose activations are kept for a backward stay with their shard.
        """
        call, reply, pause_s = self._calls[i], self._replies[i], 0.0
        if call.keep:
            return self._settled("infer", i)
        while True:
            try:
                return reply.result()
            except (Unavailable, WrongEpoch, DeadlineExceeded) as error:
                if not isinstance(reply, Exchange):  # which has said so itself
                    self.dispatcher.learn(self.routes[i].shard, error)
                if self._is_retry or time.time() + pause_s >= self._until_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(max(FIRST_PAUSE_S, 2 * pause_s), LAST_PAUSE_S)
            reply = self.dispatcher.again(call, self._until_s)

    def _settled(self, verb: str, i: int) -> Any:
        call, reply = self._calls[i], self._replies[i]
        return settle(self.dispatcher.transport, self.routes[i].shard, verb, call, reply, call.deadline_s)

    def _gradient(self, i: int, x_TD: Tensor, weights_TK: Tensor) -> Any:
        try:
            return self._settled("backward", i)
        except InputGone:
            rows, deadline_s = _rows(self.routes[i], x_TD, weights_TK), self.dispatcher.deadline()
            self._calls[i] = replace(self._calls[i], rows=rows, deadline_s=deadline_s)
            self._replies[i] = self.dispatcher.transport.send(self.routes[i].shard, "backward", self._calls[i])
            return self._settled("backward", i)


def turns(x_TD: Tensor) -> np.ndarray:
    """A number of each token that is as good as random, but the token's own: in other company it goes to the same replicas,

    and so its experts are added up in the same order.
    """
    bits_T = x_TD[:, 0].detach().float().cpu().numpy().view(np.uint32).astype(np.uint64)
    return ((bits_T * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)).astype(np.int64)


def _rows(route: Route, x_TD: Tensor, weights_TK: Tensor) -> Rows:
    return Rows(route.rows(x_TD), route.ids_RK, route.rows(weights_TK))


def combine(like_TD: Tensor, routes: list[Route], partials: list[Tensor]) -> Tensor:
    """Sum the shards' rows back into tokens, in fp32 and in the table's order of shards, rounded once."""
    if len(routes) == 1 and routes[0].token_R is None:
        return partials[0].to(like_TD)
    out_TD = torch.zeros(like_TD.shape, dtype=torch.float32, device=like_TD.device)
    for route, part_RD in zip(routes, partials, strict=True):
        route.add(out_TD, part_RD)
    return out_TD.to(like_TD.dtype)


class _Send(torch.autograd.Function):
    """x, weights -> an empty token that stands for the rows that were sent; its backward waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(x_TD, weights_TK)
        return x_TD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK = ctx.saved_tensors
        return (*ctx.exchange.receive_backward(x_TD.detach(), weights_TK.detach()), None)


class _Receive(torch.autograd.Function):
    """That token -> y; its backward sends dy. Experts' gradients stay on their shards."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive_forward()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.send_backward(grads[0])
        return grads[0].new_zeros(()), None


class Done:
    """A reply that is already there."""

    def __init__(self, value: Any = None, error: Exception | None = None):
        self.value, self.error = value, error

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class LocalTransport:
    """Shards in this process: the oracle of every other transport, and what offline inference uses."""

    def __init__(self, shards: dict[str, Any]):
        self.shards = shards

    def send(self, shard: str, verb: str, message: Any) -> Reply:
        try:
            return Done(getattr(self.shards[shard], verb)(message))
        except TrinityError as error:
            return Done(error=error)
