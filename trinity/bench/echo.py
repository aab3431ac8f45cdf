"""Shards that echo, and who calls them: the parts of `trinity bench dispatch` that need torch.

Roles (see process.py): `echo` answers rows behind a DirectServer, `shard` computes them, `caller` dispatches to a server
for the seconds it is told and says how long each call took. One thread computes in each.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from actors.dataplane import ring
from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.frames import FrameLimits
from actors.dataplane.server import Combiner, DirectServer
from trinity import native
from trinity.bench.process import say, timed
from trinity.bench.report import percentile
from trinity.config import preset
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.transport import Done, LocalTransport, Reply, Transport
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.placement.table import PlacementTable
from trinity.pool.local import shard_names
from trinity.rpc.messages import Forward, Load

LAYER, NUM_EXPERTS, TOP_K = 0, 32, 4
HOST, TIMEOUT_S = "127.0.0.1", 30.0


class Echo:
    """A shard whose experts cost nothing: what is left is the way there and back."""

    def infer(self, call: Forward) -> Tensor:
        return call.rows.x_RD


def echo_service(dim: int) -> Any:
    """The same for rings: a layer without a kernel, whose rows come back as they are."""
    service, ids_E = native.lib.ring_service(), torch.arange(NUM_EXPERTS)
    layer = native.lib.ring_layer(LAYER, 0, 0, dim, 1, 0, ids_E.data_ptr(), NUM_EXPERTS, NUM_EXPERTS)
    native.lib.ring_publish(service, [layer])
    return service


class EchoActor:
    """The echo as a Ray actor, called as ShardServer is."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.combiner = Combiner(Echo())

    def handle(self, verb: str, message: Any) -> Any:
        from actors.dataplane.ray_transport import pack, unpack  # imports ray, which the other roles do without

        return pack(self.combiner.run(unpack(message)))


class OverSockets:
    """A transport without its rings."""

    def __init__(self, transport: Transport):
        self.send = transport.send


class Recorder:
    """A transport to a shard in this process that keeps what was sent last."""

    def __init__(self, shard: Any):
        self.shard, self.sent = shard, ("", "", None)

    def send(self, shard: str, verb: str, message: Any) -> Reply:
        self.sent = (shard, verb, message)
        return Done(getattr(self.shard, verb)(message))


# -- callers


def batch(num_rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> x_TD, ids_TK, weights_TK: the same for the same sizes; weights of a token sum to 1."""
    rng = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(num_rows, NUM_EXPERTS, generator=rng).topk(TOP_K).indices
    weights_TK = torch.rand(num_rows, TOP_K, generator=rng)
    return torch.randn(num_rows, dim, generator=rng), ids_TK, weights_TK / weights_TK.sum(1, keepdim=True)


def dispatcher_of(transport: Transport, num_shards: int) -> Dispatcher:
    table = PlacementTable.spread([LAYER], NUM_EXPERTS, shard_names(num_shards))
    return Dispatcher(table, transport, timeout_s=TIMEOUT_S)


def direct_to(addresses: Sequence[Address], secret: bytes) -> DirectTransport:
    at = dict(zip(shard_names(len(addresses)), addresses, strict=True))
    return DirectTransport(LocalTransport({}), lambda shard, _: at[shard], secret)


# -- what the processes do


def echo(dim: int, secret: str) -> None:
    _serve(Echo(), dim, secret, echo_service(dim) if ring.is_possible() else None)


def shard(dim: int, secret: str) -> None:
    made = ExpertShard(shard_spec(dim))
    made.load(Load(seed=0))
    layers = made.compute_natively()
    _serve(made, dim, secret, layers and layers.service)


def shard_spec(dim: int) -> ShardSpec:
    """All experts of one layer of the preset `bench`."""
    model = preset("bench").model_copy(update=dict(hidden_size=dim, num_hidden_layers=1, num_dense_layers=0))
    return ShardSpec("shard-0", model, {LAYER: tuple(range(NUM_EXPERTS))})


def _serve(shard: Any, dim: int, secret: str, service: Any) -> None:
    torch.set_num_threads(1)
    limits = FrameLimits(dim, NUM_EXPERTS, torch.float32)
    server = DirectServer(Combiner(shard), limits, bytes.fromhex(secret), HOST, service=service)
    say(**asdict(server.address))
    sys.stdin.read()
    server.close()


def caller(address: dict[str, Any], dim: int, num_rows: int, secret: str) -> None:
    """Take orders {"seconds"}: call as fast as it goes for so long; -> calls, seconds, p50 and p99 in us."""
    torch.set_num_threads(1)
    dispatcher = dispatcher_of(direct_to([Address(**address)], bytes.fromhex(secret)), 1)
    x_TD, ids_TK, weights_TK = batch(num_rows, dim)
    call = torch.inference_mode()(lambda: dispatcher(LAYER, x_TD, ids_TK, weights_TK))
    timed(call, 20)
    say(ready=True)
    for line in sys.stdin:
        started_s, found = time.monotonic(), list[float]()
        while time.monotonic() < started_s + json.loads(line)["seconds"]:
            found += timed(call, 10)
        took_s = time.monotonic() - started_s
        say(calls=len(found), seconds=took_s, p50=percentile(found, 0.5), p99=percentile(found, 0.99))


ROLES: dict[str, Callable[..., None]] = {"echo": echo, "shard": shard, "caller": caller}
