"""Batches of packed sequences.

Legend: B sequences of a batch, S tokens of a sequence.
Decision: which sequences a step takes depends on the seed and on the numbers that its settings give it (config/ramp.py) and
on nothing else: no iterator, no state to save, the same text for any number of workers.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.config import Sequences
from trinity.data.shards import ranges
from trinity.data.shuffle import TABLE, Order, permutation
from trinity.data.token_store import TokenStore
from trinity.errors import DataError

IGNORE = -100  # a target that does not count (trinity/models/common/losses.py)
Facts = Mapping[str, int | float | str]  # what an order of batches depends on, for a run that resumes to compare


class Batch(NamedTuple):
    """int64. targets_BS[b, s] follows ids_BS[b, s]; docs_BS numbers the documents of each sequence from 0."""

    ids_BS: Tensor
    targets_BS: Tensor
    docs_BS: Tensor

    @property
    def num_trained(self) -> int:
        """The targets that count in the loss."""
        return int((self.targets_BS != IGNORE).sum())


class Dataset(ABC):
    """An endless order of sequences of at most `seq_len` tokens: of one store, or of a mixture of them.

    A batch of it is a Batch, or another NamedTuple of tensors with `ids_BS` and `num_trained`, for an objective of its own.
    """

    seq_len: int
    num_sequences: int  # in one pass over the data
    is_flat = False  # a batch is [1, T], its sequences end to end: some are shorter than others

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Facts that the order depends on, besides the seed and the shape of a step."""

    @property
    def by_source(self) -> "tuple[Source, ...]":
        """Parts of a mixture; a dataset of one store is the only one, without a name."""
        return (Source("", 1.0, self),)

    @property
    def tokens_per_sequence(self) -> float:
        """The mean."""
        return float(self.seq_len)

    @abstractmethod
    def require_text(self) -> None:
        """Raise DataError unless there is one sequence."""

    @abstractmethod
    def indices(self, nth_B: np.ndarray) -> np.ndarray:
        """Indices of the n-th sequences of the order, int64 [B]; n goes on over all epochs."""

    @abstractmethod
    def take(self, sequences_B: np.ndarray) -> Any:
        """The sequences with these indices."""

    def num_tokens(self, sequences_B: np.ndarray) -> int:
        """Tokens of the sequences with these indices, all together."""
        return len(sequences_B) * self.seq_len

    def sequences(self, step: Sequences) -> np.ndarray:
        """Indices of a step's sequences, int64."""
        self.require_text()
        return self.indices(np.arange(step.first, step.first + step.num))

    def batch(self, step: Sequences, rank: int, world: int, micro: int, micro_batch_size: int) -> Any:
        """Micro-batch `micro` of worker `rank`: B = micro_batch_size. The step's sequences go to the workers micro by
        micro, so (world 2, B 4) and (world 1, B 8) put the same sequences in micro-batch m."""
        first = (micro * world + rank) * micro_batch_size
        assert first + micro_batch_size <= step.num, "this micro-batch lies outside the global batch"
        self.require_text()
        begin = step.first + first
        return self.take(self.indices(np.arange(begin, begin + micro_batch_size)))

    def source_tokens(self, step: Sequences) -> dict[str, int]:
        """Tokens of a step by source; nothing where there is one."""
        return {}


class Source(NamedTuple):
    """One part of a mixture; `share` of the tokens, of 1."""

    name: str
    share: float
    dataset: Dataset
    epochs: float | None = None  # so often may it be read at most


class Drawn(NamedTuple):
    """Documents of one pass, some of them several times and some not at all; `words` tell one such choice from another."""

    documents_M: np.ndarray
    words: str


class Packed(Dataset):
    """The sequences of a store, in an order shuffled anew in each epoch."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int, drawn: "Drawn | None" = None):
        self.store, self.seq_len, self.seed, self.drawn = store, seq_len, seed % 2**64, drawn
        self._order = functools.lru_cache(maxsize=2)(self._new_order)

    @property
    def facts(self) -> Facts:
        content = {"content": self.store.content} if self.store.content else {}
        order = {"order": "feistel"} if self._num_shuffled > TABLE else {}
        drawn = {"length_bias": self.drawn.words} if self.drawn else {}
        return {"num_tokens": len(self.store.tokens), **content, **order, **drawn}

    def require_text(self) -> None:
        if not self.num_sequences:
            raise DataError(self._too_little())

    @abstractmethod
    def _too_little(self) -> str: ...

    def indices(self, nth_B: np.ndarray) -> np.ndarray:
        """Every run of num_sequences of them holds each index once."""
        epochs_B, places_B = np.divmod(nth_B, self.num_sequences)
        found = np.empty(len(nth_B), np.int64)
        for epoch in np.unique(epochs_B):
            mine = epochs_B == epoch
            found[mine] = self._order(int(epoch))[places_B[mine]]
        return found

    def _new_order(self, epoch: int) -> Order:
        return permutation(self._num_shuffled, [self.seed, epoch])

    @property
    def _num_shuffled(self) -> int:
        return self.num_sequences


class PackedDataset(Packed):
    """Documents laid end to end and cut into sequences."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int, drawn: Drawn | None = None):
        super().__init__(store, seq_len, seed, drawn)
        self.starts_M, self._moved_M = _laid(store.starts_N, drawn)
        self.num_sequences = max(int(self.starts_M[-1]) - 1, 0) // seq_len

    def _too_little(self) -> str:
        return (
            f"{len(self.store.tokens)} tokens of text are less than one sequence of train.seq_len + 1 = "
            f"{self.seq_len + 1}; give more text or a smaller train.seq_len"
        )

    def take(self, sequences_B: np.ndarray) -> Batch:
        begins_B = sequences_B * self.seq_len
        first_B, docs_B1 = self._documents(begins_B)
        at = begins_B[:, None] + np.arange(self.seq_len + 1)
        if self._moved_M is not None:
            at = at + self._moved_M[first_B[:, None] + docs_B1]
        tokens = self.store.tokens[at].astype(np.int64)
        arrays = tokens[:, :-1], tokens[:, 1:], docs_B1[:, :-1]
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def _documents(self, begins_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the document of the first token, int64 [B]; how many later the document of each is, [B, S + 1])."""
        num = self.seq_len + 1
        first_B, last_B = (self.starts_M.searchsorted(at_B, side="right") for at_B in (begins_B, begins_B + num - 1))
        rows = np.repeat(np.arange(len(begins_B)), last_B - first_B)
        places = self.starts_M[ranges(first_B, last_B - first_B)] - begins_B[rows]
        begun = np.bincount(rows * num + places, minlength=len(begins_B) * num)
        return first_B - 1, begun.reshape(-1, num).cumsum(1)


def _laid(starts_N: np.ndarray, drawn: Drawn | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(where documents begin that lie end to end, and the last one's end; how far off each is in the store)."""
    if drawn is None:
        return starts_N, None
    starts_M = np.concatenate([[0], np.cumsum(np.diff(starts_N)[drawn.documents_M])])
    return starts_M, starts_N[drawn.documents_M] - starts_M[:-1]
