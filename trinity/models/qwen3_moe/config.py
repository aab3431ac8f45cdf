"""The numbers of a Qwen3-MoE architecture, with the field names of its Hugging Face `config.json`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trinity.config.model import MAX_LAYERS, Epsilon, LayerCache, ModelConfig, Positive, Size
from trinity.models.common.shapes import check_heads, grouped_cache


class Qwen3MoeConfig(ModelConfig):
    """Softmax routing, no shared expert, every layer attends to all tokens; dense layers where it is said so."""

    model_type: Literal["qwen3_moe"] = "qwen3_moe"
    intermediate_size: Size = Field(description="of the dense layers, where there are any")
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(default=1, gt=0, description="every n-th layer has experts")
    mlp_only_layers: Annotated[tuple[int, ...], Field(max_length=MAX_LAYERS, fail_fast=True)] = Field(
        default=(), description="layers without experts, whatever the step says"
    )
    attention_bias: bool = False
    rope_theta: Positive = 10000.0
    rms_norm_eps: Epsilon = 1e-6
    initializer_range: Positive = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self)
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        sparse = (i for i in range(self.num_hidden_layers) if (i + 1) % self.decoder_sparse_step == 0)
        return tuple(i for i in sparse if i not in self.mlp_only_layers)

    @property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        return (grouped_cache(self),) * self.num_hidden_layers

    @property
    def num_query_heads(self) -> int:
        return self.num_attention_heads

    @property
    def init_std(self) -> float:
        return self.initializer_range
