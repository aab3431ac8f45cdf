"""Checks of the numbers of grouped-query attention, whichever family they belong to."""

from typing import Protocol

from trinity.config.model import LayerCache


class Heads(Protocol):
    """The shape of a layer's heads."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def check_heads(config: Heads) -> None:
    """Raise ValueError where query heads cannot share key-value heads, or a head cannot be rotated in pairs."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} must be even for rotary embeddings")


def grouped_cache(config: Heads, window: int | None = None) -> LayerCache:
    """The cache of a layer of grouped-query attention: keys and values of every key-value head."""
    return LayerCache(config.num_key_value_heads, config.head_dim, config.head_dim, config.head_dim**-0.5, window)
