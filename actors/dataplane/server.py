"""The shard's side of the direct transport: sockets that it opens itself, and who may compute when.

Decisions: a blocking thread for each connection that the door let in; whoever holds a queue's lock computes for all that wait
in it, equal layers of inference in one multiplication; inference never waits for training; anything unexpected ends the
connection, never the shard.
"""

import logging
import math
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from actors.dataplane import ring, unix_socket
from actors.dataplane.connection import Address, Wire, family_of, machine_id
from actors.dataplane.door import HANDSHAKE_S, Door
from actors.dataplane.frames import (
    FAILURE,
    IN_SHARED_BUFFER,
    OFFER,
    BadFrame,
    Calls,
    FrameLimits,
    Header,
    answer,
    call_of,
)
from actors.dataplane.handshake import meant
from actors.dataplane.native_frames import ServedWire
from actors.dataplane.sealed import SealedWire, check_package
from actors.dataplane.shm import consider
from trinity import native
from trinity.errors import TrinityError
from trinity.rpc.messages import Fetch, Forward, Rows
from trinity.utils.niceness import PATIENT, LowPriorityExecutor

log = logging.getLogger(__name__)
PAYLOAD_S = 60.0  # for the rest of a frame whose own deadline is nearer
BACKLOG = 128
TICK_S = 1.0  # an idle connection looks at the clock so often


class _Job:
    """A call that waits for the shard, and its answer afterwards."""

    def __init__(self, call: Calls):
        self.call, self.value, self.done = call, None, False

    @property
    def rank(self) -> tuple[int, int]:
        """Copies go last, what is urgent first."""
        return (1, 0) if isinstance(self.call, Fetch) else (0, getattr(self.call, "priority", 0))


class Combiner:
    """Runs calls on a shard in three queues, beside each other: inference in one, that of engines which give way in another,
    all else in the third; the latter two patiently."""

    def __init__(
        self, shard: Any, patient: LowPriorityExecutor | None = None, prompts: LowPriorityExecutor | None = None
    ):
        self.inference, self.prompts, self.others = RequestQueue(shard), RequestQueue(shard), RequestQueue(shard)
        self._patient, self._for_prompts = patient or LowPriorityExecutor(), prompts or LowPriorityExecutor()

    def run(self, call: Calls) -> Any:
        """-> what the verb returned, or the TrinityError it raised."""
        if not isinstance(call, Forward) or call.keep:
            return self._patient.run(self.others.run, call)
        if call.priority == PATIENT:
            return self._for_prompts.run(self.prompts.run, call)
        return self.inference.run(call)


class RequestQueue:
    """Runs calls on a shard one at a time. A thread that gets the lock computes for all that wait, in order of rank;
    inference of the same layer, version and priority becomes one call."""

    def __init__(self, shard: Any):
        self.shard = shard
        self.lock = threading.Lock()
        self._waiting: list[_Job] = []
        self._guard = threading.Lock()
        self.num_merged = 0

    def run(self, call: Calls) -> Any:
        """-> what the verb returned, or the TrinityError it raised."""
        job = _Job(call)
        with self._guard:
            self._waiting.append(job)
        with self.lock:
            while not job.done:
                self._compute(self._next())
        return job.value

    def _next(self) -> list[_Job]:
        """The first job in order of rank, with those that can share its multiplication."""
        with self._guard:
            first = min(self._waiting, key=lambda job: job.rank)
            group = [job for job in self._waiting if job is first or _mergeable(first.call, job.call)]
            self._waiting = [job for job in self._waiting if job not in group]
        return group

    def _compute(self, group: list[_Job]) -> None:
        if len(group) == 1:
            group[0].value = self._one(group[0].call)
        else:
            self.num_merged += len(group)
            for job, value in zip(group, self._together([job.call for job in group]), strict=True):
                job.value = value
        for job in group:
            job.done = True

    def _one(self, call: Calls) -> Any:
        try:
            if isinstance(call, Fetch):
                return self.shard.fetch(call)
            return self.shard.infer(call) if isinstance(call, Forward) else self.shard.backward(call)
        except Exception as error:  # the edge of this process: no caller may wait for an answer that never comes
            if isinstance(error, TrinityError):
                return error
            log.exception("computing layer %d of %s failed", call.layer, type(call).__name__)
            return TrinityError(f"the shard failed with {type(error).__name__}; its log says where")

    def _together(self, calls: list[Any]) -> list[Any]:
        """One inference for all; each alone where that fails, so that one caller's mistake is its own."""
        answer = self._one(merged(calls))
        if isinstance(answer, TrinityError):
            return [self._one(call) for call in calls]
        return list(answer.split([len(call.rows.x_RD) for call in calls]))


def merged(calls: Sequence[Forward]) -> Forward:
    """Forwards of one layer and version as one: their rows one after the other, the latest deadline."""
    parts = [call.rows for call in calls]
    rows = Rows(
        x_RD=torch.cat([part.x_RD for part in parts]),
        ids_RK=torch.cat([part.ids_RK for part in parts]),
        weights_RK=torch.cat([part.weights_RK for part in parts]),
        adapter_R=_adapters(parts),
    )
    return replace(calls[0], rows=rows, deadline_s=max(call.deadline_s for call in calls))


def _adapters(parts: Sequence[Rows]) -> torch.Tensor | None:
    """adapter_R of all rows."""
    if all(part.adapter_R is None for part in parts):
        return None
    none = [torch.zeros(len(part.x_RD), dtype=torch.int64) for part in parts]
    return torch.cat(
        [zero if part.adapter_R is None else part.adapter_R for part, zero in zip(parts, none, strict=True)]
    )


def _mergeable(a: Calls, b: Calls) -> bool:
    if not (isinstance(a, Forward) and isinstance(b, Forward)) or a.keep or b.keep:
        return False
    return _kind(a) == _kind(b)


def _kind(call: Forward) -> tuple[Any, ...]:
    """The key that equal calls share. Rows that came through Ray lie in the host's memory, others where the experts are."""
    return call.layer, call.version, call.priority, call.rows.ids_RK.shape[1], call.rows.x_RD.device


class DirectServer:
    """Listens for a shard's callers. Owns its sockets and threads."""

    def __init__(
        self,
        combiner: Combiner,
        limits: FrameLimits,
        secret: bytes,
        host: str,
        num_threads: int = 1,
        device: str = "cpu",
        is_sealed: bool = False,
        service: Any = None,
    ):
        """`service`: what computes plain inference in C++ (native/ring), if anything does."""
        self.combiner, self.limits, self.secret, self.num_threads = combiner, limits, secret, num_threads
        self.service = service
        self.device = torch.device(device)
        if is_sealed:
            check_package()
        unix, self._path = unix_socket.listen(BACKLOG)
        tcp = socket.create_server((host, 0), family=family_of(host), backlog=BACKLOG)
        self.address = Address(machine_id(), str(self._path), host, tcp.getsockname()[1], self.device.type, is_sealed)
        self._door = Door({meant(self.address, True): unix, meant(self.address, False): tcp}, secret, self._admit)

    def close(self) -> None:
        """Take no new connections; those that are open end with their peers. Harmless when repeated."""
        self._door.close()
        self._path.unlink(missing_ok=True)

    def _admit(self, sock: socket.socket, meant: str, transcript: bytes) -> None:
        wire = Wire(sock, TICK_S, self.device)
        if meant.startswith("sealed"):
            wire = SealedWire(wire, self.secret, transcript, is_shard=True)
        elif self.service is not None:
            wire = ServedWire(wire, self.service)
        threading.Thread(target=self._serve, args=(wire,), name="trinity-rows", daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        """One connection, until its peer leaves or breaks the protocol."""
        torch.set_num_threads(self.num_threads)  # OpenMP counts its threads by caller
        try:
            while True:
                self._answer_one(wire)
        except (EOFError, TrinityError, OSError) as error:
            level = logging.DEBUG if isinstance(error, EOFError) else logging.WARNING  # the first: the caller left
            log.log(level, "a connection ended: %s", str(error))  # who keeps the record must not keep its rows
        finally:
            if wire.ring is not None:
                native.lib.ring_detach(wire.ring)
            wire.close()

    def _answer_one(self, wire: Wire) -> None:
        try:
            header, came_s = wire.header(math.inf), time.monotonic()
            if header.kind == OFFER:
                return self._consider(wire, header, time.monotonic() + HANDSHAKE_S)
            header.check(self.limits)
            until_s = came_s + max(header.left_s, PAYLOAD_S)
            call = call_of(header, wire.payload(header, until_s), self.limits, came_s)
        except BadFrame as error:
            self._refuse(wire, error)
        value = self.combiner.run(call)
        reply, tensors = answer(header.request, value)
        if header.flags & IN_SHARED_BUFFER and header.kind < FAILURE and not isinstance(value, TrinityError):
            reply, tensors = wire.post(header.box, reply, tensors)
        wire.send(reply, tensors, max(call.deadline_s, time.monotonic() + PAYLOAD_S))

    def _consider(self, wire: Wire, header: Header, deadline_s: float) -> None:
        if header.request == ring.KIND:
            return ring.consider(wire, self.service, deadline_s)
        consider(wire, header, deadline_s)

    def _refuse(self, wire: Wire, error: BadFrame) -> NoReturn:
        """Say why, then end: after a broken frame nobody knows where the next one starts."""
        reply, tensors = answer(0, error)
        wire.send(reply, tensors, time.monotonic() + HANDSHAKE_S)
        raise error
