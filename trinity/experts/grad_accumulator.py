"""What one attempt at a step has gathered on a shard: which backward ops, and the gradients they add up to.

Legend: E local experts of a layer, N = 3F rows of one expert, D model.
Decisions: gradients are fp32. Each caller's are added up apart and then in the callers' order, so that the sum does not depend
on who was faster; without `is_ordered` all go to one sum, which takes less memory. Replicas of an expert take up one another's
gradients in the table's order of holders: all have the same sum, bit for bit.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trinity.errors import StepConflict
from trinity.experts.base import LayerWeights
from trinity.experts.stacked import names_of
from trinity.optim.optimizer import sq_norm
from trinity.rpc.messages import GRADIENT, Experts, Fetch, Prepare, caller_of

FETCH_S = 60.0
Gradients = dict[str, Tensor]  # `{layer}.{gate|up|down}` -> stack


class GradAccumulator:
    """Owned by a shard, whose lock guards it."""

    def __init__(self, attempt: int, is_ordered: bool):
        self.attempt, self.is_ordered = attempt, is_ordered
        self._ops: set[str] = set()
        self._callers: dict[tuple[int, str], Gradients] = {}
        self._is_closed = self._is_taken = False
        self._shared: dict[tuple[int, int], tuple[bool, Tensor]] = {}  # (layer, position): are we primary; sum_ND

    @property
    def num_ops(self) -> int:
        return len(self._ops)

    def has(self, op_id: str) -> bool:
        return op_id in self._ops

    def add(self, op_id: str, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Once for each op_id. Raises StepConflict when the sums have been taken already."""
        if self._is_closed:
            raise StepConflict(f"{op_id} comes after the step was prepared")
        sums = self._callers.setdefault(caller_of(op_id) if self.is_ordered else (0, ""), {})
        for name, gradient in zip(names, gradients, strict=True):
            if name in sums:
                sums[name].add_(gradient)
            else:
                sums[name] = gradient.float()  # laid out as its weight: the backends see to it
        self._ops.add(op_id)

    def close(self) -> None:
        """Add up all callers'. Harmless when repeated."""
        self._is_closed = True
        if len(self._callers) > 1:
            self._callers = {(0, ""): self.sums()}

    def share(self, message: Prepare, me: str, held: Experts, peers: Any, device: torch.device | str) -> None:
        """Take up the gradients that other replicas of our experts have. They may arrive in the host's memory; they are added
        on `device`, ours. Raises what the peers raise."""
        for layer, expert, holders in _ours(message, me):
            at = held[layer].index(expert)
            if (layer, at) not in self._shared:
                own_ND = self.rows(layer, at, None)
                call = Fetch(layer, expert, message.step - 1, time.time() + FETCH_S, GRADIENT)
                parts = [own_ND if s == me else peers.send(s, "fetch", call).result().to(device) for s in holders]
                self._shared[layer, at] = holders[0] == me, _added(parts)

    def sums(self) -> Gradients:
        """Of all callers, by name."""
        names = dict.fromkeys(name for sums in self._callers.values() for name in sums)
        return {name: self._sum(name) for name in names}

    def rows(self, layer: int, at: int, like: LayerWeights | None) -> Tensor:
        """rows_ND: our own gradient of one expert; of no rows (numel 0) where nothing came and no shape is given."""
        if any(names_of(layer)[0] in sums for sums in self._callers.values()):
            return torch.cat([self._sum(name)[at] for name in names_of(layer)])
        return (
            torch.empty(0) if like is None else torch.cat([torch.zeros_like(w[at], dtype=torch.float32) for w in like])
        )

    def sq_norm(self) -> float:
        """Of all experts that we are the primary of."""
        if not self._shared:
            return sq_norm(self._total.values())
        own = [
            stack[at]
            for name, stack in self._total.items()
            for at in range(len(stack))
            if not self._is_shared(name, at)
        ]
        return sq_norm([*own, *(sum_ND for is_primary, sum_ND in self._shared.values() if is_primary)])

    def take(self, attempt: int, weights: dict[int, LayerWeights]) -> Gradients:
        """The step's gradients of these weights, the caller's from here on. Raises StepConflict unless that attempt was
        prepared."""
        if attempt != self.attempt or not self._is_closed or self._is_taken:
            raise StepConflict(f"attempt {attempt:x} is not prepared; {self.attempt:x} is gathering")
        total, self._callers, self._is_taken = self._total, {}, True
        for (layer, at), (_, sum_ND) in self._shared.items():
            parts = sum_ND.chunk(3) if sum_ND.numel() else ()
            for name, stack, part_FD in zip(names_of(layer), weights[layer], parts, strict=False):
                if name not in total:  # rows of this layer came to other replicas only
                    total[name] = torch.zeros_like(stack, dtype=torch.float32)
                total[name][at].copy_(part_FD)
        return total

    @property
    def _total(self) -> Gradients:
        return next(iter(self._callers.values()), {})

    def _sum(self, name: str) -> Tensor:
        """Of all callers, in their order."""
        found = [sums[name] for _, sums in sorted(self._callers.items()) if name in sums]
        total = found[0] if len(found) == 1 else found[0].clone()
        for part in found[1:]:
            total.add_(part)
        return total

    def _is_shared(self, name: str, at: int) -> bool:
        return (int(name.partition(".")[0]), at) in self._shared


def _ours(message: Prepare, me: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    for layer, experts in message.shared.items():
        for expert, holders in experts.items():
            if me in holders:
                yield layer, expert, holders


def _added(parts: Sequence[Tensor]) -> Tensor:
    """In their order; those without rows add nothing."""
    total: Tensor | None = None
    for part in parts:
        if part.numel():
            total = part.clone() if total is None else total.add_(part)
    return torch.empty(0) if total is None else total
