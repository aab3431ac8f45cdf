"""What is exported of a pool and of the engines' dispatch: the snapshot's numbers, each change once, sums over restarts."""

from dataclasses import replace

import pytest
from operated import metrics_of, moved, samples_of, snapshot_of

from serving.metrics import Exporter
from tests.waiting import eventually
from trinity.observability.prometheus import DISPATCH_S

pytestmark = pytest.mark.usefixtures("quick")


async def test_metrics_are_the_snapshots(operated, pool):
    shown = pool.snapshot()
    await eventually(lambda: pool.num_waits)
    found = await metrics_of(operated)
    assert found["trinity_placement_up",] == 1
    assert found["trinity_placement_epoch",] == 4
    assert found["trinity_placement_imbalance",] == pytest.approx(shown.imbalance)
    assert found["trinity_placement_replicas",] == shown.table.num_replicas_LE.sum() > 96
    assert found["trinity_placement_max_replicas",] == 2
    assert [found["trinity_placement_survives", what] for what in ("shards", "nodes")] == [0, 0]
    assert [found["trinity_placement_shards", s] for s in ("starting", "ready", "draining", "away")] == [0, 3, 0, 0]
    for shard in shown.shards:
        assert found["trinity_shard_rows_per_second", shard.name] == pytest.approx(shard.rows_per_s)
        assert found["trinity_shard_weight_bytes", shard.name] == shard.weight_bytes
    assert found["trinity_placement_change_seconds",] == 0.31
    assert found["trinity_placement_recoveries_total",] == 1


def test_what_survives_leaves_out_who_is_away():
    found = snapshot_of(num_shards=3)
    table = found.table.num_replicas_LE.shape
    both = replace(found.table, replicas=(((0, 1),) * table[1],) * table[0])
    names = [shard.name for shard in found.shards]

    def survives(hosts, states=("ready",) * 3):
        each = zip(found.shards, hosts, states, strict=True)
        shards = tuple(replace(shard, host=host, state=state) for shard, host, state in each)
        return replace(found, table=both, shards=shards).survives

    assert len(names) == 3
    assert survives("abc") == (1, 1)
    assert survives("aac") == (1, 0)
    assert survives("abc", ("ready", "away", "ready")) == (0, 0)
    assert survives("abc", ("starting", "away", "ready")) == (-1, -1)


async def test_each_change_is_counted_once_when_it_has_ended(operated, pool):
    await eventually(lambda: pool.num_waits)
    before = pool.snapshot()
    after = moved(before)
    running = replace(after, changes=(replace(after.changes[0], phase="drain", seconds=0.1), *before.changes))
    lost = replace(after.changes[0], epoch=6, started_s=before.time_s + 5, phase="rolled back", copied_bytes=10)
    for shown in (running, after, after, replace(after, changes=(lost, *after.changes), num_recoveries=3)):
        pool.show(shown)
        await eventually(lambda: operated.front.placement.latest()[0] is shown)  # noqa: B023
    found = await metrics_of(operated)
    assert found["trinity_placement_changes_total", "done"] == 1
    assert found["trinity_placement_changes_total", "rolled_back"] == 1
    assert found["trinity_placement_copies_total",] == 2
    assert found["trinity_placement_copied_bytes_total",] == (25 << 20) + 10
    assert found["trinity_placement_recoveries_total",] == 3


async def test_shards_that_have_gone_leave_the_metrics(operated, pool):
    await eventually(lambda: pool.num_waits)
    pool.show(snapshot_of(num_shards=2, epoch=5))
    await eventually(lambda: operated.front.placement.latest()[0].table.epoch == 5)
    found = await metrics_of(operated)
    assert {key[1] for key in found if key[0] == "trinity_shard_rows_per_second"} == {"shard-0", "shard-1"}


def dispatch(scale=1):
    """As an engine counts: 3 rows in the second bucket, 1 beyond the last, in all phases that it has timed."""
    counts = [0, 3, *[0] * (len(DISPATCH_S) - 2), 1]
    return {phase: ([scale * count for count in counts], scale * 9.5) for phase in ("route", "wait")}


def test_dispatch_seconds_add_up_over_engines_and_restarts():
    exporter = Exporter()
    exporter.engine("a", 1, {})
    assert b'phase="' not in exporter.render()[0]
    for engine, scale in (("a", 1), ("a", 2), ("b", 1), ("a", 2)):
        exporter.engine(engine, 1, {"dispatch_seconds": dispatch(scale), "num_dispatch_retries": scale})
    found = samples_of(exporter.render()[0].decode())
    for phase in ("route", "wait"):
        assert found["trinity_dispatch_seconds_bucket", "0.0001", phase] == 0
        assert found["trinity_dispatch_seconds_bucket", "5.0", phase] == 9
        assert found["trinity_dispatch_seconds_bucket", "+Inf", phase] == 12
        assert found["trinity_dispatch_seconds_count", phase] == 12
        assert found["trinity_dispatch_seconds_sum", phase] == 3 * 9.5
    assert found["trinity_dispatch_retries_total",] == 3


# --- health ---
