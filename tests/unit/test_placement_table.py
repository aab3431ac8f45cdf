import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.errors import ConfigError
from trinity.placement.table import PlacementTable


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 12))
def test_spread_gives_every_expert_one_home_and_shards_equal_parts(num_layers, num_experts, num_shards):
    if num_shards > num_experts:
        with pytest.raises(ConfigError, match="use 1 to"):
            PlacementTable.spread(range(num_layers), num_experts, map(str, range(num_shards)))
        return
    table = PlacementTable.spread(range(num_layers), num_experts, [f"s{i}" for i in range(num_shards)])
    held = [table.experts_of(s) for s in table.shards]
    for layer in table.layers:
        everywhere = [e for shard in held for e in shard[layer]]
        assert sorted(everywhere) == list(range(num_experts))
        sizes = [len(shard[layer]) for shard in held]
        assert max(sizes) - min(sizes) <= 1
    assert PlacementTable.from_json(table.to_json()) == table


def test_replicas_come_and_go_as_new_epochs():
    table = PlacementTable.spread([2, 3], 4, ["a", "b"])
    more = table.with_replica((3, 0), "b")
    assert (table.epoch, more.epoch) == (1, 2)
    assert table.holders((3, 0)) == (0,)
    assert more.holders((3, 0)) == (0, 1)
    assert more.holders((2, 0)) == (0,)
    np.testing.assert_array_equal(more.num_replicas_LE, [[1, 1, 1, 1], [2, 1, 1, 1]])
    assert more.shard_LEN[1, 0].tolist() == [0, 1]
    assert more.shard_LEN[1, 3].tolist() == [1, 1]
    assert more.primaries_of("b") == {2: (2, 3), 3: (2, 3)}
    assert more.without_replica((3, 0), "a").holders((3, 0)) == (1,)


def test_impossible_tables_are_refused():
    table = PlacementTable.spread([0], 2, ["a", "b"])
    with pytest.raises(ConfigError, match="two replicas on one shard"):
        table.with_replica((0, 0), "a")
    with pytest.raises(ConfigError, match="no replica"):
        table.without_replica((0, 0), "a")
    with pytest.raises(ConfigError, match="names repeat"):
        PlacementTable.spread([0], 2, ["a", "a"])
