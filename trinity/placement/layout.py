"""The planner's worksheet: which slot of which shard holds which expert, in arrays that are changed in place.

Legend: L layers, S shards, K slots of a shard, E experts of a layer, H hosts, R replicas; a vector over several layers at
once has the subscript A. Experts E and E + 1 stand for an empty slot and for one that a shard does not have.
Decisions: rows of an expert split evenly over its replicas; load is scaled so that the mean shard of every layer takes 1.0
"time" = rows / capacity; experts without load count a little, so that they, too, spread out.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

QUIET = 1e-6  # load of an expert that had none, as a share of its layer's mean expert


@dataclass(frozen=True)
class Bounds:
    """Bounds on the replicas of each expert, least and most [L, E + 2], and of all experts of a layer, most [L]."""

    floor_LE: np.ndarray
    ceiling_LE: np.ndarray
    budget_L: np.ndarray

    @classmethod
    def of(cls, floor_LE: np.ndarray, ceiling_LE: np.ndarray, budget_L: np.ndarray) -> "Bounds":
        """Make them from [L, E]; an empty slot can neither be spared nor replicated."""
        none = ((0, 0), (0, 2))
        return cls(np.pad(floor_LE, none, constant_values=1 << 30), np.pad(ceiling_LE, none), budget_L)


class Layout:
    """Slots, and what follows from them, kept true by `put`: who holds what, how many replicas, on which and how many hosts."""

    def __init__(self, load_LE: np.ndarray, slots_LS: np.ndarray, capacity_S: np.ndarray, host_S: np.ndarray):
        num_layers, num_experts = load_LE.shape
        num_shards, num_hosts, room = len(capacity_S), int(host_S.max()) + 1, int(slots_LS.max())
        self.empty, self.none, self.num_hosts = num_experts, num_experts + 1, num_hosts
        self.capacity_S, self.host_S, self.slots_LS = capacity_S, host_S, slots_LS
        self.load_LE = _scaled(load_LE, capacity_S.sum())
        has_slot_LSK = np.arange(room) < slots_LS[:, :, None]
        self.slot_LSK = np.where(has_slot_LSK, self.empty, self.none)
        self.held_LSE = np.zeros((num_layers, num_shards, num_experts + 2), dtype=bool)
        self.num_LE = np.zeros((num_layers, num_experts + 2), dtype=np.int64)
        self.on_host_LHE = np.zeros((num_layers, num_hosts, num_experts + 2), dtype=np.int64)
        self.hosts_LE = np.zeros_like(self.num_LE)

    def fill(self, layer_R: np.ndarray, expert_R: np.ndarray, shard_R: np.ndarray) -> None:
        """Put into an empty layout what was there before. Where a shard has too few slots, experts that are nowhere else stay
        before the others, and the most loaded before the least; the rest is left out."""
        times_LE = np.zeros_like(self.num_LE)
        np.add.at(times_LE, (layer_R, expert_R), 1)
        worth_R = self.load_LE[layer_R, expert_R] / times_LE[layer_R, expert_R]
        key_R = layer_R * len(self.host_S) + shard_R
        order_R = np.lexsort((expert_R, -worth_R, times_LE[layer_R, expert_R] > 1, key_R))
        layer_R, expert_R, shard_R, key_R = (of[order_R] for of in (layer_R, expert_R, shard_R, key_R))
        slot_R = np.arange(len(key_R)) - np.searchsorted(key_R, key_R)
        fits_R = slot_R < self.slots_LS[layer_R, shard_R]
        layer_R, expert_R, shard_R = layer_R[fits_R], expert_R[fits_R], shard_R[fits_R]
        self.slot_LSK[layer_R, shard_R, slot_R[fits_R]] = expert_R
        self.held_LSE[layer_R, shard_R, expert_R] = True
        np.add.at(self.num_LE, (layer_R, expert_R), 1)
        np.add.at(self.on_host_LHE, (layer_R, self.host_S[shard_R], expert_R), 1)
        self.hosts_LE = (self.on_host_LHE > 0).sum(1)

    def put(self, layer_A: np.ndarray, shard_A: np.ndarray, slot_A: np.ndarray, expert_A: np.ndarray) -> None:
        """Overwrite one slot in each of several different layers."""
        for expert, one in ((self.slot_LSK[layer_A, shard_A, slot_A], -1), (expert_A, 1)):
            real = (expert < self.empty).astype(np.int64) * one
            self.held_LSE[layer_A, shard_A, expert] = real > 0
            self.num_LE[layer_A, expert] += real
            self.on_host_LHE[layer_A, self.host_S[shard_A], expert] += real
            first_or_last = self.on_host_LHE[layer_A, self.host_S[shard_A], expert] == (one > 0)
            self.hosts_LE[layer_A, expert] += real * first_or_last
        self.slot_LSK[layer_A, shard_A, slot_A] = expert_A

    def weight_AE(self, layer_A: np.ndarray) -> np.ndarray:
        """The load of one replica of each expert; 0 for the two that are none."""
        weight_AE: np.ndarray = self.load_LE[layer_A] / np.maximum(self.num_LE[layer_A], 1)
        return weight_AE

    def time_AS(self, layer_A: np.ndarray) -> np.ndarray:
        """Time of each shard in units of the mean one; rounded, so that the order of slots does not tell equal shards apart."""
        slot_AX = self.slot_LSK[layer_A].reshape(len(layer_A), -1)
        weight_AX = np.take_along_axis(self.weight_AE(layer_A), slot_AX, 1)
        rows_AS = weight_AX.reshape(len(layer_A), len(self.capacity_S), -1).sum(2)
        time_AS: np.ndarray = np.round(rows_AS / self.capacity_S, 9)
        return time_AS

    def evict(self, excess_L: np.ndarray, bounds: Bounds) -> None:
        """Take away so many replicas of each layer: first of experts above their ceiling, then those missed least; none of
        experts at their floor. Of an expert's replicas the one goes whose host has another, and whose shard is busiest."""
        left_L = excess_L.copy()
        while (layer_A := np.flatnonzero(left_L > 0)).size:
            num_AE, regret_AE = self.num_LE[layer_A], self.load_LE[layer_A] / np.maximum(self.num_LE[layer_A] - 1, 0.5)
            regret_AE[num_AE > bounds.ceiling_LE[layer_A]] -= 1e9
            regret_AE[num_AE <= bounds.floor_LE[layer_A]] = np.inf
            expert_A = regret_AE.argmin(1)
            held_AS = self.held_LSE[layer_A, :, expert_A]
            crowd_AS = self.on_host_LHE[layer_A[:, None], self.host_S, expert_A[:, None]] > 1
            shard_A = np.where(held_AS, 1e6 * crowd_AS + self.time_AS(layer_A), -1.0).argmax(1)
            slot_A = (self.slot_LSK[layer_A, shard_A] == expert_A[:, None]).argmax(1)
            self.put(layer_A, shard_A, slot_A, np.full(len(layer_A), self.empty))
            left_L[layer_A] -= 1

    def place(self, wanted_LE: np.ndarray) -> None:
        """Add replicas until each expert has as many as wanted, the largest first, each where time is shortest with it;
        on a host without that expert where one has room. What fits nowhere, even with moves, is left out."""
        num_LE = self.num_LE[:, : self.empty]
        weight_LE = self.load_LE[:, : self.empty] / np.maximum(num_LE, wanted_LE)
        layer_R, expert_R = (of.repeat(np.maximum(wanted_LE - num_LE, 0).ravel()) for of in _grid(num_LE.shape))
        order_R = np.lexsort((expert_R, -weight_LE[layer_R, expert_R], layer_R))
        layer_R, expert_R = layer_R[order_R], expert_R[order_R]
        rows_LS = np.einsum("lse,le->ls", self.held_LSE[:, :, : self.empty], weight_LE)
        turn_R = np.arange(len(layer_R)) - np.searchsorted(layer_R, layer_R)
        stuck = []
        for now_A in np.split(np.argsort(turn_R, kind="stable"), np.cumsum(np.bincount(turn_R))[:-1]):
            if now_A.size:
                done_A = self._place_one(layer_R[now_A], expert_R[now_A], weight_LE, rows_LS)
                stuck += [(int(layer_R[i]), int(expert_R[i])) for i in now_A[~done_A]]
        for layer, expert in stuck:
            self._squeeze(layer, expert)

    def _place_one(
        self, layer_A: np.ndarray, expert_A: np.ndarray, weight_LE: np.ndarray, rows_LS: np.ndarray
    ) -> np.ndarray:
        """One expert of each layer; -> whether it found a slot."""
        weight_A = weight_LE[layer_A, expert_A]
        free_ASK = self.slot_LSK[layer_A] == self.empty
        time_AS = (rows_LS[layer_A] + weight_A[:, None]) / self.capacity_S
        time_AS += 1e6 * self.on_host_LHE[layer_A[:, None], self.host_S, expert_A[:, None]]
        time_AS[self.held_LSE[layer_A, :, expert_A] | ~free_ASK.any(2)] = np.inf
        shard_A = time_AS.argmin(1)
        ok_A: np.ndarray = np.isfinite(time_AS[np.arange(len(layer_A)), shard_A])
        layer_A, expert_A, shard_A, free_ASK = layer_A[ok_A], expert_A[ok_A], shard_A[ok_A], free_ASK[ok_A]
        self.put(layer_A, shard_A, free_ASK[np.arange(len(layer_A)), shard_A].argmax(1), expert_A)
        rows_LS[layer_A, shard_A] += weight_A[ok_A]
        return ok_A

    def _squeeze(self, layer: int, expert: int) -> bool:
        """Place one expert where every shard with a free slot has it already: by a chain of moves, the shortest one.

        Fails only where no arrangement holds all that is there and this one too (an augmenting path is looked for).
        """
        held_SE, came_from = self.held_LSE[layer, :, : self.empty], dict[int, int]()
        queue = deque(int(s) for s in np.flatnonzero(~held_SE[:, expert] & (self.slots_LS[layer] > 0)))
        seen = set(queue)
        while queue:
            shard = queue.popleft()
            if (self.slot_LSK[layer, shard] == self.empty).any():
                self._pull(layer, expert, shard, came_from)
                return True
            for other in np.flatnonzero((held_SE[shard] & ~held_SE).any(1) & (self.slots_LS[layer] > 0)).tolist():
                if other not in seen:
                    seen.add(other)
                    came_from[other] = shard
                    queue.append(other)
        return False

    def _pull(self, layer: int, expert: int, shard: int, came_from: dict[int, int]) -> None:
        """Move one expert along each edge towards `shard`, which has a free slot; then put `expert` at the other end."""
        while shard in came_from:
            source = came_from[shard]
            mine, theirs = self.held_LSE[layer, shard], self.held_LSE[layer, source]
            moved = int(np.flatnonzero(theirs & ~mine)[0])
            self._set(layer, shard, self.empty, moved)
            self._set(layer, source, moved, self.empty)
            shard = source
        self._set(layer, shard, self.empty, expert)

    def _set(self, layer: int, shard: int, old: int, new: int) -> None:
        slot = int((self.slot_LSK[layer, shard] == old).argmax())
        self.put(*(np.array([value]) for value in (layer, shard, slot, new)))


def _scaled(load_LE: np.ndarray, capacity: float) -> np.ndarray:
    """float64 [L, E + 2]: rows of each layer's mean shard are 1.0, and no expert has none."""
    mean_L1 = load_LE.mean(1, keepdims=True)
    some_LE = np.maximum(load_LE, QUIET * np.where(mean_L1 > 0, mean_L1, 1.0))
    return np.pad(some_LE * (capacity / some_LE.sum(1, keepdims=True)), ((0, 0), (0, 2)))


def _grid(shape: tuple[int, ...]) -> list[np.ndarray]:
    return [axis.ravel() for axis in np.indices(shape)]
