"""Replicas on different nodes, so that none is lost with a node: is it so, and which shard had better be elsewhere.

Legend: L layers, E experts of a layer. Ray starts the shards of a node that is lost on one that is left, and leaves them there.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from trinity.placement.table import PlacementTable


class Relocation(NamedTuple):
    """A shard that shares its node with others, and a node that has room and fewer of them."""

    shard: str
    node: str


def num_apart(table: PlacementTable, node_of: Mapping[str, str], redundancy: int) -> int | None:
    """The number of nodes that each expert is on, of those that redundancy asks for, summed; None where it could be no more."""
    num_nodes = len({node_of.get(shard) or shard for shard in table.shards})
    wanted = min(1 + redundancy, num_nodes)
    found_LE = np.minimum(table.num_hosts_LE(node_of), wanted)
    return None if found_LE.min() == wanted else int(found_LE.sum())


def relocation(
    table: PlacementTable, node_of: Mapping[str, str], roomy: frozenset[str], redundancy: int
) -> Relocation | None:
    """The next one that spreads the shards, one at a time; None where experts are on as many nodes as redundancy asks for, or
    no node would do."""
    shards_on = Counter(node_of.get(shard) or shard for shard in table.shards)
    node = min(sorted(roomy), key=lambda node: shards_on[node], default=None)
    crowded, most = shards_on.most_common(1)[0]
    if node is None or most - shards_on[node] < 2 or table.num_hosts_LE(node_of).min() > redundancy:
        return None
    newest = [shard for shard in table.shards if node_of.get(shard) == crowded][-1]
    return Relocation(newest, node)
