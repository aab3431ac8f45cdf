"""The numbers of a GLM-4-MoE architecture. Names that other families share are theirs; hf.py has the translation."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trinity.config.model import MAX_EXPERTS, Epsilon, LayerCache, Layers, ModelConfig, Positive, Size
from trinity.models.common.shapes import check_heads, grouped_cache


class Glm4MoeConfig(ModelConfig):
    """Sigmoid routing with a correction bias and groups, shared experts, first layers dense, part of a head rotated."""

    model_type: Literal["glm4_moe"] = "glm4_moe"
    intermediate_size: Size
    num_dense_layers: Layers = 1
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    num_shared_experts: int = Field(default=1, ge=0, le=MAX_EXPERTS)
    route_scale: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = Field(default=1, gt=0, description="groups that experts are chosen from")
    topk_group: int = Field(default=1, gt=0, description="groups that a token may choose experts from")
    use_qk_norm: bool = False
    attention_bias: bool = False
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1)
    rope_theta: Positive = 10000.0
    rms_norm_eps: Epsilon = 1e-5
    initializer_range: Positive = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self)
        if self.num_dense_layers > self.num_hidden_layers:
            raise ValueError(f"num_dense_layers {self.num_dense_layers} > num_hidden_layers {self.num_hidden_layers}")
        if self.rotary_dim % 2:
            raise ValueError(f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} is odd")
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        if self.num_experts % self.n_group or self.num_experts // self.n_group < 2:
            raise ValueError(
                f"n_group {self.n_group} does not cut num_experts {self.num_experts} into groups of two or more"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} > n_group {self.n_group}")
        reach = self.topk_group * (self.num_experts // self.n_group)
        if self.num_experts_per_tok > reach:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} > {reach}, the experts of topk_group groups"
            )

    @property
    def rotary_dim(self) -> int:
        """The number of a head's values that are rotated; the others say nothing of the position."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.num_dense_layers, self.num_hidden_layers))

    @property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        return (grouped_cache(self),) * self.num_hidden_layers

    @property
    def num_query_heads(self) -> int:
        return self.num_attention_heads

    @property
    def init_std(self) -> float:
        return self.initializer_range
