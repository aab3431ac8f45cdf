"""What a pool should be: deciding as a pure function."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.control.desired import MIN_ROWS, DesiredState, Rules, Seen, desired_change
from trinity.errors import ConfigError
from trinity.placement.table import PlacementTable

LAYERS, NUM_EXPERTS = (1, 3), 6
TWO, THREE = (PlacementTable.spread(LAYERS, NUM_EXPERTS, [f"shard-{i}" for i in range(n)]) for n in (2, 3))
RULES = Rules()
EVEN = np.ones((2, NUM_EXPERTS))
HOT = np.array([[90.0, 90, 1, 1, 1, 1], [90, 90, 1, 1, 1, 1]])  # both on shard-0


def seen(load_LE=EVEN, **others):
    return Seen(load_LE, **others)


def doubled(table):
    """Two replicas of everything, on two shards."""
    return replace(table, epoch=table.epoch + 1, replicas=tuple(tuple((0, 1) for _ in row) for row in table.replicas))


@pytest.mark.parametrize(
    ("table", "saw", "desired", "rules"),
    [
        pytest.param(TWO, seen(), DesiredState.of(TWO), RULES, id="as it should be"),
        pytest.param(TWO, seen(HOT), DesiredState.of(TWO), RULES, id="uneven, but it is not yet time to look"),
        pytest.param(TWO, seen(EVEN, may_balance=True), DesiredState.of(TWO), RULES, id="even enough"),
        pytest.param(TWO, seen(HOT, may_balance=True, rows_in_window=10), DesiredState.of(TWO), RULES, id="chance"),
        pytest.param(TWO, seen(lost=frozenset({"shard-9"})), DesiredState.of(TWO), RULES, id="a stranger is lost"),
        pytest.param(
            TWO,
            seen(node_of={"shard-0": "a"}, leaving_nodes=frozenset({"b"})),
            DesiredState.of(TWO),
            RULES,
            id="another node leaves",
        ),
        pytest.param(TWO, seen(must_balance=True), DesiredState.of(TWO), RULES, id="asked, but nothing is better"),
        pytest.param(doubled(TWO), seen(), DesiredState.of(TWO), Rules(redundancy=1), id="redundant already"),
        pytest.param(TWO, seen(), DesiredState(2, drained=("shard-7",)), RULES, id="what was drained has gone"),
    ],
)
def test_nothing_is_to_be_changed(table, saw, desired, rules):
    assert desired_change(table, saw, desired, rules) is None


@pytest.mark.parametrize(
    ("table", "saw", "desired", "rules", "shards", "fresh", "reason"),
    [
        pytest.param(
            TWO, seen(), DesiredState(3, next_name=2, reason="more"), RULES,
            ("shard-0", "shard-1", "shard-2"), ("shard-2",), "more", id="one more",
        ),
        pytest.param(
            TWO, seen(), DesiredState(4, next_name=7, reason="more"), RULES,
            ("shard-0", "shard-1", "shard-7", "shard-8"), ("shard-7", "shard-8"), "more", id="names are never used again",
        ),
        pytest.param(
            THREE, seen(), DesiredState(2, next_name=3, reason="less"), RULES,
            ("shard-0", "shard-1"), (), "less", id="the newest goes first",
        ),
        pytest.param(
            THREE, seen(), DesiredState(2, drained=("shard-0",), next_name=3, reason="drain"), RULES,
            ("shard-1", "shard-2"), (), "drain", id="the one that was asked for goes",
        ),
        pytest.param(
            THREE, seen(lost=frozenset({"shard-1"})), DesiredState.of(THREE), RULES,
            ("shard-0", "shard-2", "shard-3"), ("shard-3",), "start", id="who does not come back is replaced",
        ),
        pytest.param(
            doubled(THREE), seen(lost=frozenset({"shard-1"}), spares=("shard-3",)), DesiredState(3, next_name=4),
            Rules(redundancy=1), ("shard-0", "shard-2"), (), "lost", id="nobody waits where others hold all of it",
        ),
        pytest.param(
            TWO, seen(spares=("shard-4", "shard-5")), DesiredState(4, next_name=6, reason="more"), RULES,
            ("shard-0", "shard-1", "shard-4", "shard-5"), ("shard-4", "shard-5"), "more", id="what has started is used",
        ),
        pytest.param(
            TWO, seen(spares=("shard-4", "shard-5")), DesiredState(3, next_name=6, reason="more"), RULES,
            ("shard-0", "shard-1", "shard-4"), ("shard-4",), "more", id="no more of it than is wanted",
        ),
        pytest.param(
            TWO, seen(spares=("shard-4",)), DesiredState(4, next_name=5, reason="more"), RULES,
            ("shard-0", "shard-1", "shard-4", "shard-5"), ("shard-4", "shard-5"), "more", id="and others are made",
        ),
        pytest.param(
            TWO, seen(node_of={"shard-0": "a", "shard-1": "b"}, leaving_nodes=frozenset({"a"})), DesiredState.of(TWO),
            RULES, ("shard-1", "shard-2"), ("shard-2",), "start", id="a node that leaves is emptied before",
        ),
        pytest.param(
            TWO, seen(HOT, may_balance=True), DesiredState.of(TWO), RULES, ("shard-0", "shard-1"), (), "balance",
            id="it pays",
        ),
        pytest.param(
            TWO, seen(HOT, must_balance=True, rows_in_window=0), DesiredState.of(TWO), RULES,
            ("shard-0", "shard-1"), (), "balance", id="somebody asked for it",
        ),
    ],
)  # fmt: skip
def test_what_is_to_be_changed(table, saw, desired, rules, shards, fresh, reason):
    change = desired_change(table, saw, desired, rules)
    assert (change.table.epoch, change.table.shards) == (table.epoch + 1, shards)
    assert (change.fresh, change.reason) == (fresh, reason)
    assert (change.table.num_replicas_LE == 1).all()


@pytest.mark.parametrize(
    ("saw", "desired", "rules", "wanted"),
    [
        (seen(), DesiredState(2, replicas=((3, 4, 2),)), RULES, {(1, 4): 2}),
        (seen(scaled_LE=EVEN + (HOT > 1)), DesiredState(2), RULES, {(0, 0): 2, (0, 1): 2, (1, 0): 2, (1, 1): 2}),
        (seen(scaled_LE=EVEN * 2), DesiredState(2, replicas=((3, 4, 1),)), Rules(), "all but one"),
        (seen(), DesiredState(2), Rules(redundancy=1), "all"),
        (seen(), DesiredState(2, replicas=((3, 4, 1),)), Rules(redundancy=1), "all"),
        (seen(), DesiredState(2), Rules(redundancy=5), "all"),  # as many as there are shards
    ],
)
def test_replicas(saw, desired, rules, wanted):
    """The operator's word about one expert goes before the load's, redundancy before both."""
    expected_LE = np.ones((2, NUM_EXPERTS), dtype=int) * (2 if isinstance(wanted, str) else 1)
    for at, num in wanted.items() if isinstance(wanted, dict) else ():
        expected_LE[at] = num
    if wanted == "all but one":
        expected_LE[1, 4] = 1
    assert (desired_change(TWO, saw, desired, rules).table.num_replicas_LE == expected_LE).all()


def test_a_balanced_change_parts_the_hot_experts():
    change = desired_change(TWO, seen(HOT, may_balance=True), DesiredState.of(TWO), RULES)
    assert all(change.table.holders((layer, 0)) != change.table.holders((layer, 1)) for layer in LAYERS)
    assert desired_change(change.table, seen(HOT, may_balance=True), DesiredState.of(TWO), RULES) is None


# -- on different nodes

FOUR = PlacementTable.spread(LAYERS, NUM_EXPERTS, [f"shard-{i}" for i in range(4)])


def twice(table):
    """Two replicas of everything: on the shard that has it, and the next one."""
    num = len(table.shards)
    held = tuple(tuple((first, (first + 1) % num) for (first,) in row) for row in table.replicas)
    return replace(table, replicas=held)


def hosts(text):
    return {f"shard-{i}": host for i, host in enumerate(text)}


REDUNDANT = Rules(redundancy=1)


def settled(table, node_of, roomy, rules=REDUNDANT):
    """-> the table in the end, where its shards are, and the reasons for all that was done."""
    desired, reasons = replace(DesiredState.of(table), num_shards=len(table.shards)), []
    while True:
        saw = seen(node_of=node_of, roomy_nodes=frozenset(roomy), may_spread=True)
        change = desired_change(table, saw, desired, rules)
        if change is None:
            return table, node_of, reasons
        desired, table = replace(desired, next_name=desired.next_name + len(change.fresh)), change.table
        places = {**node_of, **dict.fromkeys(change.fresh, change.node)}
        node_of = {shard: places[shard] for shard in table.shards}
        reasons.append("moved" if change.node else change.reason)
        assert len(reasons) < 20, "it ends"


@pytest.mark.parametrize(
    ("table", "where", "moves"),
    [
        (doubled(TWO), "aa", 1),
        (twice(FOUR), "aaaa", 2),
        (twice(FOUR), "aaab", 1),
        (twice(FOUR), "aabb", 0),
    ],
)
def test_replicas_that_share_a_node_are_parted_as_soon_as_there_is_another(table, where, moves):
    """A node was lost, Ray has started its shards on the one that is left; now it is back."""
    found, node_of, reasons = settled(table, hosts(where), "b")
    assert found.num_hosts_LE(node_of).min() == 2
    assert reasons.count("moved") == moves
    assert settled(found, node_of, "ab") == (found, node_of, [])


@pytest.mark.parametrize(
    ("table", "where", "roomy", "rules"),
    [
        pytest.param(doubled(TWO), "aa", "", Rules(redundancy=1), id="there is no other node"),
        pytest.param(doubled(TWO), "aa", "a", Rules(redundancy=1), id="its own has room"),
        pytest.param(doubled(TWO), "ab", "c", Rules(redundancy=1), id="they are apart"),
        pytest.param(TWO, "aa", "b", Rules(), id="no redundancy was asked for"),
    ],
)
def test_nothing_is_spread_where(table, where, roomy, rules):
    assert settled(table, hosts(where), roomy, rules)[2] == []


@pytest.mark.parametrize("seed", range(5))
def test_what_cannot_be_parted_is_left_alone_whatever_the_load(seed):
    """Three shards on a node, one on the other, which is full: for some experts there is no room there."""
    table, node_of, _ = settled(twice(FOUR), hosts("aaab"), "")
    assert table.num_hosts_LE(node_of).min() == 1
    noise_LE = np.random.default_rng(seed).exponential(1.0, (len(LAYERS), NUM_EXPERTS)) ** 3
    saw = seen(noise_LE, node_of=node_of, may_spread=True, rows_in_window=10)
    assert desired_change(table, saw, DesiredState.of(table), REDUNDANT) is None


def test_shards_are_added_before_any_is_moved():
    """All that are made for a move go to its node, and it has room for one."""
    saw = seen(node_of=hosts("aaaa"), roomy_nodes=frozenset("b"), may_spread=True)
    change = desired_change(twice(FOUR), saw, DesiredState(6, next_name=4, reason="more"), REDUNDANT)
    assert (change.reason, change.node, change.fresh) == ("more", None, ("shard-4", "shard-5"))


def test_it_is_not_looked_for_all_the_time():
    saw = seen(node_of=hosts("aa"), roomy_nodes=frozenset("b"))
    assert desired_change(doubled(TWO), saw, DesiredState.of(TWO), Rules(redundancy=1)) is None


def test_nodes_that_have_an_expert_are_counted():
    assert twice(FOUR).num_hosts_LE(hosts("aabb")).tolist() == [[1, 1, 2, 1, 1, 2]] * 2
    assert twice(FOUR).num_hosts_LE({"shard-0": "", "shard-1": "a"}).min() == 2, (
        "who is not seen is on a node of its own"
    )


def test_what_was_seen_of_too_few_rows_does_not_count():
    more = DesiredState(3, next_name=2)
    few = seen(HOT, rows_in_window=MIN_ROWS * len(LAYERS) - 1)
    assert desired_change(TWO, few, more, RULES) == desired_change(TWO, seen(), more, RULES)
    assert desired_change(TWO, seen(HOT), more, RULES) != desired_change(TWO, seen(), more, RULES)


def test_a_shard_has_room_for_a_quarter_more_than_its_share():
    loads = np.array([[1000.0, 1, 1, 1, 1, 1]] * 2)  # balance alone would leave the hot one by itself
    change = desired_change(TWO, seen(loads, must_balance=True), DesiredState.of(TWO), RULES)
    assert [len(change.table.experts_of(shard)[1]) for shard in change.table.shards] == [2, 4]
    small = Rules(bytes_by_form=(4, 1))  # shard-1 has its experts in a quarter of the memory
    change = desired_change(TWO, seen(loads, must_balance=True), DesiredState.of(TWO), small)
    assert [len(change.table.experts_of(shard)[1]) for shard in change.table.shards] == [1, 5]
    with pytest.raises(ConfigError, match="room for 4 experts"):
        desired_change(TWO, seen(), DesiredState.of(TWO), Rules(redundancy=1, experts_per_layer=2))


def edited(data, desired, table):
    """Something that an operator may ask for."""
    match data.draw(st.sampled_from(["scale", "drain", "replicate"])):
        case "scale":
            return desired.with_shards(data.draw(st.integers(1, NUM_EXPERTS)), table)
        case "drain":
            return desired.without(data.draw(st.sampled_from(table.shards)), table)
        case _:
            expert = data.draw(st.sampled_from(LAYERS)), data.draw(st.integers(0, NUM_EXPERTS - 1))
            return desired.with_replicas(*expert, data.draw(st.integers(1, len(table.shards))), table)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_changes_end(data):
    """Whatever is asked for, after a change or a few nothing is left to be done, and shards are as many as was said."""
    table = data.draw(st.sampled_from([TWO, THREE]))
    desired = DesiredState.of(table)
    for _ in range(data.draw(st.integers(1, 4))):
        with suppress(ConfigError):  # the last shard stays
            desired = edited(data, desired, table)
        for _ in range(3):
            change = desired_change(table, seen(), desired, RULES)
            if change is None:
                break
            assert change.table.epoch == table.epoch + 1
            assert not set(change.fresh) & set(table.shards)
            table, desired = change.table, replace(desired, next_name=desired.next_name + len(change.fresh))
        assert desired_change(table, seen(), desired, RULES) is None
        assert len(table.shards) == desired.num_shards
        assert not set(desired.drained) & set(table.shards)


# -- what is asked for


def test_desired_state_is_edited_as_a_value_and_outlives_its_process():
    first = DesiredState.of(THREE)
    edited = first.with_shards(5, THREE).without("shard-1", THREE).with_replicas(1, 2, 3, THREE)
    assert edited == DesiredState(4, ("shard-1",), ((1, 2, 3),), next_name=3)
    assert edited.without("shard-1", THREE) is edited, "harmless when repeated"
    assert edited.with_replicas(1, 2, 1, THREE).replicas == ((1, 2, 1),), "the last word counts"
    assert DesiredState.from_json(edited.to_json()) == edited
    assert first == DesiredState.of(THREE)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.with_shards(0, TWO), "0 shards for 6 experts"),
        (lambda d: d.with_shards(7, TWO), "7 shards for 6 experts"),
        (lambda d: d.without("shard-5", TWO), "there is no shard 'shard-5'"),
        (lambda d: replace(d, num_shards=1).without("shard-0", TWO), "is the last shard"),
        (lambda d: d.with_replicas(2, 0, 1, TWO), r"no expert \(2, 0\)"),
        (lambda d: d.with_replicas(1, 6, 1, TWO), r"no expert \(1, 6\)"),
        (lambda d: d.with_replicas(1, 0, 3, TWO), "3 replicas on 2 shards"),
    ],
)
def test_what_can_never_be_is_refused(edit, says):
    with pytest.raises(ConfigError, match=says):
        edit(DesiredState.of(TWO))
