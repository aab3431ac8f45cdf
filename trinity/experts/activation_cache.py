"""Activations of forwards that a backward is to come for, as many as fit; a cache, never the truth: rows are sent again.

Legend: R rows, D model, K slots of a row.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from torch import Tensor

from trinity.ops.gradient_sums import Sums


@dataclass
class Activations:
    """Memory of one op: the graph from its inputs to its result until the backward, whose answer stays."""

    x_RD: Tensor
    weights_RK: Tensor
    y_RD: Tensor
    num_bytes: int
    sums: Sums = field(default_factory=Sums)  # where its backward adds the gradients of weights
    answer: tuple[Tensor, Tensor] | None = None  # dx_RD, dweights_RK

    def keep_only(self, answer: tuple[Tensor, Tensor]) -> None:
        """Remember the backward's answer, and let go of the graph."""
        self.answer, self.y_RD = answer, self.y_RD.detach()


class ActivationCache:
    """Ops by op_id, the oldest leaving first when there are more than `max_bytes`; the newest always stays. The owner's lock
    guards it."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._ops: OrderedDict[str, Activations] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ops)

    def get(self, op_id: str) -> Activations | None:
        return self._ops.get(op_id)

    def put(self, op_id: str, op: Activations) -> Activations:
        """Take in an op that is not here."""
        assert op_id not in self._ops, op_id
        self._ops[op_id] = op
        self.num_bytes += op.num_bytes
        while self.num_bytes > self.max_bytes and len(self._ops) > 1:
            self.num_bytes -= self._ops.popitem(last=False)[1].num_bytes
        return op

    def clear(self) -> None:
        self._ops.clear()
        self.num_bytes = 0
