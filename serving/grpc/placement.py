"""`trinity.v1.Placement`: what operators see and ask of the pool behind this server.

Decisions: snapshots go out in columns, because building a message for each of a large model's experts would stall every
stream of tokens for tens of milliseconds. Each change that is asked for is logged with its words, never with the key.
"""

import logging
from collections.abc import Callable
from contextlib import aclosing

import numpy as np

from protos.trinity.v1 import placement_pb2 as pb
from protos.trinity.v1 import placement_pb2_grpc as rpc
from serving.frontend import Frontend
from serving.grpc.guard import Context
from serving.pool_operator import Operator
from trinity.errors import InvalidRequest
from trinity.placement.snapshot import Snapshot

log = logging.getLogger("trinity.serving")
MAX_REASON = 200
EVERY_S, SHORTEST_S, LONGEST_S = 5.0, 1.0, 60.0


class PlacementServicer(rpc.PlacementServicer):
    """Over the Frontend's Placement, which raises what these methods answer with."""

    def __init__(self, front: Frontend):
        self.front = front

    async def GetPlacement(self, request: pb.GetPlacementRequest, context: Context) -> pb.GetPlacementResponse:
        found = await self.front.placement.ask(lambda operator: operator.snapshot(), context.time_remaining())
        return pb.GetPlacementResponse(snapshot=to_message(found))

    async def WatchPlacement(self, request: pb.WatchPlacementRequest, context: Context) -> None:
        every_s = request.every_s if request.HasField("every_s") else EVERY_S
        if not SHORTEST_S <= every_s <= LONGEST_S:
            raise InvalidRequest(f"every_s is {every_s:g}; take {SHORTEST_S:g} to {LONGEST_S:g}", param="every_s")
        async with aclosing(self.front.placement.watch(every_s)) as snapshots:
            async for snapshot in snapshots:
                await context.write(pb.WatchPlacementResponse(snapshot=to_message(snapshot)))

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        num_shards, reason = at_least_one(request.num_shards, "num_shards"), request.reason or "scale"
        if len(reason) > MAX_REASON or not reason.isprintable():
            raise InvalidRequest(f"the reason is one line of at most {MAX_REASON} characters", param="reason")
        asked = f"scale to {num_shards} shards: {reason}"
        return pb.ScaleResponse(epoch=await self._change(asked, lambda op: op.scale(num_shards, reason), context))

    async def Replicate(self, request: pb.ReplicateRequest, context: Context) -> pb.ReplicateResponse:
        layer, expert = request.layer, request.expert
        num_replicas = at_least_one(request.num_replicas, "num_replicas")
        asked = f"{num_replicas} replicas of expert ({layer}, {expert})"
        epoch = await self._change(asked, lambda op: op.replicate(layer, expert, num_replicas), context)
        return pb.ReplicateResponse(epoch=epoch)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        shard = request.shard
        if not shard:
            raise InvalidRequest("name the shard to drain", param="shard")
        return pb.DrainResponse(epoch=await self._change(f"drain {shard[:100]!r}", lambda op: op.drain(shard), context))

    async def Rebalance(self, request: pb.RebalanceRequest, context: Context) -> pb.RebalanceResponse:
        return pb.RebalanceResponse(epoch=await self._change("rebalance", lambda op: op.rebalance(), context))

    async def _change(self, asked: str, what: Callable[[Operator], int], context: Context) -> int:
        epoch = await self.front.placement.ask(what, context.time_remaining())
        log.info("placement at epoch %d; asked for by %s: %s", epoch, context.peer(), asked)
        return epoch


def at_least_one(number: int, param: str) -> int:
    if number < 1:
        raise InvalidRequest(f"{param} is {number}; ask for at least 1", param=param)
    return number


def to_message(snapshot: Snapshot) -> pb.Snapshot:
    table = snapshot.table
    return pb.Snapshot(
        pool=snapshot.pool,
        time_s=snapshot.time_s,
        epoch=table.epoch,
        placed_shards=table.shards,
        layers=_layers(snapshot),
        shards=[pb.Shard(**vars(shard)) for shard in snapshot.shards],
        imbalance=snapshot.imbalance,
        changes=[pb.Change(**vars(change)) for change in snapshot.changes],
        num_recoveries=snapshot.num_recoveries,
    )


def _layers(snapshot: Snapshot) -> list[pb.Layer]:
    table = snapshot.table
    counts_X, shard_R = table.flat()
    counts_LE = counts_X.reshape(len(table.layers), table.num_experts)
    ends = np.cumsum(counts_LE.sum(axis=1))[:-1]
    columns = zip(table.layers, counts_LE.tolist(), np.split(shard_R, ends), snapshot.load_LE, strict=True)
    return [
        pb.Layer(index=layer, num_replicas=counts, replica_shards=held.tolist(), rows_per_s=load)
        for layer, counts, held, load in columns
    ]
