"""The transport that always works: verbs as Ray actor calls, tensors as numpy views (a pickled torch tensor costs 20x).

Decisions: one method on the actor, `handle(verb, message)`; a typed error comes back as a value, so that it is itself on
the other side; whatever Ray says about a dead or restarting actor becomes Unavailable (it may or may not have been
applied), and the caller sends the same op again.
"""

import dataclasses
import math
import time
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from actors.dataplane.connection import Address
from actors.names import Handles, ask, translate_ray_errors
from trinity.dispatch.transport import Done, Reply
from trinity.errors import DeadlineExceeded, TrinityError, Unavailable
from trinity.rpc.messages import departing
from trinity.utils.trying import tried


@dataclasses.dataclass(frozen=True)
class Array:
    """A tensor on the wire. numpy has no bf16: its bits travel as uint16."""

    data: np.ndarray
    is_bf16: bool


def pack(value: Any) -> Any:
    """Tensors inside messages, tuples and lists -> Array; everything else as it is."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        is_bf16 = plain.dtype == torch.bfloat16
        return Array((plain.view(torch.uint16) if is_bf16 else plain).numpy(), is_bf16)
    return _map(pack, value)


def unpack(value: Any) -> Any:
    """The inverse of `pack`. Copies: what Ray hands out is read-only, may be pinned in its object store, and lies at
    addresses for which matrix products may round differently than for torch's own."""
    if isinstance(value, Array):
        dtype = torch.uint16 if value.is_bf16 else getattr(torch, value.data.dtype.name)
        tensor = torch.empty(value.data.shape, dtype=dtype)
        tensor.numpy()[...] = value.data
        return tensor.view(torch.bfloat16) if value.is_bf16 else tensor
    return _map(unpack, value)


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(function(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: function(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


class RayReply:
    def __init__(self, ref: Any, shard: str, verb: str, deadline_s: float):
        self.ref, self.shard, self.verb, self.deadline_s = ref, shard, verb, deadline_s

    def result(self) -> Any:
        """Raises DeadlineExceeded when the time is up, Unavailable when the shard's process is away."""
        with translate_ray_errors(f"shard {self.shard}", f"{self.verb!r} in time"):
            answer = ray.get(self.ref, timeout=max(0.0, self.deadline_s - time.monotonic()))
        if isinstance(answer, TrinityError):
            raise answer
        return unpack(answer)


class RayTransport:
    """`shards`: actor handles by shard name. Loading and saving may take longer than the other verbs."""

    def __init__(self, shards: dict[str, Any], timeout_s: float, checkpoint_timeout_s: float):
        self.shards, self.timeout_s, self.checkpoint_timeout_s = shards, timeout_s, checkpoint_timeout_s

    def send(self, shard: str, verb: str, message: Any) -> Reply:
        timeout_s = self.checkpoint_timeout_s if verb in ("load", "save") else self.timeout_s
        deadline_s = getattr(message, "deadline_s", time.monotonic() + timeout_s)
        actor = tried(partial(self.shards.__getitem__, shard), Unavailable)
        if isinstance(actor, Unavailable):  # it has been ended
            return Done(error=actor)
        return RayReply(actor.handle.remote(verb, pack(departing(message))), shard, verb, deadline_s)


class Locator:
    """Asks a shard for its address: while it starts again, this waits, up to `within_s`. Who asks again after a deadline waits
    for the same answer. For one caller thread."""

    def __init__(self, shards: Handles, within_s: float = math.inf):
        self._shards, self._within_s, self._asked = shards, within_s, dict[str, Any]()

    def __call__(self, shard: str, deadline_s: float) -> Address:
        """Raises Unavailable, DeadlineExceeded."""
        ref = self._asked.pop(shard, None) or self._shards[shard].address.remote()
        try:
            return ask(ref, max(0.0, min(deadline_s - time.monotonic(), self._within_s)), f"shard {shard}")
        except DeadlineExceeded:
            self._asked[shard] = ref
            raise
