"""Inference by native/ring, through rings on this host and frames to others: a layer's rows in one call, their sum in another.

Legend: T tokens, D model, K top-k, E experts, N replicas, S shards.
Decisions: only what C++ does with the same bits goes this way: plain rows, of which no gradient is wanted. Whatever it
does not do, and whatever goes wrong, goes the usual way, under the same name: an inference may be computed twice. A plan holds
for a table and for the connections that there are, and is made anew when either changes.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trinity import native
from trinity.dispatch.transport import Rings
from trinity.errors import DeadlineExceeded
from trinity.rpc.messages import op_name
from trinity.utils.niceness import PATIENT

if TYPE_CHECKING:
    from trinity.dispatch.dispatcher import Dispatcher
    from trinity.dispatch.exchange import Exchange

LATE, GONE = 6, 7  # native/ring/layout.h:kLate, kGone
FORMATS = {torch.float32: 0, torch.bfloat16: 1}  # native/ring/layout.h:RowFormat


class NearLayers:
    """Plans of one dispatcher: where rows of each layer go in C++."""

    def __init__(self, dispatcher: "Dispatcher", rings: Rings):
        self.dispatcher, self._rings = dispatcher, rings
        self._plans = dict[tuple[int, bool], Any]()
        self._num_changes = -1

    def forget(self) -> None:
        """Make all plans anew: the table is another one."""
        self._plans.clear()

    def begin(
        self, layer: int, op: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, until_s: float
    ) -> "NearExchange | None":
        """Send the rows; None where they have to go the usual way."""
        format_ = FORMATS.get(x_TD.dtype)
        if format_ is None or not (_is_plain(x_TD, x_TD.dtype) and _is_plain(weights_TK, torch.float32)):
            return None
        if not _is_plain(ids_TK, torch.int64) or self.dispatcher.priority == PATIENT:
            return None
        attempt_until_s = self._attempt_until_s(len(x_TD), until_s)
        plan = self._plan(layer, len(x_TD), attempt_until_s)
        if plan is None:
            return None
        where = x_TD.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr()
        of = layer, self.dispatcher.version, self.dispatcher.priority, attempt_until_s, format_
        name = op_name(0, self.dispatcher.caller, op)
        sent = native.lib.ring_begin(plan, name, *of, *where, *x_TD.shape, ids_TK.shape[1])
        if isinstance(sent, int):
            if sent & 0xFF == GONE:
                self._rings.renew()
            return None
        return NearExchange(self.dispatcher, sent, (layer, op, x_TD, ids_TK, weights_TK, until_s), attempt_until_s)

    def for_pass(self, layers: Sequence[int], x_TD: Tensor, ops: Sequence[int]) -> "NearPass | None":
        """Plans of all these layers, for rows like x in calls of these numbers; None without any."""
        if x_TD.dtype not in FORMATS or self.dispatcher.priority == PATIENT:
            return None
        until_s = self.dispatcher.deadline()
        attempt_until_s = self._attempt_until_s(len(x_TD), until_s)
        plans = {layer: self._plan(layer, len(x_TD), attempt_until_s) for layer in layers}
        if all(plan is None for plan in plans.values()):
            return None
        return NearPass(self.dispatcher, self._rings, plans, ops, attempt_until_s - time.monotonic())

    def _plan(self, layer: int, num_rows: int, until_s: float) -> Any:
        if self._rings.num_changes != self._num_changes:
            self._plans.clear()
            self._num_changes = self._rings.num_changes
        key = layer, num_rows <= self.dispatcher.near_rows
        if key not in self._plans:
            self._plans[key] = self._made(*key, until_s)
        return self._plans[key]

    def _made(self, layer: int, is_near: bool, until_s: float) -> Any:
        """None without any ring."""
        table = self.dispatcher.table
        rings = [self._rings.ring(shard, table.epoch, until_s) for shard in table.shards]
        if not any(rings):
            return None
        shard_EN, num_E = (
            np.ascontiguousarray(each.clip(0), np.int32) for each in self.dispatcher.places(layer, is_near)
        )
        return native.lib.ring_plan(rings, table.epoch, shard_EN.ctypes.data, num_E.ctypes.data, *shard_EN.shape)

    def _attempt_until_s(self, num_rows: int, until_s: float) -> float:
        """Deadline of this attempt: with replicas there is only so much patience with a shard."""
        if not self.dispatcher.is_replicated:
            return until_s
        patience = self.dispatcher.patience
        return min(until_s, time.monotonic() + max(patience.of(s, num_rows) for s in self.dispatcher.table.shards))


class NearExchange:
    """One layer's rows on their way in C++; given up when it is let go of."""

    def __init__(self, dispatcher: "Dispatcher", sent: Any, asked: tuple[Any, ...], until_s: float):
        self.dispatcher, self._sent, self._asked, self._until_s = dispatcher, sent, asked, until_s
        self._sent_s = time.monotonic()

    def result(self) -> Tensor:
        """Wait; -> y_TD. Raises what the usual way raises."""
        started_s = time.perf_counter()
        y_TD = torch.empty_like(self._asked[2])
        failure = native.lib.ring_finish(self._sent, y_TD.data_ptr(), self._until_s)
        self.dispatcher.times.add("wait", started_s)
        if failure:
            return self._usual(failure & 0xFF, failure >> 8)
        self._note_time(len(y_TD))
        return y_TD

    def _note_time(self, num_rows: int) -> None:
        if self.dispatcher.is_replicated:
            note_time(self.dispatcher, num_rows, time.monotonic() - self._sent_s)

    def _usual(self, code: int, at: int) -> Tensor:
        """The answer of the usual way."""
        note_late(self.dispatcher, code, at)
        return self.dispatcher.begin_usual(*self._asked).result()


class NearPass:
    """Rings for the layers of one pass, whose calls the extension's step makes: see trinity/models/common/native_model.py."""

    def __init__(
        self, dispatcher: "Dispatcher", rings: Rings, plans: Mapping[int, Any], ops: Sequence[int], left_s: float
    ):
        self.dispatcher, self._rings, self._plans, self._ops, self._left_s = dispatcher, rings, plans, ops, left_s

    def described(self, layers: Sequence[int]) -> tuple[object, ...]:
        """The argument `near` of step_run."""
        of, plans = self.dispatcher, [self._plans.get(layer) for layer in layers]
        return plans, of.caller, self._ops[0], of.version, of.priority, self._left_s

    def usual(self, failure: int, at: int, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> "Exchange":
        """The same call by the usual way."""
        code = failure & 0xFF
        note_late(self.dispatcher, code, failure >> 8)
        if code == GONE:
            self._rings.renew()
        until_s = self.dispatcher.deadline()
        return self.dispatcher.begin_usual(layer, self._ops[at], x_TD, ids_TK, weights_TK, until_s)

    def took(self, waited_L: Sequence[float], num_rows: int) -> None:
        """Note how long rings took, of layers that they were asked for."""
        for seconds in filter(None, waited_L):
            self.dispatcher.times.add("wait", time.perf_counter() - seconds)
            if self.dispatcher.is_replicated:
                note_time(self.dispatcher, num_rows, seconds)


def note_time(dispatcher: "Dispatcher", num_rows: int, seconds: float) -> None:
    """Learn what shards take; which of them took longest is not known."""
    for shard in dispatcher.table.shards:
        dispatcher.patience.took(shard, num_rows, seconds)


def note_late(dispatcher: "Dispatcher", code: int, at: int) -> None:
    """Do not ask a shard again that took too long, where another one could answer."""
    if code == LATE and dispatcher.is_replicated:
        shard = dispatcher.table.shards[at]
        dispatcher.note_failure(shard, DeadlineExceeded(f"shard {shard} did not answer in time"))


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()
