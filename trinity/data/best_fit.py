"""Whole documents packed into sequences: none is cut that fits into one, and hardly any room is left.

Legend: N documents, P pieces, T tokens of a batch, one after the other, S tokens of a sequence.
Decisions. A document of n tokens takes n - 1 places: its last token is only a target. One that is longer than a sequence is
split into pieces of seq_len places and a rest; nothing is dropped. Pieces are packed by best fit, the longest first, which
depends on lengths alone. A batch has no padding, which would be routed to experts: its sequences lie end to end, and its
number of tokens varies. A piece is 24 bytes in memory.
"""

import numpy as np
import torch

from trinity.data.dataset import IGNORE, Batch, Drawn, Facts, Packed
from trinity.data.shards import ranges
from trinity.data.token_store import TokenStore


class PackedPieces(Packed):
    """Sequences of pieces, each of which sees itself alone: piece p is `places_P[p]` inputs from token `begins_P[p]` on."""

    is_flat = True

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        seed: int,
        begins_P: np.ndarray,
        places_P: np.ndarray,
        drawn: Drawn | None = None,
    ):
        super().__init__(store, seq_len, seed, drawn)
        self.begins_P, self.places_P = begins_P, places_P
        sequences_P = best_fit(places_P, seq_len)
        self.num_sequences = int(sequences_P.max(initial=-1)) + 1
        longest_first_P = np.argsort(-places_P, kind="stable")[: np.count_nonzero(places_P)]
        self._pieces = longest_first_P[np.argsort(sequences_P[longest_first_P], kind="stable")]
        self._ends = np.cumsum(np.bincount(sequences_P[longest_first_P], minlength=self.num_sequences))

    @property
    def fill(self) -> float:
        """Share of the sequences' room that is taken."""
        return float(self.places_P.sum()) / max(1, self.num_sequences * self.seq_len)

    @property
    def tokens_per_sequence(self) -> float:
        return self.fill * self.seq_len

    def pieces_of(self, sequences_B: np.ndarray) -> np.ndarray:
        """The pieces of these sequences, one after the other."""
        ends_B = self._ends[sequences_B]
        begins_B = np.where(sequences_B > 0, self._ends[sequences_B - 1], 0)
        found: np.ndarray = self._pieces[ranges(begins_B, ends_B - begins_B)]
        return found

    def num_tokens(self, sequences_B: np.ndarray) -> int:
        return int(self.places_P[self.pieces_of(sequences_B)].sum())

    def take(self, sequences_B: np.ndarray) -> Batch:
        """Batch [1, T] of the sequences with these indices, end to end."""
        chosen = self.pieces_of(sequences_B)
        places = self.places_P[chosen]
        at_T = ranges(self.begins_P[chosen], places)
        ids, targets = (self.store.tokens[at].astype(np.int64) for at in (at_T, at_T + 1))
        if self.store.trained is not None:
            targets = np.where(self.store.trained[at_T + 1], targets, IGNORE)
        docs = np.repeat(np.arange(len(chosen)), places)
        return Batch(*(torch.from_numpy(each[None]) for each in (ids, targets, docs)))


class PackedDocuments(PackedPieces):
    """Sequences of whole documents of text, and of pieces of those that are longer than one."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int, drawn: Drawn | None = None):
        begins_N, places_N = store.starts_N[:-1], np.maximum(np.diff(store.starts_N) - 1, 0)
        if drawn is not None:
            begins_N, places_N = begins_N[drawn.documents_M], places_N[drawn.documents_M]
        nums_N = -(-places_N // seq_len)
        heads_P = ranges(np.zeros_like(nums_N), nums_N) * seq_len
        places_P = np.minimum(np.repeat(places_N, nums_N) - heads_P, seq_len)
        super().__init__(store, seq_len, seed, np.repeat(begins_N, nums_N) + heads_P, places_P, drawn)

    @property
    def facts(self) -> Facts:
        return {**super().facts, "packing": "best_fit"}

    def _too_little(self) -> str:
        return "no document has two tokens, one to read and one to predict; give more text"


def best_fit(places_P: np.ndarray, room: int) -> np.ndarray:
    """The sequence of each piece, -1 of an empty one: each, the longest first, goes where the least room is left that it fits
    into.

    `with_room` has a bit for each amount of room that an open sequence has left, so that the least which suffices is found by
    arithmetic on one number."""
    sequences_P = np.full(len(places_P), -1, np.int64)
    open_by_room: dict[int, list[int]] = {}
    with_room = num = 0
    order_P = np.argsort(-places_P, kind="stable")[: np.count_nonzero(places_P)]
    chosen = list[int]()
    for size in places_P[order_P].tolist():
        if fitting := with_room >> size:
            left = size + (fitting & -fitting).bit_length() - 1
            at = open_by_room[left].pop()
            with_room ^= (not open_by_room[left]) << left
        else:
            left, at, num = room, num, num + 1
        chosen.append(at)
        if left > size:
            open_by_room.setdefault(left - size, []).append(at)
            with_room |= 1 << (left - size)
    sequences_P[order_P] = chosen
    return sequences_P
