"""The numbers of an AFMoE architecture, with the field names of its Hugging Face `config.json`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trinity.config.model import (
    MAX_EXPERTS,
    MAX_LAYERS,
    EndIds,
    Epsilon,
    LayerCache,
    Layers,
    ModelConfig,
    Positive,
    Size,
    TokenId,
    Tokens,
)
from trinity.models.common.shapes import check_heads, grouped_cache

LayerType = Literal["sliding_attention", "full_attention"]


class AfmoeConfig(ModelConfig):
    """Arcee's Trinity models: Nano, Mini, Large."""

    model_type: Literal["afmoe"] = "afmoe"
    intermediate_size: Size
    num_dense_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    num_shared_experts: int = Field(ge=0, le=MAX_EXPERTS)
    route_scale: float
    sliding_window: Tokens
    global_attn_every_n_layers: int = Field(default=4, gt=0)
    layer_types: Annotated[tuple[LayerType, ...], Field(max_length=MAX_LAYERS, fail_fast=True)] = ()
    rope_theta: Positive = 10000.0
    rms_norm_eps: Epsilon = 1e-5
    mup_enabled: bool = True
    bos_token_id: TokenId | None = 0
    eos_token_id: EndIds = 3
    pad_token_id: TokenId | None = 12

    @model_validator(mode="before")
    @classmethod
    def _fill_layer_types(cls, data: Any) -> Any:
        """Every n-th layer attends globally, the others within their window, unless listed one by one."""
        if not isinstance(data, dict):
            return data
        num, every = data.get("num_hidden_layers"), data.get("global_attn_every_n_layers", 4)
        if data.get("layer_types") or not (isinstance(num, int) and isinstance(every, int)):
            return data
        if num <= MAX_LAYERS and every > 0:  # else it is refused below
            kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num)]
            data = {**data, "layer_types": tuple(kinds)}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if self.num_dense_layers > self.num_hidden_layers:
            raise ValueError(f"num_dense_layers {self.num_dense_layers} > num_hidden_layers {self.num_hidden_layers}")
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(range(self.num_dense_layers, self.num_hidden_layers))

    @property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        windows = [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]
        return tuple(grouped_cache(self, window) for window in windows)

    @property
    def num_query_heads(self) -> int:
        return self.num_attention_heads

    @property
    def init_std(self) -> float:
        """0.5 / sqrt(hidden_size) (arXiv 2602.17004)."""
        return 0.5 / self.hidden_size**0.5
