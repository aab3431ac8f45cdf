"""The architecture of a model: what every family says of itself, in numbers. The families are in trinity/models/.

Legend: D model, E experts, K top-k.
Decisions: a family's own fields are those of its folder; what engine, trainer, pool and checkpoint need is declared here, and
nothing else is known of a model outside trinity/models/. A mapping without `model_type` is AFMoE's, as runs of before wrote it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trinity.config.yaml import Frozen
from trinity.errors import ConfigError

FIRST_FAMILY = "afmoe"
NEW_IN_STAGE = (
    "dtype",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
)  # other than of the weights it begins with
SCALE_BYTES = 4  # of a key's or a value's int8 numbers, in the cache
# Far above any model that is known, and below what would hurt before it is found out to be nonsense.
MAX_LAYERS, MAX_EXPERTS, MAX_SIZE = 1 << 12, 1 << 16, 1 << 24
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]  # of a tensor along one dimension
Tokens = Annotated[int, Field(gt=0, le=1 << 40)]
TokenId = Annotated[int, Field(ge=-1, lt=MAX_SIZE)]  # -1: some say so where there is none
EndIds = TokenId | Annotated[tuple[TokenId, ...], Field(max_length=1 << 10, fail_fast=True)] | None
Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
Positive = Annotated[float, Field(gt=0)]
Epsilon = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class LayerCache:
    """Cache of one attention layer: the bytes it keeps of each token that it has seen, and of how many.

    Keys are `num_heads` x `key_dim` numbers, values `num_heads` x `value_dim`; a latent layer keeps keys alone, and the first
    `value_dim` numbers of a key are its value. `window`: tokens that are seen, the newest included; None: all. Scores are
    multiplied by `scale`.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    is_latent: bool = False

    @property
    def own_value_dim(self) -> int:
        """Numbers of a value that are stored beside the key."""
        return 0 if self.is_latent else self.value_dim

    def token_bytes(self, itemsize: int, is_int8: bool = False) -> int:
        """Bytes of a token in one layer: `itemsize` each number, or 1 and for each head's key and value a scale of 4."""
        numbers = self.key_dim + self.own_value_dim
        return self.num_heads * (numbers + 2 * SCALE_BYTES if is_int8 else numbers * itemsize)


class ModelConfig(Frozen):
    """Base of every family's architecture. Field names are those of its Hugging Face `config.json` where it has one."""

    families: ClassVar[dict[str, type["ModelConfig"]]] = {}

    model_type: str
    vocab_size: Size
    hidden_size: Size
    moe_intermediate_size: Size = Field(description="hidden size of one routed expert")
    num_hidden_layers: Layers = Field(gt=0)
    num_experts: int = Field(gt=0, le=MAX_EXPERTS, description="routed experts of a layer that has any")
    num_experts_per_tok: int = Field(gt=0)
    max_position_embeddings: Tokens
    bos_token_id: TokenId | None = None
    eos_token_id: EndIds = Field(
        default=None, description="what ends a text; of several, the first ends the documents of a training run"
    )
    pad_token_id: TokenId | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_invariant: bool = Field(
        default=True,
        description="on CPUs: a token's numbers are the same bits in any batch, in training as in serving",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Register the family under its `model_type`."""
        ModelConfig.families[cls.model_fields["model_type"].default] = cls

    @staticmethod
    def family(tree: Mapping[str, object]) -> type["ModelConfig"]:
        """The class of a mapping's `model_type`. Raises ConfigError for one that is not known."""
        name = tree.get("model_type", FIRST_FAMILY)
        if name not in ModelConfig.families:
            raise ConfigError(f"model_type {name!r} is not known; there are {', '.join(sorted(ModelConfig.families))}")
        return ModelConfig.families[str(name)]

    @staticmethod
    def of(tree: "ModelConfig | Mapping[str, object]") -> "ModelConfig":
        """The family's own class, checked. Raises ConfigError or pydantic's ValidationError."""
        return tree if isinstance(tree, ModelConfig) else ModelConfig.family(tree).model_validate(tree)

    # -- the contract: what is asked of a model without building it

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Whichever of them is generated ends the text."""
        ids = self.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    @property
    def document_eos_id(self) -> int | None:
        """The one of them that ends the documents of a training run."""
        return next(iter(self.eos_token_ids), None)

    def differs_from(self, other: "ModelConfig", but: Sequence[str]) -> list[str]:
        """Words for each setting that a run could not go on with from weights of the other, but these. Of what ends a text that
        is what ends its documents."""
        theirs, mine = (each.model_dump() | {"eos_token_id": each.document_eos_id} for each in (other, self))
        return [
            f"{name} {theirs.get(name)} instead of {value}"
            for name, value in mine.items()
            if theirs.get(name) != value and name not in but
        ]

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the weights, and of the cache unless engine.kv_cache_dtype says otherwise."""
        return 4 if self.dtype == "float32" else 2

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, ascending."""
        raise NotImplementedError

    @property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        """The cache of each layer: its KVSpec."""
        raise NotImplementedError

    @property
    def num_query_heads(self) -> int:
        """Heads of a layer's attention; keys and values may have fewer."""
        raise NotImplementedError

    @property
    def init_std(self) -> float:
        """Standard deviation of a fresh matrix, a routed expert's included (trinity/models/rules/init.py)."""
        raise NotImplementedError

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok {self.num_experts_per_tok} > num_experts {self.num_experts}",
        )
        return self


def require(holds: Any, message: str) -> None:
    """Raise the ValueError that pydantic turns into a sentence about the setting."""
    if not holds:
        raise ValueError(message)
