"""Memory of an expert on a shard, by what it is made of: worked out from settings, before there is any.

Decision: one account for all who must know: a shard before it reads, the command that shares out a machine, the service that
moves replicas. What a step needs besides is counted where experts are trained: a version is made beside the present one.
"""

from typing import NamedTuple

from trinity.config import ModelConfig, OptimConfig
from trinity.experts.derived import FORMS, shapes_of
from trinity.optim.optimizer import MASTER, REST, RULES
from trinity.utils.units import size


class ReplicaBytes(NamedTuple):
    """Bytes of one replica: weights as they are trained or served, the same in another form, adapters, optimizer state. `step`:
    what training it takes besides, while a step is made."""

    weights: int
    form: int
    adapters: int
    state: int
    step: int

    @property
    def total(self) -> int:
        """All that stays, and travels when it is moved."""
        return self.weights + self.form + self.adapters + self.state

    @property
    def most(self) -> int:
        return self.total + self.step

    def described(self, num: int, dtype: str | None) -> str:
        """Words for what so many of them take."""
        named = {"weights": self.weights, f"{dtype}": self.form, "adapters": self.adapters}
        named |= {"optimizer state": self.state, "a step": self.step}
        return ", ".join(f"{name} {size(num * found)}" for name, found in named.items() if found)


def replica_bytes(model: ModelConfig, optim: OptimConfig | None, dtype: str | None) -> ReplicaBytes:
    """Bytes of a replica on a shard that computes inference in `dtype`, None being the model's own; `optim` None: it serves."""
    form = FORMS.get(dtype or model.dtype) if dtype != model.dtype else None
    own = sum(4 * form.num_words(shape) for shape in shapes_of(model)) if form and dtype else 0
    weights = 0 if own and optim is None else model.expert_params * model.itemsize
    if optim is None or not optim.trains_experts:
        return ReplicaBytes(weights, own, 0, 0, 0)
    if rank := optim.lora.rank:
        adapters = 4 * sum(rank * sum(shape) for shape in shapes_of(model))
        state = adapters * len(RULES[REST].kinds)
        return ReplicaBytes(weights, own, adapters, state, 2 * adapters + state)
    kinds = (*RULES[optim.matrices].kinds, *([MASTER] if model.itemsize < 4 else []))
    state, gradient = 4 * model.expert_params * len(kinds), 4 * model.expert_params
    return ReplicaBytes(weights, own, 0, state, weights + own + state + gradient)
