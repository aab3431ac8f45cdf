"""The pool's shard actors, as the control loop asks, makes and ends them."""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from actors.control.spares import Spares
from actors.control.state import PoolState
from actors.dataplane.plane import DataPlane
from actors.names import Handles, ask, name_of
from actors.shard import start_shard
from trinity.config import turn_of
from trinity.errors import TrinityError
from trinity.experts.spec import ShardSpec
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import PruneTo, departing
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
RETIRE_S = 5.0
LONG, MOST_THREADS = ("load", "adapt"), 32


class Shards:
    """Stateless but for handles. Raises what the shards do, and Unavailable for those that are away."""

    def __init__(self, state: PoolState, plane: DataPlane):
        self.state, self.plane = state, plane
        self.handles = Handles(state.settings.pool, state.namespace)
        self.spares = Spares(self, state.settings.ready_timeout_s)

    def ask(self, shard: str, verb: str, message: Any) -> Any:
        """Wait for the answer."""
        settings = self.state.settings
        timeout_s = settings.checkpoint_timeout_s if verb in LONG else settings.call_timeout_s
        return ask(self.handles[shard].handle.remote(verb, departing(message)), timeout_s, f"shard {shard}")

    def ask_all(self, verb: str, message: Any) -> list[TrinityError]:
        """Tell all shards, side by side, and wait; -> what they or their absence raised."""
        with ThreadPoolExecutor(MOST_THREADS) as threads:
            asked = [partial(self.ask, shard, verb, message) for shard in self.state.table.shards]
            found = [*threads.map(lambda call: tried(call, TrinityError), asked)]
        return [each for each in found if isinstance(each, TrinityError)]

    def deadline(self, verb: str = "") -> float:
        settings = self.state.settings
        return time.monotonic() + (settings.checkpoint_timeout_s if verb in LONG else settings.call_timeout_s)

    def start(self, name: str, node: str | None = None) -> Any:
        """A new shard without experts, on that node, if it is still there; -> its handle at once: it may wait for room."""
        spec, settings = self.state.spec, self.state.settings
        made = ShardSpec(
            name,
            spec.model,
            self.state.experts_of(name),
            spec.optim,
            settings.backend,
            spec.device,
            expert_dtype=turn_of(name, spec.expert_dtype),
            pool_dtypes=spec.expert_dtype,
        )
        self.handles[name] = start_shard(made, self.plane, settings, self.state.namespace, node)
        return self.handles[name]

    def end(self, name: str) -> None:
        """End a shard. Harmless where it has ended."""
        ray.kill(self.handles.pop(name))

    def take(self, names: Iterable[str]) -> None:
        """Make spares that are there shards of the pool, which know the version of the weights."""
        self.spares.give(names)
        source = self.state.files.source()
        for name in names if source else ():
            self.ask(name, "load", source)

    def drop_leftovers(self, table: PlacementTable, names: Iterable[str]) -> None:
        """Drop what a shard still holds from before the present table: it must not pass for a copy."""
        for shard in set(names) & set(table.shards):
            self.ask(shard, "prune_to", PruneTo(table.experts_of(shard), table.epoch))

    def tidy(self, table: PlacementTable) -> None:
        """Make the shards what the table says: end those it does not name, drop what it gives to others."""
        self._end_others(table)
        refs = {
            s: self.handles[s].handle.remote("prune_to", PruneTo(table.experts_of(s), table.epoch))
            for s in table.shards
        }
        for shard, ref in refs.items():
            found = tried(partial(ask, ref, RETIRE_S, f"shard {shard}"), TrinityError, RayError)
            if isinstance(found, Exception):
                log.warning("shard %s keeps more than its own for now: %s", shard, found)

    def _end_others(self, table: PlacementTable) -> None:
        prefix = name_of(self.state.settings.pool, "shard-")
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == self.state.namespace and entry["name"].startswith(prefix):
                name = entry["name"].rsplit("/", 1)[1]
                if name not in {*table.shards, *self.spares.names}:
                    ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))
                    self.handles.pop(name, None)
