"""Whole examples packed into sequences: nothing is cut that a reader needs, and hardly any room is left.

Legend: N examples, S tokens of a sequence, T tokens of a batch, one after the other.
Decisions. An example of n tokens takes n - 1 places: its last token is only a target. They are packed by best fit, the longest
first, which depends on lengths alone. One that is longer than a sequence ends after its last answer that fits; one whose first
answer does not fit is left out; both are counted and said. A batch has no padding, which would be routed to experts: its
sequences lie end to end, and its number of tokens varies.
"""

import numpy as np
import torch

from trinity.data.dataset import IGNORE, Batch, Packed
from trinity.data.formats import say_once
from trinity.data.token_store import TokenStore


class PackedChats(Packed):
    """Sequences of examples of conversations, each of which sees itself alone."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        super().__init__(store, seq_len, seed)
        assert store.trained is not None, "a store of conversations"
        self.places_N = _fitting(store, seq_len)
        self.sequences_of_examples = best_fit(self.places_N, seq_len)
        self.num_sequences = len(self.sequences_of_examples)

    @property
    def fill(self) -> float:
        """Share of the sequences' room that is taken."""
        return float(self.places_N.sum()) / max(1, self.num_sequences * self.seq_len)

    def _too_little(self) -> str:
        return f"no conversation has an answer within train.seq_len {self.seq_len}; raise it, or give shorter ones"

    def take(self, sequences_B: np.ndarray) -> Batch:
        """Batch [1, T] of the sequences with these indices, end to end."""
        chosen = [n for at in sequences_B for n in self.sequences_of_examples[at]]
        parts = [self._example(n) for n in chosen]
        ids, targets = (np.concatenate(side)[None] for side in zip(*parts, strict=True))
        docs = np.repeat(np.arange(len(chosen)), self.places_N[chosen])[None]
        return Batch(*(torch.from_numpy(array.astype(np.int64)) for array in (ids, targets, docs)))

    def _example(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, and what follows each: IGNORE where that is not trained."""
        assert self.store.trained is not None
        begin = int(self.store.starts_N[n])
        at = slice(begin, begin + int(self.places_N[n]) + 1)
        ids = self.store.tokens[at].astype(np.int64)
        return ids[:-1], np.where(self.store.trained[at][1:], ids[1:], IGNORE)


def _fitting(store: TokenStore, seq_len: int) -> np.ndarray:
    """places_N: of each example, of as much of it as fits; 0 for one that is left out."""
    assert store.trained is not None
    places_N: np.ndarray = np.maximum(np.diff(store.starts_N) - 1, 0)
    num_cut = num_left_out = 0
    for n in np.flatnonzero(places_N > seq_len):
        begin = int(store.starts_N[n])
        trained = store.trained[begin : begin + seq_len + 2]
        ends = np.flatnonzero(trained[:-1] & ~trained[1:])  # last tokens of answers
        places_N[n] = int(ends[-1]) if len(ends) else 0
        num_cut, num_left_out = num_cut + bool(len(ends)), num_left_out + (not len(ends))
    if num_cut or num_left_out:
        say_once(
            f"{num_cut:,} of {len(places_N):,} conversations are longer than train.seq_len {seq_len} and end after an "
            f"earlier answer; {num_left_out:,} have none within it and are left out"
        )
    return places_N


def best_fit(places_N: np.ndarray, room: int) -> list[list[int]]:
    """Examples by sequence: each, the longest first, goes where the least room is left that it fits into.

    `with_room` has a bit for each amount of room that an open sequence has left, so that the least which suffices is found by
    arithmetic on one number."""
    sequences: list[list[int]] = []
    open_by_room: dict[int, list[int]] = {}
    with_room = 0
    for n in np.argsort(-places_N, kind="stable").tolist():
        size = int(places_N[n])
        if not size:
            break
        if fitting := with_room >> size:
            left = size + (fitting & -fitting).bit_length() - 1
            at = open_by_room[left].pop()
            with_room ^= (not open_by_room[left]) << left
        else:
            left, at = room, len(sequences)
            sequences.append([])
        sequences[at].append(n)
        if left > size:
            open_by_room.setdefault(left - size, []).append(at)
            with_room |= 1 << (left - size)
    return sequences
