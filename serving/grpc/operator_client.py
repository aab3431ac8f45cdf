"""An operator over gRPC: what `actors.control.admin.PlacementOperator` does, against a server instead of a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from protos.trinity.v1 import placement_pb2 as pb
from protos.trinity.v1 import placement_pb2_grpc as rpc
from serving.errors import TABLE
from trinity.config import admin_key
from trinity.errors import (
    Code,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    TrinityError,
    Unauthenticated,
    Unavailable,
)
from trinity.placement.snapshot import ChangeView, ShardView, Snapshot
from trinity.placement.table import PlacementTable

TIMEOUT_S = 30.0
MAX_MESSAGE_BYTES = 64 << 20
KINDS: dict[Code, type[TrinityError]] = {
    Code.INVALID: InvalidRequest,
    Code.UNAUTHENTICATED: Unauthenticated,
    Code.OVERLOADED: Overloaded,
    Code.UNAVAILABLE: Unavailable,
    Code.DEADLINE: DeadlineExceeded,
}


@contextmanager
def connect(address: str, key: str | None = None) -> "Iterator[RemoteOperator]":
    """An operator of the server at `host:port`, or `https://host:port` for TLS. `key`: default TRINITY_ADMIN_KEY."""
    where, options = address.removeprefix("https://"), [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    if where == address:
        channel = grpc.insecure_channel(address.removeprefix("http://"), options)
    else:
        channel = grpc.secure_channel(where, grpc.ssl_channel_credentials(), options)
    with channel:
        yield RemoteOperator(channel, key or admin_key())


class RemoteOperator:
    """Borrows its channel. Raises TrinityErrors, as the server named them."""

    def __init__(self, channel: grpc.Channel, key: str | None):
        self._stub = rpc.PlacementStub(channel)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def snapshot(self) -> Snapshot:
        return to_snapshot(self._call(self._stub.GetPlacement, pb.GetPlacementRequest()).snapshot)

    def wait(self, epoch: int, timeout_s: float) -> Snapshot:
        """Returns when the table is newer than `epoch`, or the time is up."""
        watching = self._stub.WatchPlacement(pb.WatchPlacementRequest(), timeout=timeout_s, metadata=self._metadata)
        try:
            next((answer for answer in watching if answer.snapshot.epoch > epoch), None)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise typed(error) from None
        finally:
            watching.cancel()
        return self.snapshot()

    def scale(self, num_shards: int, reason: str) -> int:
        return self._call(self._stub.Scale, pb.ScaleRequest(num_shards=num_shards, reason=reason)).epoch

    def replicate(self, layer: int, expert: int, num_replicas: int) -> int:
        request = pb.ReplicateRequest(layer=layer, expert=expert, num_replicas=num_replicas)
        return self._call(self._stub.Replicate, request).epoch

    def drain(self, shard: str) -> int:
        """Move everything off that shard, then end it."""
        return self._call(self._stub.Drain, pb.DrainRequest(shard=shard)).epoch

    def rebalance(self) -> int:
        """Plan now, whatever the schedule says."""
        return self._call(self._stub.Rebalance, pb.RebalanceRequest()).epoch

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise typed(error) from None


def typed(error: Any) -> TrinityError:
    code = next((code for code, kind in KINDS.items() if TABLE[code].grpc is error.code()), None)
    return (KINDS[code] if code else Unavailable)(f"the server says: {error.details()}")


def to_snapshot(message: pb.Snapshot) -> Snapshot:
    """The value that the server had, with loads of 32 bits."""
    layers = tuple(layer.index for layer in message.layers)
    replicas = tuple(tuple(_replicas(layer)) for layer in message.layers)
    return Snapshot(
        pool=message.pool,
        time_s=message.time_s,
        table=PlacementTable(message.epoch, tuple(message.placed_shards), layers, replicas),
        shards=tuple(ShardView(**_fields(shard)) for shard in message.shards),
        load_LE=tuple(tuple(layer.rows_per_s) for layer in message.layers),
        imbalance=message.imbalance,
        changes=tuple(ChangeView(**_fields(change)) for change in message.changes),
        num_recoveries=message.num_recoveries,
    )


def _replicas(layer: pb.Layer) -> Iterator[tuple[int, ...]]:
    first = 0
    for count in layer.num_replicas:
        yield tuple(layer.replica_shards[first : first + count])
        first += count


def _fields(message: pb.Shard | pb.Change) -> dict[str, Any]:
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
