"""Whole examples of conversations packed into sequences: nothing is cut that a reader needs.

Legend: N examples.
Decision: one that is longer than a sequence ends after its last answer that fits; one whose first answer does not fit is left
out; both are counted and said. The others are packed as documents are (best_fit.py).
"""

import numpy as np

from trinity.data.best_fit import PackedPieces
from trinity.data.formats import say_once
from trinity.data.token_store import TokenStore


class PackedChats(PackedPieces):
    """Sequences of examples of conversations, each of which sees itself alone."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int):
        super().__init__(store, seq_len, seed, store.starts_N[:-1], _fitting(store, seq_len))

    def _too_little(self) -> str:
        return f"no conversation has an answer within train.seq_len {self.seq_len}; raise it, or give shorter ones"


def _fitting(store: TokenStore, seq_len: int) -> np.ndarray:
    """places_N: of each example, of as much of it as fits; 0 for one that is left out."""
    assert store.trained is not None, "a store of conversations"
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
