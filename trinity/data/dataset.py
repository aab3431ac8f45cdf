"""Batches of packed sequences.

Legend: B sequences of a batch, S tokens of a sequence.
Decision: which sequences a step takes depends on (seed, step, global batch) and on nothing else: no iterator, no state to
save, the same text for any number of workers.
"""

import functools
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.token_store import TokenStore
from trinity.errors import DataError

IGNORE = -100  # a target that does not count (trinity/models/common/losses.py)


class Batch(NamedTuple):
    """int64. targets_BS[b, s] follows ids_BS[b, s]; docs_BS numbers the documents of each sequence from 0."""

    ids_BS: Tensor
    targets_BS: Tensor
    docs_BS: Tensor

    @property
    def num_trained(self) -> int:
        """The targets that count in the loss."""
        return int((self.targets_BS != IGNORE).sum())


class Packed(ABC):
    """Sequences of at most `seq_len` tokens from a store, in an order shuffled anew in each epoch.

    A batch of it is a Batch, or another NamedTuple of tensors with `ids_BS` and `num_trained`, for an objective of its own.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        self.store, self.seq_len, self.seed = store, seq_len, seed % 2**64
        self._permutation = functools.lru_cache(maxsize=2)(self._new_permutation)

    num_sequences: int

    def require_text(self) -> None:
        """Raise DataError unless there is one sequence."""
        if not self.num_sequences:
            raise DataError(self._too_little())

    @abstractmethod
    def _too_little(self) -> str: ...

    @abstractmethod
    def take(self, sequences_B: np.ndarray) -> Any:
        """The sequences with these indices."""

    def sequences(self, step: int, global_batch: int) -> np.ndarray:
        """Indices of the sequences of `step` (0, 1, …), int64 [global_batch]. Every run of num_sequences of them,
        over all steps, holds each index once."""
        self.require_text()
        nth = np.arange(step * global_batch, (step + 1) * global_batch)
        epochs, places = np.divmod(nth, self.num_sequences)
        return np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64)

    def batch(self, step: int, global_batch_size: int, rank: int, world: int, micro: int, micro_batch_size: int) -> Any:
        """Micro-batch `micro` of worker `rank`: B = micro_batch_size. The step's sequences go to the workers micro by
        micro, so (world 2, B 4) and (world 1, B 8) put the same sequences in micro-batch m."""
        first = (micro * world + rank) * micro_batch_size
        assert first + micro_batch_size <= global_batch_size, "this micro-batch lies outside the global batch"
        return self.take(self.sequences(step, global_batch_size)[first : first + micro_batch_size])

    def _new_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_sequences)


class PackedDataset(Packed):
    """Documents laid end to end and cut into sequences."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        super().__init__(store, seq_len, seed)
        self.num_sequences = max(len(store.tokens) - 1, 0) // seq_len

    def _too_little(self) -> str:
        return (
            f"{len(self.store.tokens)} tokens of text are less than one sequence of train.seq_len + 1 = "
            f"{self.seq_len + 1}; give more text or a smaller train.seq_len"
        )

    def take(self, sequences_B: np.ndarray) -> Batch:
        """The sequences with these indices."""
        at_BS = sequences_B[:, None] * self.seq_len + np.arange(self.seq_len)
        docs_BS = np.searchsorted(self.store.starts_N, at_BS, side="right")
        arrays = self.store.tokens[at_BS], self.store.tokens[at_BS + 1], docs_BS - docs_BS[:, :1]
        return Batch(*(torch.from_numpy(array.astype(np.int64)) for array in arrays))
