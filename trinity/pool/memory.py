"""Memory that a model's routed experts take on the shards of a pool, one replica of each."""

from collections.abc import Sequence
from typing import NamedTuple

from trinity.config import ModelConfig, OptimConfig
from trinity.experts.sizes import ReplicaBytes, replica_bytes


class ExpertsBytes(NamedTuple):
    """Bytes of all routed experts: what is computed with, in each form that it is kept in; and what training needs besides."""

    values: int
    training: int


def experts_bytes(model: ModelConfig, optim: OptimConfig | None, dtypes: Sequence[str]) -> ExpertsBytes:
    """Bytes of all experts, by `placement.expert_dtype`: of several forms each has its share. `optim` None: they serve."""
    num, forms = len(model.moe_layers) * model.num_experts, dtypes or (model.dtype,)
    each = [replica_bytes(model, optim, form) for form in forms]
    values = sum(num * _values(found) for found in each) // len(forms)
    return ExpertsBytes(values, sum(num * found.most for found in each) // len(forms) - values)


def bytes_by_form(model: ModelConfig, optim: OptimConfig | None, dtypes: Sequence[str]) -> tuple[int, ...]:
    """Bytes of one replica with all that travels with it, on shards of each of these forms."""
    return tuple(replica_bytes(model, optim, form).total for form in dtypes)


def _values(found: ReplicaBytes) -> int:
    return found.weights + found.form + found.adapters
