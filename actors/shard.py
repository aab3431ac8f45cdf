"""The shard actor: an ExpertShard behind one method. Everything it knows how to do is in trinity/experts/shard.py."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.frames import Limits
from actors.listener import Combiner, DirectServer
from actors.transport import pack, unpack
from actors.wire import Address
from trinity.errors import TrinityError
from trinity.experts.shard import DTYPES, ExpertShard, ShardSpec
from trinity.memory import keep_freed_memory
from trinity.messages import Backward, Forward, Load

log = logging.getLogger(__name__)
VERBS = frozenset({"infer", "backward", "prepare", "commit", "abort", "load", "save", "status"})


@dataclass(frozen=True)
class DataPlane:
    """How a shard takes rows: where it listens, who may send, how many threads compute."""

    host: str
    secret: bytes
    num_threads: int


class ShardServer:
    """Owns one shard, and the sockets its callers' rows come through. `placement` names the placement service, which knows
    what a restarted shard should load."""

    def __init__(self, spec: ShardSpec, plane: DataPlane, placement: str, namespace: str):
        torch.set_num_threads(plane.num_threads)
        if spec.optim is not None:
            keep_freed_memory()
        self.shard = ExpertShard(spec)
        self.combiner = Combiner(self.shard)
        self.server = self._listen(spec, plane)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            source = ray.get(ray.get_actor(placement, namespace=namespace).source.remote())
            if source is not None:
                self._reload(source)

    def _listen(self, spec: ShardSpec, plane: DataPlane) -> DirectServer:
        limits = Limits(spec.model.hidden_size, spec.model.num_experts, DTYPES[spec.model.dtype])
        host = ray.util.get_node_ip_address() if plane.host == "node" else plane.host
        return DirectServer(self.combiner, limits, plane.secret, host, plane.num_threads, spec.device)

    def _reload(self, source: Load) -> None:
        """An error here would end the actor for good; without weights it says so to every caller, and can still load."""
        try:
            self.shard.load(source)
        except TrinityError:
            log.exception("shard %s started again and cannot load %s", self.shard.spec.name, source.checkpoint)

    def handle(self, verb: str, message: Any) -> Any:
        """Run a verb; -> its packed answer, or the TrinityError it raised."""
        assert verb in VERBS, verb
        call = unpack(message)
        if isinstance(call, Forward | Backward):
            return pack(self.combiner.run(call))
        try:
            with self.combiner.lock:
                return pack(getattr(self.shard, verb)(call))
        except TrinityError as error:
            return error

    def address(self) -> Address:
        """Where rows are taken directly."""
        return self.server.address

    def where(self) -> tuple[str, int]:
        """-> (node id, process id)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


ShardActor = ray.remote(max_restarts=-1, max_task_retries=0)(ShardServer)
