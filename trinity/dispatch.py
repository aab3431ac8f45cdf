"""Dispatch: send each token's row to the shards that hold its experts, and add up what comes back.

Legend: T tokens, D model, K top-k, R rows of one shard, A assignments (row, expert) of one shard, S shards, E experts,
N replicas, L layers.
Decisions: one message per shard and layer; a row travels once, whatever the number of local experts; a data call carries
all it needs (epoch, version, op_id, deadline) and never asks the control plane; whatever a caller resends carries the
same op_id, and a shard applies it once.
"""

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trinity.errors import InputGone, TrinityError, Unavailable
from trinity.messages import Backward, Forward, Rows
from trinity.placement.table import PlacementTable


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
    pause_s = 0.05
    while True:
        try:
            return reply.result()
        except Unavailable:
            if time.time() + pause_s >= deadline_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)
        reply = transport.send(shard, verb, message)


class Route(NamedTuple):
    """Which slots of (token, k) go to one shard."""

    shard: str
    token_R: Tensor  # the token of each row, ascending
    row_A: Tensor
    slot_A: Tensor  # position in the flattened [T * K]


class Dispatcher:
    """The routed experts of every layer, as the backbone sees them: `dispatcher(layer, x_TD, ids_TK, weights_TK)`.

    Differentiable in x and weights; expert gradients stay on their shards. `version` is the version of the weights that
    every shard must hold. `issued` counts the backward ops sent to each shard since `begin`, for the two-phase step.
    Not thread-safe: one dispatcher per caller thread.
    """

    def __init__(self, table: PlacementTable, transport: Transport, *, timeout_s: float, version: int = 0):
        self.caller = uuid.uuid4().hex[:12]
        self.transport, self.timeout_s = transport, timeout_s
        self._ops = itertools.count()
        self.issued: Counter[str] = Counter()
        self.version = version
        self.follow(table)

    def follow(self, table: PlacementTable) -> None:
        """Use this table from the next call on."""
        self.table = table
        self._row_of = {layer: i for i, layer in enumerate(table.layers)}
        self._shard_LEN = torch.from_numpy(table.shard_LEN)
        self._num_LE = torch.from_numpy(table.num_replicas_LE)

    def begin(self, version: int) -> None:
        """Start a step's work on weights of `version`."""
        self.version = version
        self.issued.clear()

    def __call__(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x_TD.requires_grad or weights_TK.requires_grad):
            return _RemoteExperts.apply(x_TD, weights_TK, ids_TK, layer, self)
        return self._forward(layer, x_TD, self._route(layer, ids_TK), ids_TK, weights_TK, self._next_op(), keep=False)

    def _route(self, layer: int, ids_TK: Tensor) -> list[Route]:
        """Pick a replica per (token, expert) and group the slots by shard."""
        ids_TK = ids_TK.cpu()
        at, k = self._row_of[layer], ids_TK.shape[1]
        turn_T1 = torch.arange(ids_TK.shape[0]).unsqueeze(1)
        shard_X = self._shard_LEN[at][ids_TK, turn_T1 % self._num_LE[at][ids_TK]].flatten()
        routes = []
        for position, name in enumerate(self.table.shards):
            slot_A = (shard_X == position).nonzero().squeeze(1)
            if len(slot_A):
                token_R, row_A = torch.unique_consecutive(slot_A // k, return_inverse=True)
                routes.append(Route(name, token_R, row_A, slot_A))
        return routes

    def _forward(
        self, layer: int, x_TD: Tensor, routes: list[Route], ids_TK: Tensor, weights_TK: Tensor, op_id: str, keep: bool
    ) -> Tensor:
        rows = [_rows(route, x_TD, ids_TK, weights_TK) for route in routes]
        calls = [Forward(op_id, layer, self.table.epoch, self.version, self._deadline(), r, keep) for r in rows]
        partials = self._exchange("infer", [(route.shard, call) for route, call in zip(routes, calls, strict=True)])
        return combine(x_TD, routes, partials)

    def _exchange(self, verb: str, calls: list[tuple[str, Any]]) -> list[Any]:
        """Send all, then wait for all: the shards work side by side."""
        replies = [(shard, call, self.transport.send(shard, verb, call)) for shard, call in calls]
        return [settle(self.transport, shard, verb, call, reply, call.deadline_s) for shard, call, reply in replies]

    def _backward(
        self, layer: int, op_id: str, dy_TD: Tensor, routes: list[Route], rows_of: Callable[[Route], Rows]
    ) -> list[tuple[Tensor, Tensor]]:
        calls = [
            Backward(
                op_id, layer, self.table.epoch, self.version, self._deadline(), dy_TD[route.token_R.to(dy_TD.device)]
            )
            for route in routes
        ]
        self.issued.update(route.shard for route in routes)
        replies = [
            self.transport.send(route.shard, "backward", call) for route, call in zip(routes, calls, strict=True)
        ]
        return [self._gradient(*each, rows_of) for each in zip(routes, calls, replies, strict=True)]

    def _gradient(self, route: Route, call: Backward, reply: Reply, rows_of: Callable[[Route], Rows]) -> Any:
        try:
            return settle(self.transport, route.shard, "backward", call, reply, call.deadline_s)
        except InputGone:
            call = replace(call, rows=rows_of(route), deadline_s=self._deadline())
            reply = self.transport.send(route.shard, "backward", call)
            return settle(self.transport, route.shard, "backward", call, reply, call.deadline_s)

    def _next_op(self) -> str:
        return f"{self.caller}:{next(self._ops)}"

    def _deadline(self) -> float:
        return time.time() + self.timeout_s


def _rows(route: Route, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Rows:
    device = x_TD.device
    slot_A = route.slot_A.to(device)
    return Rows(
        x_RD=x_TD.detach()[route.token_R.to(device)],
        row_A=route.row_A,
        expert_A=ids_TK.flatten()[slot_A],
        weight_A=weights_TK.detach().flatten()[slot_A].float(),
    )


def combine(like_TD: Tensor, routes: list[Route], partials: list[Tensor]) -> Tensor:
    """Sum the shards' rows back into tokens, in fp32 and in the table's order of shards, rounded once."""
    out_TD = torch.zeros(like_TD.shape, dtype=torch.float32, device=like_TD.device)
    for route, part_RD in zip(routes, partials, strict=True):
        out_TD.index_add_(0, route.token_R.to(out_TD.device), part_RD.to(out_TD))
    return out_TD.to(like_TD.dtype)


class _RemoteExperts(torch.autograd.Function):
    """y = dispatch(x, weights); backward returns dx and dweights, and leaves the experts' gradients on their shards."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, layer: int, dispatcher: Dispatcher
    ) -> Tensor:
        ctx.layer, ctx.dispatcher = layer, dispatcher
        ctx.op_id, ctx.routes = dispatcher._next_op(), dispatcher._route(layer, ids_TK)
        ctx.save_for_backward(x_TD, weights_TK, ids_TK)
        return dispatcher._forward(layer, x_TD, ctx.routes, ids_TK, weights_TK, ctx.op_id, keep=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, ids_TK = ctx.saved_tensors
        gradients = ctx.dispatcher._backward(
            ctx.layer, ctx.op_id, grads[0], ctx.routes, lambda route: _rows(route, x_TD, ids_TK, weights_TK)
        )
        dx_TD = combine(x_TD, ctx.routes, [dx_RD for dx_RD, _ in gradients])
        dweights_X = torch.zeros(weights_TK.numel(), dtype=torch.float32, device=weights_TK.device)
        for route, (_, dweight_A) in zip(ctx.routes, gradients, strict=True):
            dweights_X[route.slot_A.to(dweights_X.device)] = dweight_A.to(dweights_X)
        return dx_TD, dweights_X.view_as(weights_TK).to(weights_TK.dtype), None, None, None


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
