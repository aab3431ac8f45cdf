"""How a shard takes up experts that others hold: it fetches their rows, one expert at a time, and adopts a layer's together."""

import time
from typing import Any, Protocol

from torch import Tensor

from trinity.errors import StepConflict
from trinity.experts.shard import ExpertShard
from trinity.rpc.messages import WEIGHT, Copy, Fetch, Install, Load


class Peers(Protocol):
    """What the dispatcher calls a Transport."""

    def send(self, shard: str, verb: str, message: Any) -> Any: ...


def migrate_in(shard: ExpertShard, message: Copy, peers: Peers, source: Load | None) -> int:
    """-> bytes fetched. The shard goes on computing meanwhile, but for the moment of adopting.

    Raises what the peers raise, and StepConflict when they or this shard are not at the message's version: then nothing has
    been adopted.
    """
    held = shard.holds(message.version, message.layer)
    new = [pair for pair in zip(message.experts, message.sources, strict=True) if pair[0] not in held]
    rows = {
        kind: tuple(_rows(shard, message, *pair, kind, peers, source) for pair in new)
        for kind in shard.kinds(message.version)
    }
    names = tuple(expert for expert, _ in new)
    shard.install(Install(message.layer, names, message.version, rows, message.num_updates, message.epoch))
    return sum(found.nbytes for kind in rows.values() for found in kind)


def _rows(
    shard: ExpertShard, message: Copy, expert: int, origin: str, kind: str, peers: Peers, source: Load | None
) -> Tensor:
    if origin:
        call = Fetch(message.layer, expert, message.version, min(message.deadline_s, time.time() + 60.0), kind)
        return peers.send(origin, "fetch", call).result()
    if source is None or kind != WEIGHT or message.version < shard.version:
        raise StepConflict(
            f"expert ({message.layer}, {expert}) is on no shard, and its {kind} in no checkpoint of this version; go back "
            "to the last checkpoint"
        )
    return shard.from_source(message.layer, expert, source)
