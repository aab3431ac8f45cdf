"""Agreement of the workers of one training job: alone, or over torch.distributed.

Decisions: the backbone's gradients are summed, never averaged: the losses of workers and micro-batches are shares of the global
mean already. What worker 0 finds out travels as JSON, in one broadcast where it is short: numbers keep their bits, nan and
inf included, and nothing is ever unpickled. What fails there and may succeed later is a RetryStep on every worker.
"""

import json
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trinity.train.retry import RETRYABLE, RetryStep, reason_of

T = TypeVar("T")  # plain JSON: None, bool, int, float, str, and tuples (lists, on arrival) and dicts of them
NOTE_BYTES = 512  # of a broadcast; longer texts take a second one
LENGTH_BYTES = 4


class Comm(Protocol):
    """Agreement of the workers of one job. Every method is called by all of them in the same order."""

    rank: int
    world: int

    def all_reduce(self, tensor: Tensor) -> Tensor: ...

    def from_first(self, tensor: Tensor) -> Tensor: ...


class Alone:
    """One worker: everything is already agreed."""

    rank, world = 0, 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        return tensor


class Distributed:
    """Workers of an initialised torch.distributed group; tensors are moved to the backend's device."""

    def __init__(self, device: torch.device):
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device).clone()
        dist.all_reduce(moved)
        return moved.cpu()

    def from_first(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device).clone()
        dist.broadcast(moved, src=0)
        return moved.cpu()


def barrier(comm: Comm) -> None:
    """Return once every worker has come here."""
    comm.all_reduce(torch.zeros(1))


def on_rank0(comm: Comm, what: Callable[[], T]) -> T:
    """Worker 0 does it, and all learn what comes out, or raise RetryStep where it failed and may succeed later.

    On worker 0 its `__cause__` is the error itself. An error of another kind is raised there alone, and ends the job.
    """
    outcome: dict[str, object] = {}
    cause: Exception | None = None
    if comm.rank == 0:
        try:
            outcome = {"value": what()}
        except RETRYABLE as error:
            cause, outcome = error, {"reason": reason_of(error), "why": str(error)}
    said = said_by_rank0(comm, outcome)
    if "reason" in said:
        raise RetryStep(str(said["reason"]), str(said["why"])) from cause
    return cast(T, said["value"])


def said_by_rank0(comm: Comm, value: T) -> T:
    """The value of worker 0; the others' own `value` does not matter. Plain JSON only: TypeError otherwise, on worker 0."""
    text = json.dumps(value).encode() if comm.rank == 0 else b""
    said = _bytes(comm.from_first(_note(len(text).to_bytes(LENGTH_BYTES, "big") + text, NOTE_BYTES)))
    num = int.from_bytes(said[:LENGTH_BYTES], "big")
    found = said[LENGTH_BYTES : LENGTH_BYTES + num]
    if num > len(found):  # all see the same length
        found = _bytes(comm.from_first(_note(text, num)))
    decoded: T = json.loads(found)
    return decoded


def _note(text: bytes, num_bytes: int) -> Tensor:
    """uint8 [num_bytes]: the text, cut or filled up with zeros."""
    return torch.frombuffer(bytearray(text[:num_bytes].ljust(num_bytes, b"\0")), dtype=torch.uint8)


def _bytes(note: Tensor) -> bytes:
    return bytes(note.tolist())


def sum_gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's all-reduce without its division: the losses are shares of the global mean already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
