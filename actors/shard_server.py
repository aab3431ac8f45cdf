"""Server of a shard's process: an ExpertShard behind one method. Everything it knows how to do is in trinity/experts/."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch

from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import Address
from actors.dataplane.frames import FrameLimits
from actors.dataplane.plane import DataPlane
from actors.dataplane.ray_transport import Locator, RayTransport, pack, unpack
from actors.dataplane.server import Combiner, DirectServer
from actors.names import Handles, PlacementClient
from actors.sync import shm_folders
from trinity.checkpoint import open_checkpoint
from trinity.config import PlacementConfig
from trinity.errors import TrinityError
from trinity.experts.migration import migrate_in
from trinity.experts.shard import ExpertShard
from trinity.experts.spec import ShardSpec
from trinity.pool.ledger import Decision
from trinity.rpc.messages import Copy, Load, Prepare, Recover, StepReport, arrived
from trinity.state.versioned_store import Store
from trinity.utils.hugepages import keep_freed_memory
from trinity.utils.niceness import IDLE, LowPriorityExecutor
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
ROWS = frozenset({"infer", "backward", "fetch"})
STEP = frozenset({"prepare", "stage", "commit", "abort", "recover"})
LONG = STEP | {"load", "save", "copy", "adapt"}
VERBS = ROWS | LONG | {"status", "progress", "prune_to", "forget"}
SERVICE_TIMEOUT_S = 60.0
PEER_S = 5.0  # for another shard to say where it listens


class ShardServer:
    """Owns one shard, and the sockets its callers' rows come through. The pool's placement service knows what a shard that
    started again should hold and load."""

    def __init__(self, spec: ShardSpec, plane: DataPlane, settings: PlacementConfig, namespace: str):
        torch.set_num_threads(plane.num_threads)
        begin = partial(torch.set_num_threads, plane.num_threads)
        # two: rows of the next step may take up all threads of one while they wait for a commit in the other
        self.patient, rows = (LowPriorityExecutor(settings.niceness, begin) for _ in range(2))
        if spec.optim is not None:
            keep_freed_memory()
        self.pool, self.namespace, self.secret = settings.pool, namespace, plane.secret
        self.service = PlacementClient(self.pool, namespace, SERVICE_TIMEOUT_S)
        again = ray.get_runtime_context().was_current_actor_reconstructed
        if again:
            spec = replace(spec, experts=self.service.ask("experts_of", spec.name))
        self.shard = ExpertShard(spec, _store(spec, settings, namespace, again))
        self.combiner = Combiner(self.shard, rows, LowPriorityExecutor(IDLE, begin))
        if again:
            self._recover()
        self.server = self._listen(spec, plane)

    def _listen(self, spec: ShardSpec, plane: DataPlane) -> DirectServer:
        limits = FrameLimits(spec.model.hidden_size, spec.model.num_experts, spec.dtype)
        host = ray.util.get_node_ip_address() if plane.host == "node" else plane.host
        layers = self.shard.compute_natively() if plane.num_threads == 1 else None  # its threads compute alone
        how = plane.num_threads, spec.device, plane.is_sealed, layers and layers.service
        return DirectServer(self.combiner, limits, plane.secret, host, *how)

    def _recover(self) -> None:
        """Take up, after a restart, the state that was decided on last, from memory that outlived the process, or else from the
        pool's source, where that is of the same version.

        An error here would end the actor for good; without weights it says so to every caller, and can still load."""
        decision, source = self.service.ask("decided"), self.service.source()
        if decision is not None:
            self.shard.recover(Recover(decision.version, decision.notes.get("attempt"), decision.line))
        if self.shard.version < 0 and source is not None:
            error = tried(partial(self._load, source, decision), TrinityError)
            if error is not None:
                log.error("shard %s started again and cannot load: %s", self.shard.spec.name, error, exc_info=error)

    def _load(self, source: Load, decision: Decision | None) -> None:
        if _is_of(source, decision):
            self.shard.load(source)

    def handle(self, verb: str, message: Any) -> Any:
        """Run a verb; -> its packed answer, or the TrinityError it raised."""
        assert verb in VERBS, verb
        call = arrived(unpack(message))
        if verb in ROWS:
            return pack(self.combiner.run(call))
        return self.patient.run(self._obey, verb, call) if verb in LONG else self._obey(verb, call)

    def _obey(self, verb: str, call: Any) -> Any:
        if isinstance(call, Copy):
            return tried(partial(self._copy, call), TrinityError)
        if isinstance(call, Prepare) and call.shared:
            return tried(partial(self._prepare, call), TrinityError)
        return pack(tried(partial(getattr(self.shard, verb), call), TrinityError))

    def _prepare(self, call: Prepare) -> StepReport:
        with self._peers() as peers:
            self.shard.peers = peers
            return self.shard.prepare(call)

    @contextmanager
    def _peers(self) -> Iterator[DirectTransport]:
        """Connections of its own for each change or step: they are few, and other shards may be gone by the next. Nobody waits
        here for one that starts again: who asked us comes back, and may ask another way by then."""
        handles = Handles(self.pool, self.namespace)
        control = RayTransport(handles, SERVICE_TIMEOUT_S, SERVICE_TIMEOUT_S)
        peers = DirectTransport(control, Locator(handles, PEER_S), self.secret)
        try:
            yield peers
        finally:
            peers.close()

    def _copy(self, call: Copy) -> int:
        with self._peers() as peers:
            needs_source = "" in call.sources or len({*self.shard.spec.pool_dtypes}) > 1
            return migrate_in(self.shard, call, peers, self.service.source() if needs_source else None)

    def address(self) -> Address:
        """The address where rows are taken directly."""
        return self.server.address

    def where(self) -> tuple[str, int]:
        """-> (node id, process id)."""
        return ray.get_runtime_context().get_node_id(), os.getpid()


def _is_of(source: Load, decision: Decision | None) -> bool:
    """Say whether the pool's source has the weights that were decided on last."""
    if decision is None or decision.notes.get("is_source"):
        return True
    return source.checkpoint is not None and open_checkpoint(source.checkpoint).version == decision.version


def _store(spec: ShardSpec, settings: PlacementConfig, namespace: str, again: bool) -> Store:
    """Store in memory that outlives us, for what only training can make again; what a shard of that name left behind
    counts only for its successor."""
    folder = shm_folders.folder(settings, namespace, spec.name) if spec.optim is not None else None
    if folder is not None and not again:
        shutil.rmtree(folder, ignore_errors=True)
    return Store(folder, spec.device)
