"""Batches of answers that are preferred or not, with what the weights that a run begins with scored them.

Legend: N rows, B rows of a batch, S tokens of an answer with its prompt at most, T tokens of a batch, one after the other.
Decisions. A store holds two answers a row, wanted and unwanted; of a row with a label one of them is empty. Both are there
whole or the row is left out. For labels, an answer is accompanied by another one that was given to another prompt: from those
comes how far the model has gone on the whole (KTO). Which one is a matter of the store alone, so that it has a reference
score, too.
A batch has no padding, which would be routed to experts.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.data.dataset import IGNORE, Batch, Packed
from trinity.data.formats import say_once
from trinity.data.token_store import TokenStore
from trinity.errors import DataError

Piece = tuple[np.ndarray, np.ndarray]  # inputs of a document, and what follows each: IGNORE where that is not trained


class PairBatch(NamedTuple):
    """Pairs end to end: chosen, rejected, chosen, ... each a document of its own (B = 1)."""

    ids_BS: Tensor  # int64
    targets_BS: Tensor  # int64; IGNORE where a token is not trained
    docs_BS: Tensor  # int64: the answer, 0 to 2 P - 1
    reference_P2: Tensor  # float32: log p of each answer's trained tokens, summed, by the first weights

    @property
    def num_trained(self) -> int:
        """Trained tokens of the preferred answers: what their own loss is a mean over."""
        return int(((self.targets_BS != IGNORE) & (self.docs_BS % 2 == 0)).sum())


class LabelBatch(NamedTuple):
    """Answers end to end, and as many that belong to other prompts."""

    ids_BS: Tensor
    targets_BS: Tensor
    docs_BS: Tensor
    other_ids_BS: Tensor
    other_targets_BS: Tensor
    other_docs_BS: Tensor
    is_wanted_P: Tensor  # bool
    reference_P2: Tensor  # float32, of the answers and of the others

    @property
    def num_trained(self) -> int:
        return int((self.targets_BS != IGNORE).sum())


class PackedAnswers(Packed):
    """Rows of two answers, with scores by the weights that the run begins with: zeros until somebody sets them."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        super().__init__(store, seq_len, seed)
        assert store.trained is not None, "a store of answers"
        self.rows = self._rows()
        self.num_sequences = len(self.rows)
        self.reference_N2 = torch.zeros(self.num_sequences, 2)

    @abstractmethod
    def _rows(self) -> np.ndarray:
        """Rows, or documents, that `pieces` makes sequences of; says which are left out."""

    @abstractmethod
    def pieces(self, at: int) -> tuple[Piece, Piece]:
        """Two documents of the sequence with that index: those that have reference scores."""

    def answers(self, at_B: Sequence[int] | np.ndarray) -> Batch:
        """Batch [1, T] of both documents of these sequences, in their order."""
        return _end_to_end([piece for at in at_B for piece in self.pieces(int(at))])

    def _too_little(self) -> str:
        return f"no row has its answers within train.seq_len {self.seq_len}; raise it, or give shorter ones"

    def _places_of(self, lengths_N2: np.ndarray) -> np.ndarray:
        """bool [N, 2]: which answers are there and fit."""
        fits_N2: np.ndarray = lengths_N2 - 1 <= self.seq_len
        if num := int((~fits_N2.all(1)).sum()):
            say_once(
                f"{num:,} of {len(fits_N2):,} rows are left out, an answer is longer than train.seq_len {self.seq_len}"
            )
        return fits_N2 & (lengths_N2 > 0)

    def _document(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Its tokens, and which of them are trained."""
        assert self.store.trained is not None
        at = slice(int(self.store.starts_N[n]), int(self.store.starts_N[n + 1]))
        return self.store.tokens[at].astype(np.int64), np.array(self.store.trained[at])


class PackedPairs(PackedAnswers):
    """Pairs: of two answers to a prompt, the first is preferred."""

    def _rows(self) -> np.ndarray:
        lengths_N2 = np.diff(self.store.starts_N).reshape(-1, 2)
        if num := int((lengths_N2 == 0).any(1).sum()):
            raise DataError(
                f"{num:,} of {len(lengths_N2):,} rows have a label and no pair of answers; data.format pairs is for chosen and "
                "rejected, labels for both kinds"
            )
        return np.flatnonzero(self._places_of(lengths_N2).all(1))

    def pieces(self, at: int) -> tuple[Piece, Piece]:
        chosen, rejected = (_piece(*self._document(2 * int(self.rows[at]) + side)) for side in range(2))
        return chosen, rejected

    def take(self, sequences_B: np.ndarray) -> PairBatch:
        return PairBatch(*self.answers(sequences_B), self.reference_N2[torch.from_numpy(sequences_B)])


class PackedLabels(PackedAnswers):
    """Answers, each wanted or not; those of a pair are one of each."""

    def _rows(self) -> np.ndarray:
        """Documents: of each row the wanted one has an even number."""
        lengths_N2 = np.diff(self.store.starts_N).reshape(-1, 2)
        found: np.ndarray = np.flatnonzero(self._places_of(lengths_N2))
        return found if len(found) > 1 else found[:0]

    def _too_little(self) -> str:
        return f"fewer than two answers are within train.seq_len {self.seq_len}; labels take two, that answer other prompts"

    def pieces(self, at: int) -> tuple[Piece, Piece]:
        """The answer, and half the store further on another one, given to this prompt."""
        ids, is_trained = self._document(int(self.rows[at]))
        theirs, is_theirs = self._document(int(self.rows[(at + self.num_sequences // 2) % self.num_sequences]))
        mine, other = int(is_trained.argmax()), int(is_theirs.argmax())
        mixed = np.concatenate([ids[:mine], theirs[other:]])[: self.seq_len + 1]
        is_mixed = np.concatenate([is_trained[:mine], is_theirs[other:]])[: self.seq_len + 1]
        return _piece(ids, is_trained), _piece(mixed, is_mixed)

    def take(self, sequences_B: np.ndarray) -> LabelBatch:
        own, others = zip(*(self.pieces(int(at)) for at in sequences_B), strict=True)
        is_wanted_P = torch.from_numpy(self.rows[sequences_B] % 2 == 0)
        reference_P2 = self.reference_N2[torch.from_numpy(sequences_B)]
        return LabelBatch(*_end_to_end(own), *_end_to_end(others), is_wanted_P, reference_P2)


def _piece(ids: np.ndarray, is_trained: np.ndarray) -> Piece:
    return ids[:-1], np.where(is_trained[1:], ids[1:], IGNORE)


def _end_to_end(pieces: Sequence[Piece]) -> Batch:
    ids, targets = (np.concatenate(side)[None] for side in zip(*pieces, strict=True))
    docs = np.repeat(np.arange(len(pieces)), [len(inputs) for inputs, _ in pieces])[None]
    return Batch(*(torch.from_numpy(array) for array in (ids, targets, docs)))
