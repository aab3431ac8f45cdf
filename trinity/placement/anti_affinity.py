"""Hosts fail as a whole: bring replicas that share one to hosts that have none of their expert.

Legend: as in layout.py and local_search.py; X a host that has two replicas or more of an expert, G a host that has none.
Each round, every layer moves one replica, into an empty slot or in exchange for an expert that suffers no loss of hosts; of
all such places it takes the one that is best for the balance. What no single exchange can part stays together.
"""

import numpy as np

from trinity.placement.layout import Layout
from trinity.placement.local_search import NEVER, BusiestShards, swap, swaps


def anti_affinity(layout: Layout) -> bool:
    """Change `layout` in place; -> whether anything was moved. Once it was not, all is as far apart as exchanges get it."""
    left_LSE, moved = _together(layout), False
    if not left_LSE.any():
        return False
    left_LSE &= _has_a_way_out(layout)[:, layout.host_S]
    while (layer_A := np.flatnonzero(left_LSE.any((1, 2)))).size:
        at_A = left_LSE[layer_A].reshape(len(layer_A), -1).argmax(1)
        shard_A, expert_A = np.divmod(at_A, left_LSE.shape[2])
        left_LSE[layer_A, shard_A, expert_A] = False
        moved |= _move_away(layout, layer_A, shard_A, expert_A)
        left_LSE[layer_A] &= _together(layout)[layer_A]
    return moved


def _together(layout: Layout) -> np.ndarray:
    """bool [L, S, E]: replicas that share their host with another one, while some host has none."""
    crowded_LE = (layout.num_LE > layout.hosts_LE) & (layout.hosts_LE < layout.num_hosts)
    return layout.held_LSE & crowded_LE[:, None] & (layout.on_host_LHE > 1)[:, layout.host_S]


def _has_a_way_out(layout: Layout) -> np.ndarray:
    """bool [L, X, E]: some host without the expert has an empty slot, or an expert that may go to X and lose no host."""
    num_layers, num_hosts = layout.on_host_LHE.shape[:2]
    expert_LR = layout.slot_LSK.reshape(num_layers, -1)
    host_R = np.repeat(layout.host_S, layout.slot_LSK.shape[2])
    on_host_LXR = np.take_along_axis(layout.on_host_LHE, expert_LR[:, None], 2)
    on_own_LR = np.take_along_axis(on_host_LXR, host_R[None, None], 1)[:, 0]
    opens_LXR = (expert_LR == layout.empty)[:, None] | (on_own_LR > 1)[:, None] | (on_host_LXR == 0)
    opens_LXG = np.stack([opens_LXR[:, :, host_R == host].any(2) for host in range(num_hosts)], 2)
    open_LXE: np.ndarray = opens_LXG.astype(np.float32) @ (layout.on_host_LHE == 0).astype(np.float32) > 0
    return open_LXE


def _move_away(layout: Layout, layer_A: np.ndarray, shard_A: np.ndarray, expert_A: np.ndarray) -> bool:
    """One replica of each layer, where there is a place for it; -> whether there was one for any."""
    num_shards, num_slots = layout.slot_LSK.shape[1:]
    view = BusiestShards(layout, layer_A, layout.time_AS(layer_A), 1.0, shard_A, num_shards, num_slots)
    mine_AI = view.mine_AI == expert_A[:, None]
    elsewhere_AC = layout.on_host_LHE[layer_A[:, None], view.host_AC, expert_A[:, None]] == 0
    gain_AICJ = np.where((mine_AI[:, :, None] & elsewhere_AC[:, None])[..., None], swaps(layout, view, least=1), NEVER)
    best_A = gain_AICJ.reshape(len(layer_A), -1).argmax(1)
    i, c, j = np.unravel_index(best_A, gain_AICJ.shape[1:])
    at = np.flatnonzero(gain_AICJ[np.arange(len(layer_A)), i, c, j] > NEVER / 2)
    swap(layout, view, at, i[at], c[at], j[at])
    return at.size > 0
