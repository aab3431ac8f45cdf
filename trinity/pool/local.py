"""Shards in this process, and what the shards of any pool are made from."""

from collections.abc import Sequence

from trinity.config import ModelConfig, OptimConfig, PlacementConfig
from trinity.dispatch.transport import LocalTransport
from trinity.dispatch.view import StaticView
from trinity.experts.shard import ExpertShard, ShardSpec
from trinity.placement.table import PlacementTable
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Load


def shard_specs(
    table: PlacementTable, model: ModelConfig, optim: OptimConfig | None, settings: PlacementConfig, device: str
) -> list[ShardSpec]:
    """Specifications of the table's shards."""
    return [
        ShardSpec(
            name=shard,
            model=model,
            experts=table.experts_of(shard),
            optim=optim,
            backend=settings.backend,
            device=device,
            activation_cache_bytes=settings.activation_cache_bytes,
            ordered_gradients=settings.ordered_gradients,
            expert_dtype=settings.expert_dtype_of(shard),
            pool_dtypes=settings.expert_dtype,
        )
        for shard in table.shards
    ]


def shard_names(num_shards: int) -> tuple[str, ...]:
    return tuple(f"shard-{i}" for i in range(num_shards))


def local_pool(
    model: ModelConfig,
    load: Load,
    *,
    num_shards: int = 1,
    optim: OptimConfig | None = None,
    backend: str = "auto",
    device: str = "cpu",
    expert_dtype: str | Sequence[str] | None = None,
    timeout_s: float = 3600.0,
) -> ExpertPool:
    """A pool whose shards live in this process, with their weights loaded. `optim` None: it will not train."""
    table = PlacementTable.spread(model.moe_layers, model.num_experts, shard_names(num_shards))
    settings = PlacementConfig(backend=backend, expert_dtype=expert_dtype)  # type: ignore[arg-type]
    shards = {spec.name: ExpertShard(spec) for spec in shard_specs(table, model, optim, settings, device)}
    pool = ExpertPool(StaticView(table), LocalTransport(shards), timeout_s, expert_dtypes=settings.expert_dtype)
    for shard in shards.values():
        shard.peers = pool.transport
    pool.load(load)
    return pool
