"""`trinity placement show|rm`: the pools of a running cluster, and the end of one."""

import argparse

from trinity.config import ClusterConfig, PlacementConfig, setup_environment
from trinity.errors import ConfigError


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    cluster = ClusterConfig(address=arguments.address, auth=arguments.auth)
    setup_environment(cluster.auth, is_local=False)
    from actors import pool as pools
    from actors.cluster import joined

    with joined(cluster):
        found = pools.names(cluster.namespace)
        if arguments.pool and arguments.pool not in found:
            raise ConfigError(f"there is no pool {arguments.pool!r}; there are: {', '.join(found) or 'none'}")
        if arguments.action == "rm":
            if not arguments.pool:
                raise ConfigError(f"name the pool to end; there are: {', '.join(found) or 'none'}")
            pools.destroy(arguments.pool, cluster.namespace)
            return 0
        for name in [arguments.pool] if arguments.pool else found:
            show(pools.connect(PlacementConfig(pool=name), cluster.namespace))
    return 0


def show(pool) -> None:
    print(f"pool {pool.name}, epoch {pool.table.epoch}, weights from {pool.source()}")
    print(f"  {'shard':<12} {'version':>8} {'experts':>8} {'MiB':>8} {'rows':>12}  backend")
    for shard in pool.status():
        rows = sum(count for experts in shard.rows.values() for count in experts.values())
        size = shard.weight_bytes / 2**20
        where = f"{shard.backend} on {shard.device}"
        print(f"  {shard.shard:<12} {shard.version:>8} {shard.num_experts:>8} {size:>8.1f} {rows:>12,}  {where}")
