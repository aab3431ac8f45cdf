"""The architecture of a model: the `model` section of the settings."""

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from trinity.config.yaml import Frozen

LayerType = Literal["sliding_attention", "full_attention"]


class ModelConfig(Frozen):
    """An AFMoE architecture, with the field names of its Hugging Face `config.json` (shared words, no translation)."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_dense_layers: int = Field(ge=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    num_shared_experts: int = Field(ge=0)
    route_scale: float
    sliding_window: int = Field(gt=0)
    global_attn_every_n_layers: int = Field(default=4, gt=0)
    layer_types: tuple[LayerType, ...] = ()
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mup_enabled: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | None = 3
    pad_token_id: int | None = 12
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_invariant: bool = Field(
        default=True,
        description="on CPUs: a token's numbers are the same bits in any batch, in training as in serving",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_layer_types(cls, data: Any) -> Any:
        """Every n-th layer attends globally, the others within their window, unless listed one by one."""
        if not isinstance(data, dict):
            return data
        num, every = data.get("num_hidden_layers"), data.get("global_attn_every_n_layers", 4)
        if isinstance(num, int) and isinstance(every, int) and every > 0 and not data.get("layer_types"):
            kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num)]
            data = {**data, "layer_types": tuple(kinds)}
        return data

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        checks = [
            (
                len(self.layer_types) == self.num_hidden_layers,
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers",
            ),
            (
                self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok {self.num_experts_per_tok} > num_experts {self.num_experts}",
            ),
            (
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}",
            ),
            (
                self.num_dense_layers <= self.num_hidden_layers,
                f"num_dense_layers {self.num_dense_layers} > num_hidden_layers {self.num_hidden_layers}",
            ),
            (self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for rotary embeddings"),
        ]
        for holds, message in checks:
            if not holds:
                raise ValueError(message)
        return self

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(range(self.num_dense_layers, self.num_hidden_layers))

    @cached_property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size
