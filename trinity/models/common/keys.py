"""Names of a model's tensors in a checkpoint: a list of operations, read both ways.

Decisions: a module's path becomes a checkpoint's key by renamings, applied in order; routed experts have keys of their own, one
tensor each or all experts of a layer stacked; both layouts are read, the first is written.
"""

import re
from dataclasses import dataclass, field

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Rename:
    """Rule of names: where `pattern` is found in a module's path, `becomes` is in the checkpoint's key (as in re.sub)."""

    pattern: str
    becomes: str


@dataclass(frozen=True)
class PerExpert:
    """One tensor for each matrix of each expert: [F, D] gate and up, [D, F] down."""

    key: str = "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"

    def of(self, layer: int, expert: int, projection: str) -> str:
        return self.key.format(layer=layer, expert=expert, projection=projection)


@dataclass(frozen=True)
class Stacked:
    """All experts of a layer in two tensors: gate rows before up rows [E, 2F, D], and down [E, D, F]."""

    gate_up: str = "model.layers.{layer}.mlp.experts.gate_up_proj"
    down: str = "model.layers.{layer}.mlp.experts.down_proj"


@dataclass(frozen=True)
class KeyMap:
    """A family's names. `roles`: the first pattern that is found in a key says what its tensor is for."""

    renames: tuple[Rename, ...]
    roles: tuple[tuple[str, str], ...]
    expert: PerExpert = field(default=PerExpert())
    stacked: Stacked = field(default=Stacked())

    def outside(self, path: str) -> str:
        """The checkpoint's key of a tensor at that module path."""
        for rename in self.renames:
            path = re.sub(rename.pattern, rename.becomes, path)
        return path

    def role(self, key: str) -> str:
        """The role of a tensor: embedding, head, norm, attention, router, dense or shared."""
        for pattern, role in self.roles:
            if re.search(pattern, key):
                return role
        raise KeyError(f"no role is named for {key!r}; add a pattern to the family's KeyMap")


ROLES = (
    (r"embed_tokens", "embedding"),
    (r"lm_head", "head"),
    (r"norm\.weight$", "norm"),
    (r"self_attn", "attention"),
    (r"mlp\.(router|gate)\.|expert_bias", "router"),
    (r"shared_experts", "shared"),
    (r"mlp\.", "dense"),
)
