"""Dispatch: send each token's row to the shards that hold its experts, and add up what comes back.

Legend: T tokens, D model, K top-k, E experts, N replicas, L layers.
Decisions: one message per shard and layer; a row travels once, whatever the number of local experts; a data call carries
all it needs (epoch, version, op_id, deadline) and never asks the control plane.
"""

import itertools
import math
import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from trinity import native
from trinity.dispatch.exchange import Exchange, Route, RowAdapters, SendRows, replica_hash
from trinity.dispatch.near import NearExchange, NearLayers, NearPass
from trinity.dispatch.patience import Patience
from trinity.dispatch.transport import Lends, Rings, Transport
from trinity.dispatch.view import PlacementView, StaticView
from trinity.errors import AdapterMissing, DeadlineExceeded, TrinityError, WrongEpoch
from trinity.observability.prometheus import DISPATCH_PHASES, DISPATCH_S
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import REMOTE, Forward, op_name


class PhaseTimer:
    """Durations of the phases of dispatch: counts by bucket, and sums, since the start (trinity/observability/)."""

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
    every shard must hold. `num_sent_ops` counts the backward ops sent to each shard since `begin`, for the two-phase step.
    Calls of up to `near_rows` rows go to the nearest replicas. `priority` is that of inference to come.
    Not thread-safe: one dispatcher per caller thread.
    """

    def __init__(
        self,
        view: PlacementView | PlacementTable,
        transport: Transport,
        *,
        timeout_s: float,
        attempt_s: float = math.inf,
        version: int = 0,
        near_rows: int = 0,
    ):
        self.caller, self.attempt = uuid.uuid4().hex[:12], 0
        self.failure: TrinityError | None = None
        self.view: PlacementView = StaticView(view) if isinstance(view, PlacementTable) else view
        self.transport, self.timeout_s, self.patience = transport, timeout_s, Patience(attempt_s)
        self._ops = itertools.count()
        self.num_sent_ops: Counter[str] = Counter()
        self.num_retries, self.times, self.near_rows = 0, PhaseTimer(), near_rows
        self.version, self.priority = version, 0
        self._near_layers: NearLayers | None = None
        if isinstance(transport, Rings) and hasattr(native.lib, "ring_begin"):
            self._near_layers = NearLayers(self, transport)
        self.follow()

    def follow(self) -> None:
        """Use the newest table, without the shards that are away, from the next call on; of replicas the nearest."""
        self.table, self._unreachable = self.view.table, self.view.unreachable
        self._row_of = {layer: i for i, layer in enumerate(self.table.layers)}
        self._distances = self.view.distances
        self._spread = self.table.present(self._unreachable)
        self._near = self.table.present(self._unreachable, self._distances) if self.near_rows else self._spread
        self.is_replicated = bool((self._spread[1] > 1).any())
        if self._near_layers is not None:
            self._near_layers.forget()

    def _has_news(self) -> bool:
        view = self.view
        return (
            view.table is not self.table
            or view.unreachable != self._unreachable
            or view.distances is not self._distances
        )

    def use(self, version: int, attempt: int = 0, rank: int = 0) -> None:
        """Start work on weights of `version`. In a numbered `attempt` at a step, the worker's of that rank, an exchange that
        fails raises nothing: it is noted in `failure`, from then on all answers are zeros, and the attempt is void."""
        self.version, self.attempt, self.failure = version, attempt, None
        self.caller = str(rank) if attempt else self.caller
        self.num_sent_ops.clear()

    def fail(self, error: TrinityError) -> None:
        """Note the first error of an attempt, without the frames that it came through: they hold the pass's graph."""
        if not self.attempt:
            raise error
        self.failure = self.failure or error.with_traceback(None)

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.begin(layer, x_TD, ids_TK, weights_TK).result()

    def here(self, dtype: torch.dtype) -> AbstractContextManager[Mapping[int, bytes]]:
        """Layers whose experts are all in this process, as the extension computes rows of that type with them inside the block
        (ExpertShard.lend): instead of `begin`, with the same bits."""
        if self._has_news():
            self.follow()
        shards, transport = self.table.shards, self.transport
        if len(shards) != 1 or self.attempt or not isinstance(transport, Lends):
            return nullcontext({})
        return transport.lend(shards[0], self.version, dtype)

    def near(self, layers: Sequence[int], x_TD: Tensor) -> NearPass | None:
        """Rings to the shards of these layers, for the calls of one pass with rows like x: instead of `begin`."""
        if self._near_layers is None or self.failure or self.attempt:
            return None
        if self._has_news():
            self.follow()
        return self._near_layers.for_pass(layers, x_TD, [next(self._ops) for _ in range(max(layers) + 1)])

    def begin(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, adapters: RowAdapters | None = None
    ) -> "Exchange | NearExchange":
        """Send the rows; the answer's `result()` waits for what comes back. The backward, too, is sent and awaited apart.

        Slots that are REMOTE are nobody's. `adapters`: of each row, in inference, and where a shard finds them.
        """
        if self._has_news():
            self.follow()
        op, until_s = next(self._ops), self.deadline()
        keep = torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad or self.attempt > 0)
        if self._near_layers is not None and adapters is None and not keep and not self.failure:
            started_s = time.perf_counter()
            sent = self._near_layers.begin(layer, op, x_TD, ids_TK, weights_TK, until_s)
            if sent is not None:
                self.times.add("send", started_s)
                return sent
        return self.begin_usual(layer, op, x_TD, ids_TK, weights_TK, until_s, adapters, keep)

    def begin_usual(
        self,
        layer: int,
        op: int,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        until_s: float,
        adapters: RowAdapters | None = None,
        keep: bool = False,
    ) -> "Exchange":
        """Send the rows by the transport's messages; `op`: the number of the exchange."""
        if self._has_news():
            self.follow()
        started_s = time.perf_counter()
        routes = [] if self.failure else self._route(layer, x_TD, ids_TK)
        started_s = self.times.add("route", started_s)
        name = op_name(self.attempt, self.caller, op)
        exchange = Exchange(self, layer, name, routes, until_s, adapters)
        if (
            keep
        ):  # in an attempt experts may be all that is trained: then rows that nobody wants a gradient of go back, too
            asking_TD = x_TD if x_TD.requires_grad or weights_TK.requires_grad else x_TD.detach().requires_grad_()
            exchange.sent = SendRows.apply(asking_TD, weights_TK, exchange)
        exchange.send_forward(x_TD.detach(), weights_TK.detach(), keep)
        self.times.add("send", started_s)
        return exchange

    def again(self, call: Forward, until_s: float, sources: Mapping[int, str]) -> "Exchange":
        """Rows that a shard did not compute, to whoever holds their experts now; it fails with the first of them that does."""
        if self._has_news():
            self.follow()
        routes = self._route(call.layer, call.rows.x_RD, call.rows.ids_RK)
        adapters = None if call.rows.adapter_R is None else (call.rows.adapter_R, sources)
        exchange = Exchange(self, call.layer, call.op_id, routes, until_s, adapters, is_retry=True)
        exchange.send_forward(call.rows.x_RD, call.rows.weights_RK, False)
        return exchange

    def _route(self, layer: int, x_TD: Tensor, ids_TK: Tensor) -> list[Route]:
        """Pick a replica per (token, expert) and group the slots by shard."""
        ids_TK, shards = ids_TK.cpu(), self.table.shards
        if len(shards) == 1:
            return [Route(shards[0], None, ids_TK)] if len(ids_TK) else []
        host_TK = ids_TK.numpy()  # many small steps: numpy takes half of torch's time
        shard_TK = self._shards(layer, x_TD, host_TK)
        routes = []
        for position, name in enumerate(shards):
            here_TK = shard_TK == position
            token_R = here_TK.any(1).nonzero()[0]
            own_TK = np.where(here_TK, host_TK, REMOTE)
            if len(token_R) == len(host_TK) > 0:
                routes.append(Route(name, None, torch.from_numpy(own_TK)))
            elif len(token_R):
                routes.append(Route(name, torch.from_numpy(token_R), torch.from_numpy(own_TK[token_R])))
        return routes

    def places(self, layer: int, is_near: bool) -> tuple[np.ndarray, np.ndarray]:
        """shard_EN and num_replicas_E that rows of a layer are routed by."""
        shard_LEN, num_LE = self._near if is_near else self._spread
        at = self._row_of[layer]
        return shard_LEN[at], num_LE[at]

    def _shards(self, layer: int, x_TD: Tensor, ids_TK: np.ndarray) -> np.ndarray:
        """The shard of each slot: the token's turn among the expert's replicas, or the nearest of them."""
        shard_EN, num_E = self.places(layer, len(ids_TK) <= self.near_rows)
        if not self.is_replicated:
            shard_TK = shard_EN[:, 0].take(ids_TK)  # REMOTE finds the last expert's
        else:
            turn_T1 = replica_hash(x_TD)[:, None]
            shard_TK = shard_EN[ids_TK, turn_T1 % num_E[ids_TK]]
        return np.where(ids_TK == REMOTE, REMOTE, shard_TK)

    def note_failure(self, shard: str, error: TrinityError) -> None:
        """Learn what a failed call says about the placement."""
        self.num_retries += 1
        if isinstance(error, DeadlineExceeded):
            self.patience.was_late(shard)
        if isinstance(error, WrongEpoch):
            self.view.refresh()
        elif not isinstance(error, AdapterMissing):
            self.view.mark_unreachable(shard)

    def deadline(self) -> float:
        return time.monotonic() + self.timeout_s
