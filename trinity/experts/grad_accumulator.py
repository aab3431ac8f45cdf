"""Gradients that one attempt at a step has gathered on a shard, and the backward ops that they are the sum of.

Legend: E local experts of a layer, N = 3F rows of one expert, D model. Of adapters an expert's gradient is one row.
Decisions: gradients are fp32. Each caller's are added up apart and then in the callers' order, so that the sum does not depend
on who was faster; without `is_ordered` all go to one sum, which takes less memory. Replicas of an expert take up one another's
gradients in the table's order of holders: all have the same sum, bit for bit. An accumulator is of one attempt for
good: who still works with that of an older one cannot touch what counts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trinity.errors import StepConflict
from trinity.experts.peers import Peers, fetched
from trinity.experts.stacked import packed, unpacked
from trinity.optim.optimizer import sq_norm
from trinity.rpc.messages import GRADIENT, Experts, Fetch, Prepare, caller_of

FETCH_S = 60.0
FUTURE_US = 24 * 3600 * 1_000_000  # attempts are numbered by the clock: one of the far future would void all others
Gradients = dict[str, Tensor]  # name of a stack -> stack
Trained = Mapping[str, Tensor]  # the stacks of a layer that take steps, by name


class GradAccumulator:
    """Sums of one attempt. Owned by a shard, whose lock guards it; sharing needs no lock."""

    def __init__(self, shard: str, attempt: int, is_ordered: bool):
        self.attempt = attempt
        self._shard, self._is_ordered = shard, is_ordered
        self._ops: set[str] = set()
        self._callers: dict[tuple[int, str], Gradients] = {}
        self._is_closed = self._is_taken = False
        self._shared: dict[tuple[int, int], tuple[bool, Tensor]] = {}  # (layer, position): are we primary; sum_ND

    def renewed(self) -> "GradAccumulator":
        """One for the same attempt with nothing in it: the weights that the gradients were of are others now."""
        return GradAccumulator(self._shard, self.attempt, self._is_ordered)

    def of(self, attempt: int) -> "GradAccumulator":
        """This one for its own attempt, an empty one for a newer attempt, which makes this one void.

        Raises StepConflict for an older attempt, whose stragglers are refused, and for one of the future.
        """
        if attempt > time.time_ns() // 1000 + FUTURE_US:
            raise StepConflict(f"attempt {attempt:x} is of the future; are the clocks of this cluster apart?")
        if attempt < self.attempt:
            raise StepConflict(f"shard {self._shard}: attempt {attempt:x} was given up for {self.attempt:x}")
        return self if attempt == self.attempt else GradAccumulator(self._shard, attempt, self._is_ordered)

    @property
    def num_ops(self) -> int:
        """Backward ops that were added, each once."""
        return len(self._ops)

    def has(self, op_id: str) -> bool:
        return op_id in self._ops

    def add(self, op_id: str, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Add an op's gradients to its caller's; to be called once for each op_id. Raises StepConflict after `close`."""
        sums = self._sums_for(op_id)
        for name, gradient in zip(names, gradients, strict=True):
            if name in sums:
                sums[name].add_(gradient)
            else:
                sums[name] = gradient.float()  # laid out as its weight: the backends see to it
        self._ops.add(op_id)

    @contextmanager
    def adding(self, op_id: str, trained: Trained) -> Iterator[tuple[list[Tensor], bool]]:
        """Have an op's gradients added to its caller's sums inside the block, instead of `add`: -> the sums of the stacks, and
        whether they are new and hold nothing yet. New ones are not kept where the block fails. Raises StepConflict after
        `close`."""
        sums = self._sums_for(op_id)
        is_new = not all(name in sums for name in trained)
        stacks = {n: torch.empty_like(t, dtype=torch.float32) if is_new else sums[n] for n, t in trained.items()}
        yield list(stacks.values()), is_new
        sums.update(stacks)
        self._ops.add(op_id)

    def _sums_for(self, op_id: str) -> Gradients:
        """The sums of an op's caller."""
        if self._is_closed:
            raise StepConflict(f"{op_id} comes after the step was prepared")
        return self._callers.setdefault(caller_of(op_id) if self._is_ordered else (0, ""), {})

    def close(self) -> None:
        """Add up all callers' gradients; no op comes after. Harmless when repeated."""
        self._is_closed = True
        if len(self._callers) > 1:
            self._callers = {(0, ""): self.sums()}

    def share(self, message: Prepare, held: Experts, peers: Peers | None, device: torch.device | str = "cpu") -> None:
        """Take up the gradients that other replicas of our experts have. They may arrive in the host's memory; they are added
        on `device`, ours. Raises what the peers raise, and StepConflict for an expert that is still to be copied to us."""
        me = self._shard
        for layer, expert, holders in _shared_by(message, me):
            assert peers is not None, f"shard {me} shares experts and was given no peers"
            if expert not in held[layer]:
                raise StepConflict(
                    f"shard {me} does not hold expert ({layer}, {expert}) yet; the step must wait for it"
                )
            at = held[layer].index(expert)
            if (layer, at) not in self._shared:
                own_ND = self.rows(layer, at, None)
                call = Fetch(layer, expert, message.step - 1, time.monotonic() + FETCH_S, GRADIENT)
                parts = [own_ND if s == me else fetched(peers, s, call).to(device) for s in holders]
                self._shared[layer, at] = holders[0] == me, _added(parts)

    def sums(self) -> Gradients:
        """Sums over all callers, by name."""
        names = dict.fromkeys(name for sums in self._callers.values() for name in sums)
        return {name: self._sum(name) for name in names}

    def rows(self, layer: int, at: int, like: Trained | None) -> Tensor:
        """rows_ND: our own gradient of one expert; of no rows (numel 0) where nothing came and no shape is given."""
        if names := self._names(layer):
            return packed([self._sum(name)[at] for name in names])
        if not like:
            return torch.empty(0, 0)
        return packed([torch.zeros_like(stack[at], dtype=torch.float32) for stack in like.values()])

    def sq_norm(self) -> float:
        """Squared norm of the gradients of all experts that this shard is the primary of."""
        if not self._shared:
            return sq_norm(self._total.values())
        own = [
            stack[at]
            for name, stack in self._total.items()
            for at in range(len(stack))
            if not self._is_shared(name, at)
        ]
        return sq_norm([*own, *(sum_ND for is_primary, sum_ND in self._shared.values() if is_primary)])

    def take(self, attempt: int, trained: Mapping[int, Trained], num_ops: int | None = None) -> Gradients:
        """The step's gradients of these stacks, the caller's from here on. Raises StepConflict unless that attempt was
        prepared, and where they are not of so many ops: what was gathered became void, and a late message prepared the rest."""
        if attempt != self.attempt or not self._is_closed or self._is_taken:
            raise StepConflict(f"attempt {attempt:x} is not prepared; {self.attempt:x} is gathering")
        if num_ops not in (None, self.num_ops):
            raise StepConflict(f"shard {self._shard} has {self.num_ops} backward ops of the {num_ops} that it prepared")
        total, self._callers, self._is_taken = self._total, {}, True
        for (layer, at), (_, sum_ND) in self._shared.items():
            shapes = [stack.shape[1:] for stack in trained[layer].values()]
            parts = unpacked(sum_ND, shapes) if sum_ND.numel() else ()
            for (name, stack), part_FD in zip(trained[layer].items(), parts, strict=False):
                if name not in total:  # rows of this layer came to other replicas only
                    total[name] = torch.zeros_like(stack, dtype=torch.float32)
                total[name][at].copy_(part_FD)
        return total

    @property
    def _total(self) -> Gradients:
        return next(iter(self._callers.values()), {})

    def _names(self, layer: int) -> list[str]:
        """The stacks of a layer that anything came for."""
        found = dict.fromkeys(name for sums in self._callers.values() for name in sums)
        return [name for name in found if name.startswith(f"{layer}.")]

    def _sum(self, name: str) -> Tensor:
        """Sum over all callers, in their order."""
        found = [sums[name] for _, sums in sorted(self._callers.items()) if name in sums]
        total = found[0] if len(found) == 1 else found[0].clone()
        for part in found[1:]:
            total.add_(part)
        return total

    def _is_shared(self, name: str, at: int) -> bool:
        return (int(name.partition(".")[0]), at) in self._shared


def _shared_by(message: Prepare, me: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(layer, expert, holders) of each expert that this shard and others hold."""
    for layer, experts in message.shared.items():
        for expert, holders in experts.items():
            if me in holders:
                yield layer, expert, holders


def _added(parts: Sequence[Tensor]) -> Tensor:
    """Sum of the parts, in their order; those without rows add nothing."""
    total: Tensor | None = None
    for part in parts:
        if part.numel():
            total = part.clone() if total is None else total.add_(part)
    return torch.empty(0) if total is None else total
