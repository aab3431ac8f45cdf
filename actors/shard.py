"""The shard actor: an ExpertShard behind one method. Everything it knows how to do is in trinity/experts/shard.py."""

import logging
import os
from typing import Any

import ray
import torch

from actors.transport import pack, unpack
from trinity.errors import TrinityError
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.messages import Load

log = logging.getLogger(__name__)
VERBS = frozenset({"infer", "backward", "prepare", "commit", "abort", "load", "save", "status"})


class ShardServer:
    """Owns one shard. `placement` names the placement service, which knows what a restarted shard should load."""

    def __init__(self, spec: ShardSpec, num_threads: int, placement: str, namespace: str):
        torch.set_num_threads(num_threads)
        self.shard = ExpertShard(spec)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            source = ray.get(ray.get_actor(placement, namespace=namespace).source.remote())
            if source is not None:
                self._reload(source)

    def _reload(self, source: Load) -> None:
        """An error here would end the actor for good; without weights it says so to every caller, and can still load."""
        try:
            self.shard.load(source)
        except TrinityError:
            log.exception("shard %s started again and cannot load %s", self.shard.spec.name, source.checkpoint)

    def handle(self, verb: str, message: Any) -> Any:
        """Run a verb; -> its packed answer, or the TrinityError it raised."""
        assert verb in VERBS, verb
        try:
            return pack(getattr(self.shard, verb)(unpack(message)))
        except TrinityError as error:
            return error

    def where(self) -> tuple[str, int]:
        """-> (node id, process id)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


ShardActor = ray.remote(max_restarts=-1, max_task_retries=0)(ShardServer)
