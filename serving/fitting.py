"""Memory of a server's engines, checked and shared out before anything is started or read.

Decisions: where one machine has all of it (cluster.address local, no GPU), the command chooses for all engines: they have the
same numbers, and one that starts again has them, too. Elsewhere each engine looks at the node it comes to, before it reads its
weights; what contradicts itself is refused here in any case. Training's memory is an estimate.
"""

from trinity.config import Config
from trinity.engine.kv_layout import BlockSizes
from trinity.engine.kv_segment import check_room, num_slots
from trinity.engine.memory import UNBOUNDED, Memory, memory_of, plan_memory
from trinity.models.registry import weight_bytes
from trinity.utils.disk import shared_memory
from trinity.utils.terminal import say

PROCESS_BYTES = 320 << 20  # of a process with torch and Ray in it, beside its weights
NUM_OTHERS = 4  # Ray's own, the gateway, the controller, the placement service
TRAINED_BACKBONE = 34  # bytes a parameter: gradient, and weight and optimizer state of two versions


def num_sharing(config: Config) -> int:
    """Engines that share the memory of one device: all of them on a CPU, those that fit on a GPU."""
    if config.engine.num_gpus:
        return max(1, int(1 / config.engine.num_gpus))
    return config.engine.max_replicas or config.engine.replicas


def fitted(config: Config) -> Config:
    """The settings, with the memory of engines chosen where it is this machine's. Raises ConfigError for what cannot fit."""
    _check_tier(config)
    is_here = config.cluster.address == "local" and not config.engine.num_gpus
    memory = _memory_here(config) if is_here else UNBOUNDED
    plan = plan_memory(config.model, config.engine, config.model.itemsize, memory)
    if not is_here:
        return config
    say(plan.line)
    return config.model_copy(update={"engine": plan.fixed(config.engine)})


def _check_tier(config: Config) -> None:
    """Refuse a tier without a block of each kind, or one that this machine, if it is to be here, has no room for."""
    if not (num_bytes := config.engine.tier_bytes):
        return
    sizes = BlockSizes.of(config.model, config.engine, config.model.itemsize)
    num_slots(tuple(sizes.block_bytes.values()), num_bytes)
    folder = shared_memory(config.placement.memory_dir)
    if config.cluster.address == "local" and folder.is_dir():
        check_room(folder, num_bytes)


def _memory_here(config: Config) -> Memory:
    """Memory of this machine, with what its shards, engines and workers are going to load."""
    from trinity.pool.memory import experts_bytes  # torch comes with it

    backbone, served = (weight_bytes(config.model, dtype)[0] for dtype in ("auto", config.engine.weight_dtype))
    num_engines, placed = num_sharing(config), config.placement
    experts = experts_bytes(config.model, config.optim if config.serve.is_of_run else None, placed.expert_dtype)
    copies = 0 if placed.num_gpus_per_shard else min(placed.num_shards, 1 + placed.redundancy)
    workers = config.train.num_workers if config.serve.is_of_run else 0
    weights = copies * experts.values + num_engines * served + workers * backbone
    others = (num_engines + placed.num_shards + workers + NUM_OTHERS) * PROCESS_BYTES + config.engine.tier_bytes
    if config.serve.is_of_run:
        others += copies * experts.training + TRAINED_BACKBONE * workers * backbone // config.model.itemsize
    return memory_of("cpu", weights=weights, others=others, num_engines=num_engines)
