"""Memory of keys and values, as parts that lie side by side: what is stored of a token, and how it is read.

Legend: P slots, N tokens, G key-value heads, d key dim, e value dim (= d but in latent layers).
Decisions: a part is a tensor [layers of a kind, P, ...]; a token's are at one slot of each, and whoever copies blocks copies
those. With 8 bits a token's key and value of each head have a scale of their own, so that nothing needs to be measured before,
and no token's numbers depend on another's; every reader sees what was rounded once, the chunk that computes it included.
"""

import torch
from torch import Tensor

from trinity.config import LayerCache
from trinity.engine.kv_layout import CacheLayout
from trinity.utils.hugepages import lazy_zeros

HIGHEST = 127  # of int8; -128 is not used
SMALLEST = torch.finfo(torch.float32).tiny  # a scale: of numbers that are all 0
Parts = tuple[
    Tensor, ...
]  # keys [..., G, d], values [..., G, e] and, of 8 bits, their scales [..., G]; latent: keys alone


class KVPools:
    """Keys and values of all layers; zero at first. `dtype`: of the model; what is stored may be smaller (kv_cache_dtype)."""

    def __init__(self, layout: CacheLayout, device: torch.device, dtype: torch.dtype):
        self.device, self._dtype, self.is_int8 = device, dtype, layout.kv_cache_dtype == "int8"
        self._parts = {kind: self._made(layout, kind) for kind in layout.kinds}
        self._layers = [(kind, tuple(part[index] for part in self._parts[kind])) for kind, index in layout.places]
        places = ((kind, [part.data_ptr() for part in parts]) for kind, parts in self._layers)
        self.addresses = [(kind, (*found, 0, 0)[:4]) for kind, found in places]  # keys, values, their scales or 0
        self.described: dict[object, tuple[int, bytes, bytes]] = {}  # for the extension, by whoever describes them

    def parts(self, kind: LayerCache) -> Parts:
        """Everything that is stored of a kind, each [layers of the kind, P slots, ...]."""
        return self._parts[kind]

    def of(self, layer: int) -> tuple[LayerCache, Parts]:
        """The layer's kind, and what is stored of it, each [P, ...]."""
        return self._layers[layer]

    def stored(self, k_NGd: Tensor, v_NGe: Tensor | None) -> Parts:
        """Parts of new tokens as they will be stored; `v_NGe` is None in a latent layer."""
        if v_NGe is None:
            return (k_NGd,)
        if not self.is_int8:
            return k_NGd, v_NGe
        (k, k_scale), (v, v_scale) = rounded(k_NGd), rounded(v_NGe)
        return k, v, k_scale, v_scale

    def widened(self, kind: LayerCache, parts: Parts) -> tuple[Tensor, Tensor]:
        """Keys and values that parts stand for, in the model's type."""
        if kind.is_latent:
            return parts[0], parts[0][..., : kind.value_dim]
        if not self.is_int8:
            return parts[0], parts[1]
        k, v, *scales = parts
        k, v = (part * scale[..., None] for part, scale in zip((k, v), scales, strict=True))
        return k.to(self._dtype), v.to(self._dtype)

    def write(self, layer: int, slots: Tensor, parts: Parts) -> None:
        """Store these parts of new tokens at these slots."""
        for pool, part in zip(self._layers[layer][1], parts, strict=True):
            pool.index_copy_(0, slots, part)

    def _made(self, layout: CacheLayout, kind: LayerCache) -> Parts:
        shape = (layout.num_layers(kind), layout.num_blocks[kind] * layout.block_size, kind.num_heads)
        dims = [kind.key_dim] if kind.is_latent else [kind.key_dim, kind.value_dim]
        parts = [self._zeros((*shape, dim), torch.int8 if self.is_int8 else self._dtype) for dim in dims]
        return *parts, *(self._zeros(shape, torch.float32) for _ in dims if self.is_int8)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        on_cpu = self.device.type == "cpu"
        return lazy_zeros(shape, dtype) if on_cpu else torch.zeros(*shape, device=self.device, dtype=dtype)


def rounded(x_NGd: Tensor) -> tuple[Tensor, Tensor]:
    """-> int8 numbers and their scale_NG, float32: number * scale is x within half a scale. What is not finite has a scale that
    is not."""
    x = x_NGd.float()
    scale_NG = (x.abs().amax(-1) / HIGHEST).clamp(min=SMALLEST)
    return (x / scale_NG[..., None]).round_().to(torch.int8), scale_NG
