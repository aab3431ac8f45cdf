"""The planner: every plan is valid whatever the cluster looks like, and good plans take few moves.

Legend: L layers, S shards, E experts of a layer, W windows of load.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.bench.expert_loads import drifting
from trinity.errors import ConfigError
from trinity.placement.layout import Bounds, Layout
from trinity.placement.local_search import local_search
from trinity.placement.planner import Copy, PlanGoal, balance, moves, plan, rows_LS, with_floor
from trinity.placement.table import PlacementTable
from trinity.placement.topology import Shard, Topology

BYTES = 10  # of one expert


@st.composite
def shards(draw, num_experts, at_least=1):
    def one(i):
        slots, memory = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
        return Shard(
            f"s{i}",
            f"h{draw(st.integers(0, 3))}",
            draw(st.integers(0, num_experts + 2)) if slots else None,
            draw(st.integers(0, 4 * BYTES * num_experts)) if memory else None,
            draw(st.sampled_from([0.5, 1.0, 1.0, 3.0])),
            draw(st.sampled_from([False, False, False, True])),
        )

    return [one(i) for i in range(draw(st.integers(at_least, 7)))]


@st.composite
def loads(draw, num_layers, num_experts):
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    load_LE = np.exp(rng.normal(0, draw(st.sampled_from([0.0, 1.0, 3.0])), (num_layers, num_experts)))
    return load_LE * (rng.random((num_layers, num_experts)) >= draw(st.sampled_from([0.0, 0.3, 1.0])))


@st.composite
def cases(draw):
    """Two windows of load, a cluster, and what became of it: shards gone, new, draining, larger, smaller."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    before, after = draw(shards(num_experts)), draw(shards(num_experts))
    kept = [after[i] if draw(st.booleans()) and i < len(after) else shard for i, shard in enumerate(before)]
    gone = draw(st.sets(st.sampled_from([shard.name for shard in before]), max_size=2))
    later = {shard.name: shard for shard in [*kept, *after] if shard.name not in gone}
    spare = draw(st.none() | st.integers(0, num_experts))
    aim = PlanGoal(
        draw(st.sampled_from([0.9, 0.985, 1.0])), draw(st.sampled_from([0.0, 0.01])), draw(st.integers(0, 3)), spare
    )
    two = draw(loads(num_layers, num_experts)), draw(loads(num_layers, num_experts))
    return two, (before, list(later.values())), aim


def room_LS(cluster, num_layers, num_experts):
    topology = Topology(tuple(cluster), BYTES)
    return topology.slots_LS(topology.usable, num_layers, num_experts)


def fits(cluster, num_layers, num_experts):
    """None where there is room; else what the error must say."""
    usable = [shard for shard in cluster if not shard.draining]
    if not usable:
        return "may hold experts"
    most = [min(num_experts, num_experts if s.slots is None else s.slots) for s in usable]
    in_all = [
        min(num_layers * m, num_layers * m if s.memory_bytes is None else s.memory_bytes // BYTES)
        for s, m in zip(usable, most, strict=True)
    ]
    if sum(most) < num_experts or sum(in_all) < num_layers * num_experts:
        return f"which have {num_experts}; add shards"
    return None


def check(table, load_LE, cluster, aim):
    """All that holds for every plan."""
    num_layers, num_experts = load_LE.shape
    usable = {shard.name: shard for shard in cluster if not shard.draining}
    assert set(table.shards) == set(usable)
    assert table.num_replicas_LE.min() >= 1
    for name, shard in usable.items():
        per_layer = [len(experts) for experts in table.experts_of(name).values()]
        assert shard.slots is None or max(per_layer) <= shard.slots
        assert shard.memory_bytes is None or sum(per_layer) * BYTES <= shard.memory_bytes
    if aim.num_spare is not None:
        assert table.num_replicas_LE.sum(1).max() <= num_experts + aim.num_spare
    assert rows_LS(load_LE, table).sum(1) == pytest.approx(load_LE.sum(1))
    check_redundancy(table, room_LS(cluster, num_layers, num_experts), aim)


def check_redundancy(table, slots_LS, aim):
    """As many replicas as wanted wherever an arrangement exists: see the cut in `Layout._squeeze`."""
    for slots_S, num_E in zip(slots_LS, table.num_replicas_LE, strict=True):
        spare = slots_S.sum() - table.num_experts if aim.num_spare is None else aim.num_spare
        copies = min(1 + aim.redundancy, int((slots_S > 0).sum()))
        if min(slots_S.sum(), table.num_experts + spare) >= copies * table.num_experts:
            assert num_E.min() >= copies


@settings(max_examples=400, deadline=None)
@given(cases())
def test_every_plan_is_valid_and_once_made_stays(case):
    windows, clusters, aim = case
    table = None
    for load_LE, cluster in zip(windows, clusters, strict=True):
        problem = fits(cluster, *load_LE.shape)
        if problem:
            with pytest.raises(ConfigError, match=problem):
                plan(load_LE, Topology(tuple(cluster), BYTES), table, aim)
            return
        topology = Topology(tuple(cluster), BYTES)
        before, table = table, plan(load_LE, topology, table, aim)
        check(table, load_LE, cluster, aim)
        check_order(before, table)
        assert table.epoch == (1 if before is None else before.epoch + (table is not before))
        assert plan(load_LE, topology, table, aim) is table


def check_order(before, table):
    """Replicas that stay keep their order and come before new ones: a primary changes only where it went."""
    for layer in table.layers if before else ():
        for expert in range(table.num_experts):
            old = [before.shards[s] for s in before.holders((layer, expert))]
            new = [table.shards[s] for s in table.holders((layer, expert))]
            stay = [name for name in old if name in new]
            assert new[: len(stay)] == stay


@settings(max_examples=100, deadline=None)
@given(cases(), st.randoms())
def test_the_same_question_has_the_same_answer(case, random):
    (load_LE, later_LE), (cluster, _), aim = case
    if fits(cluster, *load_LE.shape):
        return
    mixed = random.sample(cluster, len(cluster))
    first, again = (plan(load_LE, Topology(tuple(cluster), BYTES), None, aim) for _ in range(2))
    assert first == again
    assert first.to_json() == again.to_json()
    slots_LS = room_LS(cluster, *load_LE.shape)
    if (slots_LS == slots_LS[0]).all():  # else room in bytes is dealt out in the order of the shards
        one, two = (plan(later_LE, Topology(tuple(shards), BYTES), first, aim) for shards in (cluster, mixed))
        assert one == two


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 3))
def test_replicas_spread_over_hosts_where_there_is_room(data, num_hosts, redundancy):
    num_experts = data.draw(st.integers(1, 12))
    cluster = [
        Shard(f"s{i}", f"h{data.draw(st.integers(0, num_hosts - 1))}", slots=num_experts)
        for i in range(data.draw(st.integers(2, 7)))
    ]
    hosts = [shard.host for shard in cluster]
    table = PlacementTable.spread(range(2), num_experts, ["s0"])
    for _ in range(2):
        table = plan(data.draw(loads(2, num_experts)), Topology(tuple(cluster)), table, PlanGoal(redundancy=redundancy))
        for layer in table.layers:
            for expert in range(num_experts):
                names = [hosts[int(table.shards[s][1:])] for s in table.holders((layer, expert))]
                assert len(set(names)) == min(len(names), len(set(hosts)))


def equal(num_shards, slots, num_hosts=4, **rest):
    return Topology(tuple(Shard(f"s{i}", f"h{i % num_hosts}", slots, **rest) for i in range(num_shards)))


def test_two_hosts_are_enough_for_any_one_of_them_even_without_a_slot_to_spare():
    rng = np.random.default_rng(0)
    table = None
    for _ in range(4):
        table = plan(rng.exponential(size=(6, 16)), equal(8, 4, 2), table, PlanGoal(redundancy=1))
        assert (table.num_replicas_LE == 2).all()
        on_host_LEN = table.shard_LEN % 2
        assert (on_host_LEN.sum(2) == 1).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_any_k_shards_may_go(k):
    load_LE = np.random.default_rng(k).lognormal(size=(3, 20))
    table = plan(load_LE, equal(6, 14), None, PlanGoal(redundancy=k))
    for lost in combinations(range(6), k):
        assert all(set(held) - set(lost) for row in table.replicas for held in row)


def test_scarce_redundancy_goes_to_the_hottest_and_stays_with_them():
    load_LE = np.arange(1.0, 21.0)[None] + 100  # a second replica halves nobody out of balance
    table = plan(load_LE, equal(5, 5), None, PlanGoal(redundancy=1))
    assert table.num_replicas_LE[0].tolist() == [1] * 15 + [2] * 5
    assert plan(load_LE[:, ::-1], equal(5, 5), table, PlanGoal(redundancy=1, goal=0.5)) is table


def test_replicas_of_a_lost_shard_take_over_and_only_orphans_are_copied():
    load_LE = np.random.default_rng(1).lognormal(size=(4, 32))
    aim = PlanGoal(goal=0.5)
    table = plan(load_LE, equal(6, 8), None, aim)
    orphans = sum(held == (2,) for row in table.replicas for held in row)
    left = Topology(tuple(shard for shard in equal(6, 8).shards if shard.name != "s2"))
    after = plan(load_LE, left, table, aim)
    found = moves(table, after, expert_bytes=7)
    assert "s2" not in after.shards
    assert {copy.sources for copy in found.copies} == {("s2",)}
    assert (len(found.copies), found.num_bytes) == (orphans, 7 * orphans)


def test_a_draining_shard_is_emptied_and_the_others_stay_as_they_are():
    load_LE = np.ones((2, 12))
    table = plan(load_LE, equal(4, 6), None, PlanGoal(num_spare=0))
    draining = Topology(tuple(replace(s, draining=s.name == "s1") for s in equal(4, 6).shards))
    after = plan(load_LE, draining, table, PlanGoal(num_spare=0))
    assert after.shards == ("s0", "s2", "s3")
    assert {copy.sources for copy in moves(table, after).copies} == {("s1",)}
    assert balance(load_LE, after).worst == 1.0


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 5), (5, 2), (2, 1)])
def test_shards_come_and_go(before, after):
    load_LE = np.random.default_rng(before).lognormal(size=(3, 24))
    names = [f"s{i}" for i in range(before)]
    table = PlacementTable.spread(range(3), 24, names)
    later = plan(load_LE, equal(after, 24), table, PlanGoal(num_spare=8))
    assert balance(load_LE, later).overall >= 0.97
    assert later.num_replicas_LE.sum(1).max() <= 32


def test_the_targets_on_a_drifting_load():
    """The full size, 58 layers, and its times: `trinity bench placement`."""
    load_WLE = drifting(4, 12, 256, rho=0.95, seed=7)
    topology = equal(32, 9)
    table = plan(load_WLE[0], topology)
    assert balance(load_WLE[0], table).overall >= 0.99
    for load_LE in load_WLE[1:]:
        before, table = table, plan(load_LE, topology, table)
        found = balance(load_LE, table)
        assert balance(load_LE, before).overall < 0.85  # there was something to do
        assert found.overall >= 0.98
        assert found.worst >= 0.95
        assert moves(before, table).share <= 0.15


def test_dearer_moves_are_fewer():
    one, two = drifting(2, 6, 128, rho=0.9, seed=3)
    topology = equal(16, 9)
    table = plan(one, topology)
    found = [plan(two, topology, table, PlanGoal(goal=0.99, move_cost=cost)) for cost in (0.0, 0.005, 0.02, 0.1, 1.0)]
    shares = [moves(table, after).share for after in found]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 1.5 * shares[2] > 1.5 * shares[3]
    evens = [balance(two, after).overall for after in found]
    assert evens == sorted(evens, reverse=True)
    assert (found[-1] is table, shares[-1]) == (True, 0.0)


def test_an_expert_larger_than_a_shard_is_split_without_being_asked():
    load_LE = np.ones((2, 64))
    load_LE[:, 5] = 100.0
    table = plan(load_LE, equal(8, 10), PlacementTable.spread(range(2), 64, [f"s{i}" for i in range(8)]))
    assert table.num_replicas_LE[:, 5].min() >= 5
    assert balance(load_LE, table).worst >= 0.95


def test_faster_shards_get_more_rows():
    load_LE = np.random.default_rng(2).lognormal(size=(5, 64))
    topology = Topology((Shard("slow", "a", 64), Shard("fast", "b", 64, capacity=3.0)))
    table = plan(load_LE, topology, None, PlanGoal(num_spare=4))
    rows = rows_LS(load_LE, table).sum(0)
    assert rows[1] / rows[0] == pytest.approx(3.0, rel=0.05)
    assert balance(load_LE, table, topology).worst >= 0.98


def test_a_bound_in_bytes_is_over_all_layers():
    two = Topology((Shard("a", memory_bytes=59), Shard("b", memory_bytes=60)), expert_bytes=10)
    with pytest.raises(
        ConfigError, match=r"2 shards have room for 3 experts in 1 of 3 layers, which have 4; add shards"
    ):
        plan(np.ones((3, 4)), two)
    exact = Topology((Shard("a", memory_bytes=60), Shard("b", memory_bytes=60)), expert_bytes=10)
    table = plan(np.ones((3, 4)), exact)
    assert [sum(map(len, table.experts_of(name).values())) for name in ("a", "b")] == [6, 6]


def test_counts_that_are_asked_for_are_kept():
    load_LE, wanted_LE = np.random.default_rng(4).lognormal(size=(2, 12)), np.ones((2, 12), dtype=np.int64)
    wanted_LE[:, 3], wanted_LE[:, 4] = 3, 9
    table = plan(load_LE, equal(4, 8), replicas_LE=wanted_LE)
    np.testing.assert_array_equal(table.num_replicas_LE, np.minimum(wanted_LE, 4))
    fewer = plan(load_LE, equal(4, 8), table, replicas_LE=np.ones((2, 12)))
    assert (fewer.num_replicas_LE == 1).all()


def test_a_smaller_budget_takes_away_what_is_missed_least():
    load_LE = np.array([[8.0, 4.0, 1.0, 1.0]])
    topology = Topology(tuple(Shard(name, name, 3) for name in "abc"))
    table = plan(load_LE, topology, None, PlanGoal(num_spare=4, goal=0.5))
    after = plan(load_LE, topology, table, PlanGoal(num_spare=1, goal=0.5))
    assert after.num_replicas_LE.tolist() == [[2, 1, 1, 1]]
    assert moves(table, after).copies == ()


def test_a_chain_of_moves_makes_room_where_no_single_place_is_left():
    """Experts 0 and 1 on shards 0 and 1, the free slot on shard 2 which has 2: a second replica of 2 needs a move."""
    layout = Layout(np.ones((1, 4)), np.array([[2, 2, 2]]), np.ones(3), np.arange(3))
    layer, expert, shard = (np.array(x) for x in ([0] * 5, [0, 1, 0, 3, 2], [0, 0, 1, 1, 2]))
    layout.fill(layer, expert, shard)
    layout.place(np.array([[2, 1, 2, 1]]))
    assert layout.num_LE[0, :4].tolist() == [2, 1, 2, 1]
    assert (layout.slot_LSK < 4).all()
    assert all(len(set(slots)) == 2 for slots in layout.slot_LSK[0].tolist())


@pytest.mark.parametrize("seed", range(6))
def test_no_step_of_refinement_brings_replicas_together(seed):
    """Else it and `separate` could undo each other's work for ever."""
    rng = np.random.default_rng(seed)
    load_LE = rng.lognormal(0, 1.5, (6, 20))
    layout = Layout(load_LE, np.full((6, 6), 6), np.ones(6), np.array([0, 0, 0, 1, 1, 2]))
    layout.place(rng.integers(1, 3, (6, 20)))

    def together():
        return (np.minimum(layout.num_LE, layout.num_hosts) - layout.hosts_LE).sum(1)

    before_L, held_LSE = together(), layout.held_LSE.copy()
    ones_LE = np.ones((6, 20), dtype=np.int64)
    local_search(layout, Bounds.of(ones_LE, 6 * ones_LE, np.full(6, 36)), goal=0.995, move_cost=0.0)
    assert (layout.held_LSE != held_LSE).any()
    assert (together() <= before_L).all()


def test_balance_is_as_defined():
    table = PlacementTable(1, ("a", "b"), (7, 9), (((0,), (0, 1)), ((0,), (1,))))
    load_LE = np.array([[3.0, 2.0], [1.0, 1.0]])
    np.testing.assert_array_equal(rows_LS(load_LE, table), [[4, 1], [1, 1]])
    found = balance(load_LE, table)
    assert found.overall == (2.5 + 1) / (4 + 1)
    assert found.layer_L.tolist() == [2.5 / 4, 1.0]
    assert found.worst == 2.5 / 4
    fast = Topology((Shard("a", slots=2, capacity=4.0), Shard("b", slots=2)))
    assert balance(load_LE, table, fast).layer_L.tolist() == [1.0, 0.4]
    assert balance(np.zeros((2, 2)), table).overall == 1.0


def test_moves_name_each_copy_and_where_it_is():
    before = PlacementTable(1, ("a", "b"), (7,), (((0,), (1, 0)),))
    after = PlacementTable(2, ("b", "c"), (7,), (((0, 1), (0,)),))
    found = moves(before, after, expert_bytes=5)
    assert found.copies == (Copy((7, 0), "b", ("a",)), Copy((7, 0), "c", ("a",)))
    assert (found.num_bytes, found.share) == (10, 2 / 3)
    assert moves(None, after).share == 1.0
    assert moves(after, after).copies == ()


@settings(max_examples=50, deadline=None)
@given(cases())
def test_arrays_of_a_table_are_its_lists(case):
    (load_LE, _), (cluster, _), aim = case
    if fits(cluster, *load_LE.shape):
        return
    table = plan(load_LE, Topology(tuple(cluster), BYTES), None, aim)
    most = max(len(held) for row in table.replicas for held in row)
    assert table.num_replicas_LE.tolist() == [[len(held) for held in row] for row in table.replicas]
    assert table.shard_LEN.tolist() == [[[h[n % len(h)] for n in range(most)] for h in row] for row in table.replicas]
    assert PlacementTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shard("a"), "shard a has no bound; give slots"),
        (lambda: Shard("a", slots=-1), "shard a has slots -1; use 0 or more"),
        (lambda: Shard("a", slots=1, capacity=0.0), "shard a has capacity 0.0"),
        (lambda: Shard("a", slots=1, capacity=float("nan")), "shard a has capacity nan"),
        (lambda: Topology((Shard("a", slots=1),) * 2), "shard names repeat: a"),
        (lambda: Topology((Shard("a", slots=1, draining=True),)), "none of 1 shards may hold experts"),
        (lambda: Topology((Shard("a", slots=1),), 0), "an expert has 0 bytes"),
        (lambda: PlanGoal(goal=0.0), "goal 0.0 is no balance"),
        (lambda: PlanGoal(goal=1.1), "goal 1.1 is no balance"),
        (lambda: PlanGoal(move_cost=-1.0), "move_cost -1.0"),
        (lambda: PlanGoal(redundancy=-1), "redundancy -1 is below 0"),
        (lambda: PlanGoal(num_spare=-1), "num_spare -1 is below 0"),
        (lambda: plan(np.ones(3), equal(2, 4)), r"load has shape \(3,\)"),
        (lambda: plan(np.array([[1.0, np.nan]]), equal(2, 4)), "load of expert 1 in row 0 is nan"),
        (lambda: plan(np.array([[1.0, -1.0]]), equal(2, 4)), r"load of expert 1 in row 0 is -1\.0"),
        (lambda: plan(np.ones((1, 9)), equal(2, 4)), "room for 8 experts in 1 of 1 layers, which have 9"),
        (lambda: plan(np.ones((2, 4)), equal(2, 4), layers=[1]), "load has 2 rows for 1 layers"),
        (lambda: plan(np.ones((1, 4)), equal(2, 4), PlacementTable.spread([0], 3, ["s0"])), "of 3 in 1; plan for one"),
        (
            lambda: plan(np.ones((1, 4)), equal(2, 4), replicas_LE=np.ones((1, 3))),
            r"have shape \(1, 3\), load \(1, 4\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_experts_without_rows_are_spread_as_well():
    """A new shard with no load measured yet gets its part, not all or nothing."""
    table = PlacementTable.spread((0, 1), 12, ("a", "b"))
    shards = tuple(Shard(name, slots=12) for name in "abc")
    quiet = np.zeros((2, 12))
    busy = quiet.copy()
    busy[0, 0] = 50.0
    for load_LE in (quiet, busy):
        found = plan(with_floor(load_LE), Topology(shards), table, replicas_LE=np.ones((2, 12), int))
        held = [[sum(len(experts) for experts in found.experts_of(name).values())] for name in "abc"]
        assert min(map(min, held)) >= 4, held
    assert (with_floor(busy)[1] == 1).all()
    assert with_floor(busy)[0].tolist() == [50.0, *[pytest.approx(0.1 * 50 / 12)] * 11]
