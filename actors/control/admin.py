"""Operations on a pool of this cluster: look, wait for news, scale, replicate, drain, rebalance."""

from typing import Any

from actors.names import PlacementClient
from trinity.config import AdapterSet, PlacementConfig
from trinity.placement.snapshot import Snapshot

SLACK_S = 10.0


class PlacementOperator:
    """A pool's placement service, seen from any process of the cluster. Stateless. Raises TrinityErrors.

    What is asked for is persisted and answered at once, with the epoch of that moment; the change follows on its own.
    """

    def __init__(self, pool: str, namespace: str, timeout_s: float):
        self.pool, self.namespace, self.timeout_s = pool, namespace, timeout_s

    def snapshot(self) -> Snapshot:
        return self._ask("snapshot")

    def wait(self, epoch: int, timeout_s: float) -> Snapshot:
        """Returns when the table is newer than `epoch`, or the time is up."""
        return self._ask("wait", epoch, timeout_s, timeout_s=timeout_s + SLACK_S)

    def scale(self, num_shards: int, reason: str) -> int:
        return self._ask("scale", num_shards, reason)

    def replicate(self, layer: int, expert: int, num_replicas: int) -> int:
        return self._ask("replicate", layer, expert, num_replicas)

    def drain(self, shard: str) -> int:
        """Move everything off that shard, then end it."""
        return self._ask("drain", shard)

    def rebalance(self) -> int:
        """Plan now, whatever the schedule says."""
        return self._ask("rebalance")

    def load_adapter(self, name: str, source: str, timeout_s: float) -> AdapterSet:
        """Serve the adapter in that folder, or of that name on the Hub, beside the weights."""
        return self._ask("add_adapter", name, source, timeout_s=timeout_s)

    def unload_adapter(self, name: str) -> AdapterSet:
        return self._ask("remove_adapter", name)

    def _ask(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        service = PlacementClient(self.pool, self.namespace, self.timeout_s)
        return service.ask(method, *arguments, timeout_s=timeout_s)


def operator(settings: PlacementConfig, namespace: str) -> PlacementOperator:
    return PlacementOperator(settings.pool, namespace, settings.call_timeout_s)
