"""A mixture of sources by weight: which sequence comes at which position, from the seed alone.

Legend: P places of a block, B sequences of a batch, T tokens of a batch that lies end to end.
Decisions. Weights are shares of tokens. Each block of BLOCK sequences has as many of each source, by largest remainder, at
places that the seed and the block's number permute; so shares hold at any time, not only on average, and nothing has to be
remembered. The r-th of a source in block b is number b k + r of its own order, which goes through all of it before it begins
anew. A source whose sequences are less than full gets more of them. Where some source's sequences lie end to end, all do.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from trinity.config import Sequences, TrainConfig
from trinity.data.dataset import Batch, Dataset, Facts, Source
from trinity.errors import ConfigError, DataError

BLOCK = 4096
PLACES = 3  # tells the seeds of blocks from those of other orders
T = TypeVar("T")


class Mixture(Dataset):
    """Sequences of several sources; the index of one is its position in the order."""

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int):
        self.sources, self.seq_len, self.seed = tuple(sources), seq_len, seed % 2**64
        self.num_sequences = sum(source.dataset.num_sequences for source in self.sources)
        self.is_flat = any(source.dataset.is_flat for source in self.sources)
        self.num_per_block = in_block(self.sources)
        self._block = functools.lru_cache(maxsize=16)(self._new_block)

    @property
    def facts(self) -> Facts:
        found: dict[str, int | float | str] = {"sources": ", ".join(source.name for source in self.sources)}
        found["block"] = BLOCK
        for source, num in zip(self.sources, self.num_per_block, strict=True):
            own = {"weight": round(source.share, 9), "in_block": num, **source.dataset.facts}
            found |= {f"{source.name}.{name}": value for name, value in own.items()}
        return found

    @property
    def by_source(self) -> tuple[Source, ...]:
        return self.sources

    def require_text(self) -> None:
        for source, num in zip(self.sources, self.num_per_block, strict=True):
            if num and not source.dataset.num_sequences:
                with_name(source.name, source.dataset.require_text)

    def check(self, train: TrainConfig) -> None:
        """Raise ConfigError where the run would read a source more often than it may be, or one has a weight and no place."""
        for number, (source, num) in enumerate(zip(self.sources, self.num_per_block, strict=True)):
            if source.share and not num:
                raise ConfigError(
                    f"source {source.name!r} has {source.share:.2g} of the weights, less than one of {BLOCK:,} sequences; "
                    "give it more, or weight 0"
                )
            if source.epochs is not None:
                self._check_epochs(number, source, source.epochs, train)

    def _check_epochs(self, number: int, source: Source, epochs: float, train: TrainConfig) -> None:
        size = source.dataset.num_sequences
        wanted = self._num_before(number, train.num_sequences(train.steps))
        if wanted <= (most := math.floor(epochs * size)):
            return
        allowed = train.num_steps(self._most_sequences(number, most))
        raise ConfigError(
            f"source {source.name!r} would be read {wanted / size:.3g} times in {train.steps:,} steps; its epochs {epochs:g} "
            f"allow {allowed:,} steps: lower train.steps, raise epochs, or give it less weight"
        )

    def _num_before(self, number: int, position: int) -> int:
        """Number of a source's sequences before that position."""
        block, place = divmod(position, BLOCK)
        sources_P, _ = self._block(block)
        return block * self.num_per_block[number] + int(np.count_nonzero(sources_P[:place] == number))

    def _most_sequences(self, number: int, num: int) -> int:
        """The position of a source's sequence after its first `num`: so many of all hold no more of it."""
        block, rest = divmod(num, self.num_per_block[number])
        sources_P, _ = self._block(block)
        return block * BLOCK + int(np.flatnonzero(sources_P == number)[rest])

    def indices(self, nth_B: np.ndarray) -> np.ndarray:
        return nth_B

    def take(self, sequences_B: np.ndarray) -> Batch:
        """Batch [B, S], or [1, T] of sequences that are not all full: then those of each source come together."""
        found = [(mine, dataset.take(own)) for mine, dataset, own in self._parts(sequences_B)]
        return end_to_end([batch for _, batch in found]) if self.is_flat else _side_by_side(found)

    def source_tokens(self, step: Sequences) -> dict[str, int]:
        nth_B = np.arange(step.first, step.first + step.num)
        found = {dataset: dataset.num_tokens(own) for _, dataset, own in self._parts(nth_B)}
        return {source.name: found.get(source.dataset, 0) for source in self.sources}

    def _parts(self, nth_B: np.ndarray) -> list[tuple[np.ndarray, Dataset, np.ndarray]]:
        """(their places in the batch, the source's sequences, their indices in it) of each source that has any."""
        sources_B, numbers_B = self._places(nth_B)
        parts = []
        for number in np.unique(sources_B):
            mine, dataset = np.flatnonzero(sources_B == number), self.sources[number].dataset
            parts.append((mine, dataset, dataset.indices(numbers_B[mine])))
        return parts

    def _places(self, nth_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number in that source's own order) of each position."""
        blocks_B, places_B = np.divmod(nth_B, BLOCK)
        sources_B, numbers_B = np.empty(len(nth_B), np.int64), np.empty(len(nth_B), np.int64)
        for block in np.unique(blocks_B):
            mine = blocks_B == block
            sources_P, ranks_P = self._block(int(block))
            sources_B[mine] = found = sources_P[places_B[mine]]
            numbers_B[mine] = block * np.array(self.num_per_block)[found] + ranks_P[places_B[mine]]
        return sources_B, numbers_B

    def _new_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, rank among those of its source) of each place."""
        rng = np.random.default_rng([self.seed, block, PLACES])
        sources_P = rng.permutation(np.repeat(np.arange(len(self.sources)), self.num_per_block))
        ranks_P = np.empty(BLOCK, np.int64)
        for number, num in enumerate(self.num_per_block):
            ranks_P[sources_P == number] = np.arange(num)
        return sources_P, ranks_P


def in_block(sources: Sequence[Source]) -> tuple[int, ...]:
    """Number of sequences of each source in a block, by largest remainder, so that the shares are of tokens."""
    wanted = np.array([source.share / max(1.0, source.dataset.tokens_per_sequence) for source in sources])
    exact = wanted / wanted.sum() * BLOCK
    num = np.floor(exact).astype(np.int64)
    num[np.argsort(num - exact, kind="stable")[: BLOCK - num.sum()]] += 1
    return tuple(num.tolist())


def end_to_end(batches: Sequence[Batch]) -> Batch:
    """One batch [1, T] of all their sequences; documents are numbered through."""
    first, docs = 0, []
    for batch in batches:
        docs.append(numbered_through(batch.docs_BS) + first)
        first = int(docs[-1][-1]) + 1
    ids, targets = (torch.cat([batch[side].flatten() for batch in batches])[None] for side in (0, 1))
    return Batch(ids, targets, torch.cat(docs)[None])


def numbered_through(docs_BS: torch.Tensor) -> torch.Tensor:
    """docs_T: numbers of the documents of all sequences, from 0 on, where each sequence had begun anew."""
    nums_B = docs_BS[:, -1] + 1
    return (docs_BS + (nums_B.cumsum(0) - nums_B)[:, None]).flatten()


def _side_by_side(parts: Sequence[tuple[np.ndarray, Batch]]) -> Batch:
    """The sequences of all parts at their places. By numpy: torch's threads would wait for one another longer than it takes."""
    num, found = sum(len(mine) for mine, _ in parts), list[torch.Tensor]()
    for side in range(3):
        placed_BS = np.empty((num, parts[0][1][side].shape[1]), np.int64)
        for mine, batch in parts:
            placed_BS[mine] = batch[side].numpy()
        found.append(torch.from_numpy(placed_BS))
    return Batch(*found)


def with_name(name: str, call: Callable[[], T]) -> T:
    """Do it; a DataError says which source it is of."""
    try:
        return call()
    except DataError as error:
        raise DataError(f"source {name!r}: {error.message}") from None
