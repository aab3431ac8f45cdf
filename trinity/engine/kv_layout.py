"""Sizes of the paged KV cache: how many blocks of each kind of layer its memory is split into. Host code, no torch.

A kind is each LayerCache that layers have. Decision: room is for `max_num_seqs` sequences that run and for as many again that
have ended (`max_num_kept`), whose blocks are found by those that begin alike.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from trinity.config import EngineConfig, LayerCache, ModelConfig
from trinity.errors import ConfigError


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def window_blocks(window: int, block_size: int) -> int:
    """Most blocks that `window` consecutive positions can touch."""
    return ceil_div(window - 1, block_size) + 1


@dataclass(frozen=True)
class CacheLayout:
    """Numbers of blocks of each kind, in all and for one sequence at most, and a block's bytes over all its layers.

    `places[layer]`: the layer's kind, and its number among the layers of that kind. Kinds that see everything come first.
    """

    block_size: int
    max_model_len: int
    kinds: tuple[LayerCache, ...]
    places: tuple[tuple[LayerCache, int], ...]
    num_blocks: Mapping[LayerCache, int]
    blocks_per_seq: Mapping[LayerCache, int]
    block_bytes: Mapping[LayerCache, int]
    kv_cache_dtype: str = "auto"

    @property
    def total_bytes(self) -> int:
        return sum(self.num_blocks[kind] * self.block_bytes[kind] for kind in self.kinds)

    def num_layers(self, kind: LayerCache) -> int:
        return sum(each == kind for each, _ in self.places)


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of a block of each kind, over all the layers of the kind. A window leaves room for `lookahead` tokens that may turn
    out to be no part of the sequence: they must not lie where its last token looks back at."""

    block_size: int
    block_bytes: Mapping[LayerCache, int]
    lookahead: int = 0

    @classmethod
    def of(cls, config: ModelConfig, settings: EngineConfig, itemsize: int) -> "BlockSizes":
        """`itemsize` is the bytes of one number of the model. Kinds that see everything come first. Raises ConfigError for a
        kind that is not kept in what `kv_cache_dtype` asks for."""
        caches, is_int8 = config.layer_caches, settings.kv_cache_dtype == "int8"
        if is_int8 and (latent := [str(layer) for layer, cache in enumerate(caches) if cache.is_latent]):
            raise ConfigError(
                f"engine.kv_cache_dtype int8 is for keys and values of heads; layers {', '.join(latent)} keep latent keys: "
                "leave it out (auto)"
            )
        kinds = sorted(dict.fromkeys(caches), key=lambda kind: kind.window is not None)
        sizes = {kind: settings.block_size * kind.token_bytes(itemsize, is_int8) * caches.count(kind) for kind in kinds}
        return cls(settings.block_size, sizes, settings.max_draft_tokens)

    def blocks_per_seq(self, num_tokens: int) -> dict[LayerCache, int]:
        """Blocks of each kind that a sequence of so many tokens takes."""
        every, size = ceil_div(num_tokens, self.block_size), self.block_size
        windows = {
            kind: every if kind.window is None else window_blocks(kind.window + self.lookahead, size)
            for kind in self.block_bytes
        }
        return {kind: min(every, blocks) for kind, blocks in windows.items()}

    def bytes_per_seq(self, num_tokens: int) -> int:
        return sum(num * self.block_bytes[kind] for kind, num in self.blocks_per_seq(num_tokens).items())

    def longest(self, num_bytes: int, most: int) -> int:
        """Tokens of the longest sequence that fits into so many bytes, and not more than `most`; 0: none does."""
        counts, size = range(1, ceil_div(most, self.block_size) + 1), self.block_size
        return min(most, size * bisect_right(counts, num_bytes, key=lambda count: self.bytes_per_seq(count * size)))


def plan_layout(config: ModelConfig, settings: EngineConfig, itemsize: int) -> CacheLayout:
    """Split `kv_cache_bytes`, which must be a number here (memory.py), between the kinds.

    Windowed kinds get the windows of all sequences that there is room for, or as many blocks as the others where memory is
    scarce; kinds that see everything get the rest, up to what these sequences could use. Raises ConfigError when not even
    one fits.
    """
    assert settings.kv_cache_bytes is not None, "kv_cache_bytes is chosen in memory.py"
    size, caches = settings.block_size, config.layer_caches
    sizes, max_len = BlockSizes.of(config, settings, itemsize), checked_max_len(config, settings)
    check_fits(sizes, settings.kv_cache_bytes, max_len)
    kinds, per_seq = tuple(sizes.block_bytes), sizes.blocks_per_seq(max_len)
    num_blocks = _split(settings.kv_cache_bytes, settings.num_kept_seqs, sizes.block_bytes, per_seq)
    places = tuple((kind, caches[:layer].count(kind)) for layer, kind in enumerate(caches))
    block_bytes, dtype = sizes.block_bytes, settings.kv_cache_dtype
    return CacheLayout(size, max_len, kinds, places, num_blocks, per_seq, block_bytes, dtype)


def checked_max_len(config: ModelConfig, settings: EngineConfig) -> int:
    """The longest sequence in tokens; at most what the model was made for."""
    wanted = settings.max_model_len or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise ConfigError(
            f"engine.max_model_len {wanted} > {config.max_position_embeddings}, the model's max_position_embeddings"
        )
    return wanted


def check_fits(sizes: BlockSizes, have: int, max_len: int) -> None:
    """Raise ConfigError where `have`, of engine.kv_cache_bytes, does not hold one sequence of max_len tokens."""
    need = sizes.bytes_per_seq(max_len)
    if need <= have:
        return
    fits = sizes.longest(have, max_len)
    remedy = f" or engine.max_model_len to at most {fits}" if fits > 1 else ""
    raise ConfigError(
        f"one sequence of {max_len} tokens needs {need} bytes of KV cache, engine.kv_cache_bytes is {have}; "
        f"raise engine.kv_cache_bytes to at least {need}{remedy}"
    )


def _split(
    have: int, seqs: int, block_bytes: Mapping[LayerCache, int], per_seq: Mapping[LayerCache, int]
) -> dict[LayerCache, int]:
    """Blocks of each kind. Windowed kinds choose first, and leave the others what one sequence needs of them."""
    even = have // max(1, sum(block_bytes.values()))
    num: dict[LayerCache, int] = {}
    windowed = [kind for kind in block_bytes if kind.window is not None]
    growing = [kind for kind in block_bytes if kind.window is None]
    left = have - sum(per_seq[kind] * block_bytes[kind] for kind in block_bytes)  # beyond one sequence
    for kind in windowed:
        more = min(max(0, min(seqs * per_seq[kind], even) - per_seq[kind]), left // max(1, block_bytes[kind]))
        num[kind], left = per_seq[kind] + more, left - more * block_bytes[kind]
    for at, kind in enumerate(growing):
        shared = sum(block_bytes[other] for other in growing[at:])
        more = min(seqs * per_seq[kind] - per_seq[kind], left // max(1, shared))
        num[kind], left = per_seq[kind] + more, left - more * block_bytes[kind]
    return {kind: num[kind] for kind in block_bytes}
