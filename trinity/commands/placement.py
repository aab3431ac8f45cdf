"""`trinity placement ...`: see the pools of a running cluster, and move their experts.

Through Ray, in a cluster that this machine can join, or through a server's gRPC with the admin key: both give an operator of
the same few methods.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trinity.config import ClusterConfig, PlacementConfig, setup_environment
from trinity.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from trinity.placement.snapshot import ChangeView, Snapshot

REFRESH_S = 2.0
DONE_S = 3600.0
FINAL = ("done", "rolled back")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    act = {"show": _show, "plan": _plan, "watch": _watch, "rm": _remove}.get(arguments.action, _change)
    act(arguments)
    return 0


@contextmanager
def cluster_of(arguments: argparse.Namespace) -> Iterator[ClusterConfig]:
    """Joined to the Ray cluster inside the block."""
    cluster = ClusterConfig(address=arguments.address, auth=arguments.auth)
    setup_environment(cluster.auth, is_local=False)
    from actors.cluster import joined

    with joined(cluster):
        yield cluster


@contextmanager
def operators(arguments: argparse.Namespace) -> Iterator[list[Any]]:
    """Operators of the pool that is named, or of all. Raises ConfigError where there is none of that name."""
    if arguments.server:
        from serving.grpc.operator_client import connect

        with connect(arguments.server) as found:
            yield [found]
        return
    with cluster_of(arguments) as cluster:
        from actors import pool as pools
        from actors.control.admin import operator

        names = _named(arguments.pool, pools.names(cluster.namespace))
        yield [operator(PlacementConfig(pool=name), cluster.namespace) for name in names]


def _named(wanted: str | None, found: list[str]) -> list[str]:
    if wanted and wanted not in found:
        raise ConfigError(f"there is no pool {wanted!r}; there are: {', '.join(found) or 'none'}")
    return [wanted] if wanted else found


@contextmanager
def the_operator(arguments: argparse.Namespace) -> Iterator[Any]:
    with operators(arguments) as found:
        if len(found) != 1:
            raise ConfigError(f"there are {len(found)} pools; name one with --pool")
        yield found[0]


def _remove(arguments: argparse.Namespace) -> None:
    with cluster_of(arguments) as cluster:
        from actors import pool as pools

        for name in _named(arguments.pool, pools.names(cluster.namespace)):
            pools.destroy(name, cluster.namespace)


def _show(arguments: argparse.Namespace) -> None:
    with operators(arguments) as found:
        for operator in found:
            show(operator.snapshot())


def show(snapshot: "Snapshot") -> None:
    table = snapshot.table
    held = table.num_replicas_LE
    most = f"at most {int(held.max(initial=0))} of one expert"
    print(
        f"pool {snapshot.pool}, epoch {table.epoch}, {int(held.sum())} replicas, {most}, max/mean {snapshot.imbalance:.2f}"
    )
    shards, nodes = snapshot.survives
    if shards < 0:
        print("  some experts are on no shard that answers now: their rows wait")
    else:
        print(f"  no expert is lost with any {shards} of the shards, nor with any {nodes} of their nodes")
    print(
        f"  {'shard':<12} {'state':<9} {'version':>8} {'experts':>8} {'as':>8} {'by':>12} {'MiB':>8} {'rows/s':>10}  node"
    )
    for shard in snapshot.shards:
        size = shard.weight_bytes / 2**20
        has = f"{shard.version:>8} {shard.num_replicas:>8} {shard.expert_dtype:>8} {shard.kernels:>12}"
        numbers = f"{has} {size:>8.1f} {shard.rows_per_s:>10,.0f}"
        print(f"  {shard.name:<12} {shard.state:<9} {numbers}  {shard.host[:12]}")
    for change in snapshot.changes[:5]:
        print("  " + told(change))


def told(change: "ChangeView") -> str:
    when = time.strftime("%H:%M:%S", time.localtime(change.started_s))
    size = f"{change.copied_bytes / 2**20:.1f} MiB"
    return (
        f"{when} epoch {change.epoch} ({change.reason}): {change.num_copies} copies, {change.num_drops} drops, {size}, "
        f"{change.phase} after {change.seconds:.2f} s"
    )


def _plan(arguments: argparse.Namespace) -> None:
    """Apply the reconciler's own rules, on the load it sees now."""
    import numpy as np

    from trinity.placement.planner import balance, moves, plan, with_floor
    from trinity.placement.topology import Shard, Topology

    with the_operator(arguments) as operator:
        snapshot = operator.snapshot()
    table, load_LE = snapshot.table, with_floor(np.array(snapshot.load_LE))
    names = list(table.shards)[: arguments.shards]
    names += [f"new-{i}" for i in range((arguments.shards or 0) - len(names))]
    shards = [
        Shard(name, slots=table.num_experts, draining=name not in names)
        for name in dict.fromkeys((*table.shards, *names))
    ]
    replicas_LE = np.minimum(table.num_replicas_LE, len(names))
    found = plan(load_LE, Topology(tuple(shards)), table, replicas_LE=replicas_LE)
    todo = moves(table, found)
    for what, each in (("now", table), ("then", found)):
        seen = balance(load_LE, each)
        print(f"{what:<5} {len(each.shards)} shards, balance {seen.overall:.3f} (worst layer {seen.worst:.3f})")
    print(f"{len(todo.copies)} of {todo.num_replicas} replicas would be copied")


def _change(arguments: argparse.Namespace) -> None:
    with the_operator(arguments) as operator:
        if arguments.action == "scale":
            epoch = operator.scale(arguments.num_shards, "scale")
        elif arguments.action == "drain":
            epoch = operator.drain(arguments.shard)
        elif arguments.action == "replicate":
            epoch = operator.replicate(arguments.layer, arguments.expert, arguments.num_replicas)
        else:
            epoch = operator.rebalance()
        if arguments.no_wait:
            print(f"asked for at epoch {epoch}")
        else:
            _await(operator, epoch)


def _await(operator: Any, epoch: int) -> None:
    """Wait until the change that follows `epoch` is over, or there is nothing to change."""
    deadline_s, quiet = time.monotonic() + DONE_S, 0
    while time.monotonic() < deadline_s:
        snapshot = operator.wait(epoch, REFRESH_S)
        change = next((each for each in snapshot.changes if each.epoch > epoch), None)
        if change is not None and change.phase in FINAL:
            show(snapshot)
            if change.phase != "done":
                raise Unavailable("the change was rolled back; the service tries again, and its log says why")
            return
        quiet = 0 if change else quiet + 1
        if quiet > 2:
            print("nothing to change")
            return
    raise Unavailable(f"the change is not done after {DONE_S:.0f} s; `trinity placement show` says how far it is")


def _watch(arguments: argparse.Namespace) -> None:
    with the_operator(arguments) as operator:
        epoch, last = 0, ["", ""]
        while True:
            snapshot = operator.wait(epoch, REFRESH_S)
            epoch = snapshot.table.epoch
            busy = ", ".join(f"{shard.name} {shard.rows_per_s:,.0f}" for shard in snapshot.shards)
            latest = told(snapshot.changes[0]) if snapshot.changes else ""
            lines = [latest, f"epoch {epoch}, max/mean {snapshot.imbalance:.2f}, rows/s: {busy}"]
            for line in (line for line, before in zip(lines, last, strict=True) if line not in ("", before)):
                print(line, flush=True)
            last = lines
