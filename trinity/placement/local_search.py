"""Improve a layout by as few copies as it takes: until each layer reaches the goal, or the next copy is not worth it.

Legend: as in layout.py; A layers at work, I slots of the busiest shard, C the other shards, J slots of each of those.
Each round, every layer at work takes one step that unloads its busiest shard:
  swap       an expert of the busiest shard for one of another shard (two copies; one where the other slot is empty)
  replicate  one more replica of an expert of the busiest shard, in an empty slot or in place of a replica that its expert
             can do without (one copy)
A step's gain is by how much it lowers the time that shards take beyond the limit, 1 / goal, summed over shards and in units
of the mean shard; the step with the largest gain per copy is taken. Gains are positive, so rounds end.
Replicas of an expert keep to different shards, and no step makes the experts of a layer be on fewer hosts, all added up.
"""

import numpy as np

from trinity.placement.layout import Bounds, Layout

ENOUGH = 1e-5  # of the busiest shard's time: smaller gains are not worth a round, and float32 can see them
NEVER, NOT_THERE = -1e9, -9
TIE = np.float32(1e-3)  # of two steps with equal gain, the one that leaves both shards nearer to each other
COLD = 8  # shards that are looked at beside the busiest, from the idlest up; all where these have nothing to offer
FIRST = 1e-12  # of equal experts the first, in whatever slots they are: a finished plan must look finished again
SAMPLE = 24  # slots of one shard that are looked at; of more, as many, evenly by weight


def local_search(layout: Layout, bounds: Bounds, goal: float, move_cost: float) -> None:
    """Change `layout` in place. A copy is made only where it gains `move_cost` or more."""
    layer_A = np.arange(len(layout.load_LE))
    while layer_A.size:
        time_AS = layout.time_AS(layer_A)
        busy_A = time_AS.max(1) > 1 / goal + ENOUGH
        layer_A, time_AS = layer_A[busy_A], time_AS[busy_A]
        done_A = _round(layout, bounds, layer_A, time_AS, 1 / goal, COLD, move_cost)
        rest_A = _round(layout, bounds, layer_A[~done_A], time_AS[~done_A], 1 / goal, time_AS.shape[1], move_cost)
        layer_A = np.concatenate([layer_A[done_A], layer_A[~done_A][rest_A]])


def _round(
    layout: Layout,
    bounds: Bounds,
    layer_A: np.ndarray,
    time_AS: np.ndarray,
    limit: float,
    num_cold: int,
    move_cost: float,
) -> np.ndarray:
    """Take each layer's best step; -> bool [A], whether it had one worth its copies."""
    if not layer_A.size:
        return np.zeros(0, dtype=bool)
    view = BusiestShards(layout, layer_A, time_AS, limit, time_AS.argmax(1), num_cold, SAMPLE)
    swap_AX = swaps(layout, view).reshape(len(view.layer_A), -1)
    gain_AIC, victim_AC = replications(layout, bounds, view)
    copy_AX = gain_AIC.reshape(len(view.layer_A), -1)
    swap_A, copy_A = swap_AX.argmax(1), copy_AX.argmax(1)
    swap_gain_A = np.take_along_axis(swap_AX, swap_A[:, None], 1)[:, 0]
    copy_gain_A = np.take_along_axis(copy_AX, copy_A[:, None], 1)[:, 0]
    copies_A = copy_gain_A >= swap_gain_A
    worth_A: np.ndarray = np.maximum(swap_gain_A, copy_gain_A) >= np.maximum(move_cost, ENOUGH * time_AS.max(1))
    num_i, num_c, num_j = view.mine_AI.shape[1], *view.theirs_ACJ.shape[1:]
    at = np.flatnonzero(worth_A & ~copies_A)
    swap(layout, view, at, *np.unravel_index(swap_A[at], (num_i, num_c, num_j)))
    at = np.flatnonzero(worth_A & copies_A)
    i, c = np.unravel_index(copy_A[at], (num_i, num_c))
    layout.put(view.layer_A[at], view.cold_AC[at, c], view.slot_ACJ[at, c, victim_AC[at, c]], view.mine_AI[at, i])
    return worth_A


def swap(layout: Layout, view: "BusiestShards", at: np.ndarray, i: np.ndarray, c: np.ndarray, j: np.ndarray) -> None:
    """Do it, in the layers at positions `at` of the view."""
    layer, mine, theirs = view.layer_A[at], view.mine_AI[at, i], view.theirs_ACJ[at, c, j]
    layout.put(layer, view.hot_A[at], view.slot_AI[at, i], theirs)
    layout.put(layer, view.cold_AC[at, c], view.slot_ACJ[at, c, j], mine)


class BusiestShards:
    """The busiest shard of each layer at work, the others, what they hold, and how long they take beyond the limit."""

    def __init__(
        self,
        layout: Layout,
        layer_A: np.ndarray,
        time_AS: np.ndarray,
        limit: float,
        hot_A: np.ndarray,
        num_cold: int,
        num_sample: int,
    ):
        row_A1, at_A1 = np.arange(len(layer_A))[:, None], layer_A[:, None]
        self.layer_A, self.hot_A, self.beyond_AS = layer_A, hot_A, time_AS - limit
        others_AS = np.where(np.arange(time_AS.shape[1]) == hot_A[:, None], np.inf, time_AS)
        self.cold_AC = np.argsort(others_AS, 1, kind="stable")[:, : min(num_cold, time_AS.shape[1] - 1)]
        self.beyond_A, self.beyond_AC = self.beyond_AS[row_A1[:, 0], self.hot_A], self.beyond_AS[row_A1, self.cold_AC]
        self.speed_A, self.speed_AC = layout.capacity_S[self.hot_A], layout.capacity_S[self.cold_AC]
        self.host_A, self.host_AC = layout.host_S[self.hot_A], layout.host_S[self.cold_AC]
        self.weight_AE = layout.weight_AE(layer_A)
        hot_AK, cold_ACK = layout.slot_LSK[layer_A, self.hot_A], layout.slot_LSK[at_A1, self.cold_AC]
        self.slot_AI, self.slot_ACJ = (_sample(layout, self.weight_AE, held, num_sample) for held in (hot_AK, cold_ACK))
        self.mine_AI = np.take_along_axis(hot_AK, self.slot_AI, -1)
        self.theirs_ACJ = np.take_along_axis(cold_ACK, self.slot_ACJ, -1)
        self.weight_AI = self.weight_AE[row_A1, self.mine_AI]
        self.weight_ACJ = self.weight_AE[row_A1[:, :, None], self.theirs_ACJ]


def _sample(layout: Layout, weight_AE: np.ndarray, expert_AxK: np.ndarray, num_sample: int) -> np.ndarray:
    """Slots to look at: all, or some from the heaviest expert to the lightest and the first empty slot."""
    num_slots = expert_AxK.shape[-1]
    if num_slots <= num_sample:
        return np.broadcast_to(np.arange(num_slots), expert_AxK.shape)
    weight_AxK = np.take_along_axis(weight_AE, expert_AxK.reshape(len(weight_AE), -1), 1).reshape(expert_AxK.shape)
    order_AxK = np.argsort(np.where(expert_AxK == layout.none, 1.0, FIRST * expert_AxK - weight_AxK), -1, kind="stable")
    num_Ax1 = (expert_AxK < layout.empty).sum(-1, keepdims=True)
    pick_AxJ = (np.arange(num_sample) * num_Ax1 / (num_sample - 1)).astype(np.int64)
    return np.take_along_axis(order_AxK, np.minimum(pick_AxJ, num_slots - 1), -1)


def swaps(layout: Layout, view: BusiestShards, least: int = 0) -> np.ndarray:
    """-> float32 [A, I, C, J]: the gain per copy of each swap; NEVER for those that are not allowed.

    Allowed is what puts no expert twice on a shard, and spreads both experts together over at least `least` more hosts.
    """
    low = np.float32
    shift_AICJ = view.weight_AI.astype(low)[:, :, None, None] - view.weight_ACJ.astype(low)[:, None]
    beyond_A111, beyond_A1C1 = (
        view.beyond_A.astype(low)[:, None, None, None],
        view.beyond_AC.astype(low)[:, None, :, None],
    )
    left_AICJ = beyond_A111 - shift_AICJ / view.speed_A.astype(low)[:, None, None, None]
    got_AICJ = beyond_A1C1 + shift_AICJ / view.speed_AC.astype(low)[:, None, :, None]
    gain_AICJ: np.ndarray = (
        beyond_A111 + np.maximum(beyond_A1C1, 0) - np.maximum(left_AICJ, 0) - np.maximum(got_AICJ, 0)
    )
    gain_AICJ -= TIE * np.abs(left_AICJ - got_AICJ)
    gain_AICJ *= np.where(view.theirs_ACJ == layout.empty, low(1), low(0.5))[:, None]
    give_AIC, take_ACJ = _hosts_won(layout, view)
    gain_AICJ[give_AIC[..., None] + take_ACJ[:, None] < least] = NEVER
    return gain_AICJ


def _hosts_won(layout: Layout, view: BusiestShards) -> tuple[np.ndarray, np.ndarray]:
    """int8: by how many hosts more an expert is spread when it goes to shard C [A, I, C], or from there to the busiest
    shard [A, C, J]: 1, 0 or -1; NOT_THERE where it is there already, or is none."""
    layer_A11, mine_AI1, theirs_ACJ = view.layer_A[:, None, None], view.mine_AI[:, :, None], view.theirs_ACJ
    same_AC = view.host_A[:, None] == view.host_AC
    here_AI = layout.on_host_LHE[view.layer_A[:, None], view.host_A[:, None], view.mine_AI]
    there_AIC = layout.on_host_LHE[layer_A11, view.host_AC[:, None], mine_AI1]
    give_AIC = np.where(same_AC[:, None], 0, (there_AIC == 0) * 1 - (here_AI == 1)[:, :, None])
    give_AIC[(mine_AI1 >= layout.empty) | layout.held_LSE[layer_A11, view.cold_AC[:, None], mine_AI1]] = NOT_THERE
    here_ACJ = layout.on_host_LHE[layer_A11, view.host_AC[:, :, None], theirs_ACJ]
    there_ACJ = layout.on_host_LHE[layer_A11, view.host_A[:, None, None], theirs_ACJ]
    real_ACJ = theirs_ACJ < layout.empty
    take_ACJ = np.where(same_AC[:, :, None] | ~real_ACJ, 0, (there_ACJ == 0) * 1 - (here_ACJ == 1))
    has_ACJ = layout.held_LSE[layer_A11, view.hot_A[:, None, None], theirs_ACJ]
    take_ACJ[(theirs_ACJ == layout.none) | has_ACJ] = NOT_THERE
    return give_AIC.astype(np.int8), take_ACJ.astype(np.int8)


def replications(layout: Layout, bounds: Bounds, view: BusiestShards) -> tuple[np.ndarray, np.ndarray]:
    """-> [A, I, C]: the gain of one more replica of each expert on each shard; [A, C]: the slot (J) that it would take."""
    layer_A1, layer_A11 = view.layer_A[:, None], view.layer_A[:, None, None]
    num_AI = layout.num_LE[layer_A1, view.mine_AI]
    less_AI = view.weight_AI / (num_AI + 1)
    holders_AIS = layout.held_LSE[layer_A11, np.arange(len(layout.host_S)), view.mine_AI[:, :, None]]
    down_AIS = np.minimum(less_AI[:, :, None] / layout.capacity_S, np.maximum(view.beyond_AS, 0)[:, None])
    down_AI = (holders_AIS * down_AIS).sum(2)
    victim_AC, harm_AC, freed_AC = _victims(layout, bounds, view)
    more_AIC = (less_AI * num_AI)[:, :, None] - freed_AC[:, None]
    beyond_A1C = view.beyond_AC[:, None]
    up_AIC = np.maximum(beyond_A1C + more_AIC / view.speed_AC[:, None], 0) - np.maximum(beyond_A1C, 0)
    there_AIC = layout.on_host_LHE[layer_A11, view.host_AC[:, None], view.mine_AI[:, :, None]]
    may_AI = num_AI < bounds.ceiling_LE[layer_A1, view.mine_AI]
    may_AIC = may_AI[:, :, None] & ((there_AIC == 0) | (num_AI >= layout.num_hosts)[:, :, None])
    may_AIC &= ~layout.held_LSE[layer_A11, view.cold_AC[:, None], view.mine_AI[:, :, None]]
    return np.where(may_AIC, down_AI[:, :, None] - up_AIC - harm_AC[:, None], NEVER), victim_AC


def _victims(layout: Layout, bounds: Bounds, view: BusiestShards) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slot of each shard that is missed least: empty, or of an expert that has others to take its rows.

    -> [A, C] slot (J), time beyond the limit that the others take longer, weight that leaves the shard.
    """
    layer_A11, theirs_ACJ = view.layer_A[:, None, None], view.theirs_ACJ
    num_ACJ, floor_ACJ = (of[layer_A11, theirs_ACJ] for of in (layout.num_LE, bounds.floor_LE))
    crowd_ACJ = layout.on_host_LHE[layer_A11, view.host_AC[:, :, None], theirs_ACJ] > 1
    apart_ACJ = num_ACJ == layout.hosts_LE[layer_A11, theirs_ACJ]
    spare_ACJ = (num_ACJ > floor_ACJ) & (crowd_ACJ | apart_ACJ)  # so that those left are on as many hosts as can be
    within_A = layout.num_LE[view.layer_A].sum(1) < bounds.budget_L[view.layer_A]
    free_ACJ = (theirs_ACJ == layout.empty) & within_A[:, None, None]
    each_ACJ = np.where(spare_ACJ, view.weight_ACJ / np.maximum(num_ACJ - 1, 1), np.where(free_ACJ, 0.0, -NEVER))
    victim_AC = (each_ACJ + FIRST * theirs_ACJ).argmin(2)
    each_AC1, expert_AC, weight_AC = (
        np.take_along_axis(of, victim_AC[:, :, None], 2) for of in (each_ACJ, theirs_ACJ, view.weight_ACJ)
    )
    others_ACS = layout.held_LSE[layer_A11, np.arange(len(layout.host_S)), expert_AC]
    others_ACS &= np.arange(len(layout.host_S)) != view.cold_AC[:, :, None]
    beyond_A1S = view.beyond_AS[:, None]
    longer_ACS = np.maximum(beyond_A1S + each_AC1 / layout.capacity_S, 0) - np.maximum(beyond_A1S, 0)
    harm_AC = np.where(each_AC1[:, :, 0] < -NEVER, (others_ACS * longer_ACS).sum(2), -NEVER)
    return victim_AC, harm_AC, weight_AC[:, :, 0]
