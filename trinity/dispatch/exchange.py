"""One layer's rows on their way to their shards and back, forward and backward.

Legend: T tokens, D model, K top-k, R rows of one shard.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.dispatch.transport import Reply, result_with_retry
from trinity.errors import (
    AdapterLost,
    AdapterMissing,
    CheckpointError,
    DeadlineExceeded,
    InputGone,
    TrinityError,
    Unavailable,
    WrongEpoch,
)
from trinity.rpc.messages import Adapt, Backward, Forward, Rows
from trinity.utils.trying import retrying, tried

if TYPE_CHECKING:
    from trinity.dispatch.dispatcher import Dispatcher

log = logging.getLogger(__name__)
# Rows may go to another shard after these, or to the same one, which knows more by then.
MOVED = (Unavailable, WrongEpoch, DeadlineExceeded, AdapterMissing)
RowAdapters = tuple[Tensor, Mapping[int, str]]  # content_T of each row's adapter (0: none), and each one's source


class Route(NamedTuple):
    """Which tokens' rows go to one shard, and which of their slots are meant for it."""

    shard: str
    token_R: Tensor | None  # the token of each row, ascending; None: every token
    ids_RK: Tensor  # REMOTE in the other shards' slots

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


class Exchange:
    """One layer's rows on their way: forward, and in training backward too. Made by `Dispatcher.begin`.

    For autograd it is two functions with one edge between them: `SendRows` before whatever overlaps, `ReceiveRows` after it.
    Backward runs the other way round, so that there, too, the rows are away while the rest of the layer is computed.
    """

    def __init__(
        self,
        dispatcher: "Dispatcher",
        layer: int,
        op_id: str,
        routes: list[Route],
        until_s: float,
        adapters: RowAdapters | None = None,
        is_retry: bool = False,
    ):
        self.dispatcher, self.routes = dispatcher, routes
        self._content_T: Tensor | None = None if adapters is None else adapters[0]
        self._sources: Mapping[int, str] = {} if adapters is None else adapters[1]
        self._until_s, self._is_retry = until_s, is_retry
        self._names = (op_id, layer, dispatcher.table.epoch, dispatcher.version)
        self._calls: list[Any] = []
        self._replies: list[Reply] = []
        self._like_TD: Tensor | None = None
        self._keep, self._sent_s, self._is_delayed = False, 0.0, False
        self.sent: Tensor | None = None

    def result(self) -> Tensor:
        """Wait; -> y_TD in x's dtype. Raises what the transport raises."""
        if self.sent is None:
            return self.receive_forward()
        sent, self.sent = self.sent, None  # autograd's graph holds this object: held in turn, neither would be freed
        return ReceiveRows.apply(sent, self)

    def send_forward(self, x_TD: Tensor, weights_TK: Tensor, keep: bool) -> None:
        """Send each shard its rows. With replicas, inference has only so much patience with a shard and then asks another."""
        self._like_TD, self._keep, self._sent_s = x_TD, keep, time.monotonic()
        rows = [_rows(route, x_TD, weights_TK, self._content_T) for route in self.routes]
        until_s = [self._attempt_until_s(*each) for each in zip(self.routes, rows, strict=True)]
        self._send("infer", [self._forward(*each) for each in zip(until_s, rows, strict=True)])

    def _forward(self, until_s: float, rows: Rows) -> Forward:
        return Forward(*self._names, until_s, rows, self._keep, self.dispatcher.priority)

    def _attempt_until_s(self, route: Route, rows: Rows) -> float:
        if self._keep or not self.dispatcher.is_replicated:
            return self._until_s
        patience_s = self.dispatcher.patience.of(route.shard, len(rows.x_RD))
        return min(self._until_s, self._sent_s + patience_s)

    def receive_forward(self) -> Tensor:
        assert self._like_TD is not None
        like_TD, self._like_TD = self._like_TD, None
        times, started_s = self.dispatcher.times, time.perf_counter()
        partials = self._wait_all(self._wait_forward)
        started_s = times.add("wait", started_s)
        self._calls, self._replies = [], []  # in training this object lives until the backward; its rows need not
        y_TD = combine(like_TD, self.routes, partials)
        times.add("combine", started_s)
        return y_TD

    def send_backward(self, dy_TD: Tensor) -> None:
        deadline_s = self.dispatcher.deadline()
        self.dispatcher.num_sent_ops.update(route.shard for route in self.routes)
        self._send("backward", [Backward(*self._names, deadline_s, route.rows(dy_TD)) for route in self.routes])

    def receive_backward(self, x_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """-> dx_TD, dweights_TK."""
        pairs = self._wait_all(lambda i: self._wait_backward(i, x_TD, weights_TK))
        self._calls, self._replies = [], []
        dx_TD = combine(x_TD, self.routes, [dx_RD for dx_RD, _ in pairs])
        return dx_TD, combine(weights_TK, self.routes, [dweights_RK for _, dweights_RK in pairs])

    def _wait_all(self, wait: Callable[[int], Any]) -> list[Any]:
        """The answers of all shards. In an attempt at a step that has failed: nothing, as if no rows had been sent."""
        try:
            return [wait(i) for i in range(len(self.routes))]
        except TrinityError as error:
            if not self._keep:  # inference
                raise
            self.dispatcher.fail(error)
            self.routes, self._replies = [], []
            return []

    def _send(self, verb: str, calls: list[Any]) -> None:
        """Send all before waiting for any: the shards work side by side."""
        transport, self._calls = self.dispatcher.transport, calls
        self._replies = [transport.send(r.shard, verb, call) for r, call in zip(self.routes, calls, strict=True)]

    def _wait_forward(self, i: int) -> Tensor:
        """A shard's rows; from whoever holds their experts now, where it has gone or no longer holds them.

        Rows whose activations are kept for a backward stay with their shard.
        """
        call = self._calls[i]
        if call.keep:
            return self._wait("infer", i)
        try:
            y_RD = self._replies[i].result()
            self._note_time(i)
            return y_RD
        except MOVED as error:
            self._is_delayed = True
            self.dispatcher.note_failure(self.routes[i].shard, error)
            if isinstance(error, AdapterMissing):
                self._tell(self.routes[i].shard, call)
            if self._is_retry or time.monotonic() >= self._until_s:
                raise
        return retrying(
            lambda: self.dispatcher.again(call, self._until_s, self._sources).result(), self._until_s, MOVED
        )

    def _tell(self, shard: str, call: Forward) -> None:
        """Have a shard take up the adapters of a call: it has started again, or is a new one. Raises AdapterLost where it
        cannot read them; one that is away is asked again."""
        assert call.rows.adapter_R is not None
        for content in set(call.rows.adapter_R.tolist()) & self._sources.keys():
            reply = self.dispatcher.transport.send(
                shard, "adapt", Adapt(self._sources[content], self._until_s, content)
            )
            if isinstance(error := tried(reply.result, TrinityError), CheckpointError):
                log.error("shard %s cannot take up adapter %x: %s", shard, content, error)
                raise AdapterLost("the files of this adapter cannot be read any more; the server's log says why")

    def _note_time(self, i: int) -> None:
        if self.dispatcher.is_replicated and not self._is_delayed:  # by waiting for another shard
            seconds, num_rows = time.monotonic() - self._sent_s, len(self._calls[i].rows.x_RD)
            self.dispatcher.patience.took(self.routes[i].shard, num_rows, seconds)

    def _wait(self, verb: str, i: int) -> Any:
        call, reply = self._calls[i], self._replies[i]
        return result_with_retry(self.dispatcher.transport, self.routes[i].shard, verb, call, reply, call.deadline_s)

    def _wait_backward(self, i: int, x_TD: Tensor, weights_TK: Tensor) -> Any:
        try:
            return self._wait("backward", i)
        except InputGone:  # rare: the shard has been restarted, or its cache was too small
            rows, deadline_s = _rows(self.routes[i], x_TD, weights_TK), self.dispatcher.deadline()
            self._calls[i] = replace(self._calls[i], rows=rows, deadline_s=deadline_s)
            self._replies[i] = self.dispatcher.transport.send(self.routes[i].shard, "backward", self._calls[i])
            return self._wait("backward", i)


def replica_hash(x_TD: Tensor) -> np.ndarray:
    """A number of each token that is as good as random, but the token's own: in other company it goes to the same replicas,

    and so its experts are added up in the same order.
    """
    bits_T = x_TD[:, 0].detach().float().cpu().numpy().view(np.uint32).astype(np.uint64)
    return ((bits_T * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)).astype(np.int64)


def _rows(route: Route, x_TD: Tensor, weights_TK: Tensor, content_T: Tensor | None = None) -> Rows:
    content_R = None if content_T is None else route.rows(content_T)
    has_some = content_R is not None and bool(content_R.any())
    return Rows(route.rows(x_TD), route.ids_RK, route.rows(weights_TK), content_R if has_some else None)


def combine(like_TD: Tensor, routes: list[Route], partials: list[Tensor]) -> Tensor:
    """Sum the shards' rows back into tokens, in fp32 and in the table's order of shards, rounded once."""
    if len(routes) == 1 and routes[0].token_R is None:
        return partials[0].to(like_TD)
    out_TD = torch.zeros(like_TD.shape, dtype=torch.float32, device=like_TD.device)
    for route, part_RD in zip(routes, partials, strict=True):
        route.add(out_TD, part_RD)
    return out_TD.to(like_TD.dtype)


class SendRows(torch.autograd.Function):
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


class ReceiveRows(torch.autograd.Function):
    """Turn that token into y; its backward sends dy. Experts' gradients stay on their shards."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive_forward()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.send_backward(grads[0])
        return grads[0].new_zeros(()), None
