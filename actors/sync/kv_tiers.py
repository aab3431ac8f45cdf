"""A node's KV tier, and the ways between nodes' tiers, for an engine in a Ray actor.

Decision: engines prove to one another that they know their pool's secret, as they do to its shards.
"""

from collections.abc import Callable

import ray

from actors.dataplane.peer import PeerConnection, PeerServer
from actors.names import PlacementClient
from actors.sync import shm_folders
from trinity.config import Config
from trinity.engine.engine import Engine
from trinity.engine.handoff import Handoff
from trinity.engine.kv_exchange import MOST_ASKED_BYTES
from trinity.engine.kv_tier import TierPlace
from trinity.utils.disk import shared_memory


def tier_of(config: Config, line: Callable[[int], str | None]) -> TierPlace | None:
    """The tier of this node's engines, if they have one; what gone servers have left is removed in any case. `line`: as in
    TierPlace. Raises ConfigError where something else is in its place."""
    if not (num_bytes := config.engine.tier_bytes):
        shm_folders.sweep(shared_memory(config.placement.memory_dir))
        return None
    return TierPlace(shm_folders.cache_folder(config.placement, config.cluster.namespace), num_bytes, line)


def handoff_of(config: Config, engine: Engine) -> Handoff | None:
    """The engine's way to hand prompts over and take them, where it has a tier."""
    settings, tier = config.placement, engine.prefixes.tier
    if tier is None:
        return None
    secret = PlacementClient(settings.pool, config.cluster.namespace, settings.call_timeout_s).secret()

    def connect(address: str, until_s: float) -> PeerConnection:
        return PeerConnection(address, secret, until_s)

    handoff = Handoff(ray.get_runtime_context().get_node_id(), tier, connect)
    host = ray.util.get_node_ip_address() if settings.data_host == "node" else settings.data_host
    handoff.listen(PeerServer(handoff.answer, MOST_ASKED_BYTES, secret, host, settings.data_tls))
    return handoff
