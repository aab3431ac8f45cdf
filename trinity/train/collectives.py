"""How the workers of one training job agree: alone, or over torch.distributed.

The backbone's gradients are summed, never averaged: the losses of workers and micro-batches are shares of the global mean
already.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Comm(Protocol):
    """How the workers of one job agree. Every method is called by all of them in the same order."""

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


def sum_gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's all-reduce without its division: the losses are shares of the global mean already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
