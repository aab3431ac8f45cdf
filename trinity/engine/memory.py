"""Memory of the KV cache, chosen by what is free, and the longest sequence that fits then. Numbers in, numbers out.

Decisions: an engine's share is a fraction of what weights leave free, divided by the engines that share the memory, and never
more than `max_num_seqs` sequences and those that are kept can use. On a CPU it is small (half), because others need the memory,
too, and unless a fraction is asked for it is bounded: to CPU_BYTES, or one sequence of the model's whole length where that is
more. Pages of the cache that were never written take no memory there. What somebody asked for by a number is granted as long as
it can be there at all, and refused otherwise; what nobody asked for is lowered to what fits.
"""

import logging
from dataclasses import dataclass

from trinity.config import EngineConfig, ModelConfig
from trinity.engine.kv_layout import BlockSizes, check_fits, checked_max_len
from trinity.errors import ConfigError
from trinity.utils.machine import free_and_total
from trinity.utils.units import size

log = logging.getLogger(__name__)
LEAST_TOKENS = 256  # a shorter limit than this is nobody's wish
CPU_BYTES = 4 << 30
GPU_FRACTION, CPU_FRACTION = 0.9, 0.5


@dataclass(frozen=True)
class Memory:
    """Memory of the device that the caches lie in, in bytes.

    `free`: what nobody uses yet. `weights`: what is still to be loaded there, by all processes. `others`: what they need of it
    besides, at a guess, which lowers an engine's share and refuses nothing. `num_engines`: those that share it.
    """

    free: int
    total: int
    is_gpu: bool = False
    weights: int = 0
    others: int = 0
    num_engines: int = 1

    @property
    def left(self) -> int:
        """Bytes that one engine can have at all."""
        return max(0, self.free - self.weights) // self.num_engines

    def share(self, fraction: float | None) -> int:
        """Bytes that one engine takes unasked."""
        if self.is_gpu:
            used = self.total - self.free + self.weights
            mine = int(self.total * (fraction or GPU_FRACTION)) - used
        else:
            mine = int((self.free - self.weights - self.others) * (fraction or CPU_FRACTION))
        return min(max(0, mine) // self.num_engines, self.left)


def memory_of(device: str, weights: int = 0, others: int = 0, num_engines: int = 1) -> Memory:
    """The memory of a device as it is now."""
    free, total = free_and_total(device)
    return Memory(free, total, device != "cpu", weights, others, num_engines)


UNBOUNDED = Memory(1 << 62, 1 << 62)


@dataclass(frozen=True)
class CachePlan:
    """The choice: both numbers of EngineConfig, and what the log says of them."""

    kv_cache_bytes: int
    max_model_len: int
    line: str

    def fixed(self, settings: EngineConfig) -> EngineConfig:
        """The settings with these numbers in them."""
        chosen = {"kv_cache_bytes": self.kv_cache_bytes, "max_model_len": self.max_model_len}
        return settings.model_copy(update=chosen)


def settled(
    config: ModelConfig, settings: EngineConfig, itemsize: int, device: str, num_engines: int = 1, weights: int = 0
) -> EngineConfig:
    """The settings of an engine that starts on `device`, with the numbers that nobody gave chosen by what is free now.

    A given `kv_cache_bytes` is not held against it: this engine may have died beside others that use theirs already.
    """
    if settings.kv_cache_bytes is not None and settings.max_model_len is not None:
        return settings
    is_given = settings.kv_cache_bytes is not None
    memory = UNBOUNDED if is_given else memory_of(device, num_engines=num_engines, weights=weights)
    plan = plan_memory(config, settings, itemsize, memory)
    log.info("%s", plan.line)
    return plan.fixed(settings)


def plan_memory(config: ModelConfig, settings: EngineConfig, itemsize: int, memory: Memory) -> CachePlan:
    """Choose `kv_cache_bytes` and `max_model_len` where the settings do not say them. `itemsize`: of one number of the model.

    Raises ConfigError, with both numbers and a setting that helps, for weights that do not fit into what is free, for a
    `kv_cache_bytes` that does not fit beside them, and for a `max_model_len` of which not one sequence fits.
    """
    limit = checked_max_len(config, settings)
    sizes = BlockSizes.of(config, settings, itemsize)
    _check_weights(memory)
    least = settings.max_model_len or min(LEAST_TOKENS, limit)
    if settings.kv_cache_bytes is not None:
        have = _asked(sizes, settings.kv_cache_bytes, least, memory)
    else:
        have = _chosen(sizes, settings, limit, least, memory)
    length = settings.max_model_len or sizes.longest(have, limit)
    return CachePlan(have, length, _line(config, settings, memory, have, length, sizes.bytes_per_seq(length)))


def _check_weights(memory: Memory) -> None:
    if memory.weights > memory.free:
        remedy = (
            "a smaller part of the experts for each GPU" if memory.is_gpu else "more memory, or fewer other programs"
        )
        raise ConfigError(
            f"the weights take {size(memory.weights)} of memory, {size(memory.free)} is free here: this needs {remedy}"
        )


def _asked(sizes: BlockSizes, wanted: int, least: int, memory: Memory) -> int:
    check_fits(sizes, wanted, least)
    if wanted > memory.left:
        raise ConfigError(
            f"engine.kv_cache_bytes is {wanted:,}; {_beside(memory)} there are {memory.left:,} bytes free{_each(memory)}. "
            "Lower engine.kv_cache_bytes, or leave it out: then it is chosen"
        )
    return wanted


def _chosen(sizes: BlockSizes, settings: EngineConfig, limit: int, least: int, memory: Memory) -> int:
    """The share, which on a CPU holds one sequence of the `least` length wherever that is possible at all."""
    one, need, share = sizes.bytes_per_seq(limit), sizes.bytes_per_seq(least), memory.share(settings.memory_fraction)
    if not memory.is_gpu and settings.memory_fraction is None:
        share = max(min(share, max(CPU_BYTES, one)), min(need, memory.left))
    if need > share:
        raise ConfigError(_too_long(sizes, settings, least, share, memory))
    return min(share, settings.num_kept_seqs * one)


def _too_long(sizes: BlockSizes, settings: EngineConfig, least: int, share: int, memory: Memory) -> str:
    """The words of a refusal: what one sequence needs, what there is, and what helps."""
    need, fits = sizes.bytes_per_seq(least), sizes.longest(share, least)
    ways = [f"lower engine.max_model_len to at most {fits}"] if fits > 1 and settings.max_model_len else []
    ways += ["raise engine.memory_fraction"] if need <= memory.left else []
    return (
        f"one sequence of {least} tokens needs {size(need)} of KV cache; {_beside(memory)} there are {size(share)} for it "
        f"({size(memory.left)} free{_each(memory)}): {', or '.join(ways) or 'this needs more memory'}"
    )


def _beside(memory: Memory) -> str:
    return f"beside weights of {size(memory.weights)}" if memory.weights else "beside all else"


def _each(memory: Memory) -> str:
    return f" for each of {memory.num_engines} engines" if memory.num_engines > 1 else ""


def _line(config: ModelConfig, settings: EngineConfig, memory: Memory, have: int, length: int, one: int) -> str:
    """A line on what was chosen, and what would raise it."""
    seqs, whole = have / one, config.max_position_embeddings
    text = f"KV cache of {size(have)}{_each(memory)}: sequences of up to {length:,} tokens"
    if settings.max_model_len is None and length < whole:
        text += f" (the model's {whole:,} do not fit)"
    if seqs >= settings.max_num_seqs:
        return f"{text}, engine.max_num_seqs {settings.max_num_seqs} of them at once"
    how = "engine.kv_cache_bytes" if settings.kv_cache_bytes is not None else _raised_by(settings, memory)
    return f"{text}, {seqs:.3g} of that length at once; more with a larger {how}"


def _raised_by(settings: EngineConfig, memory: Memory) -> str:
    fraction = settings.memory_fraction or (GPU_FRACTION if memory.is_gpu else CPU_FRACTION)
    of = memory.total if memory.is_gpu else memory.left
    return f"engine.memory_fraction (now {fraction:g} of {size(of)}) or engine.kv_cache_bytes"
