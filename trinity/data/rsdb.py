"""Sequences from many documents at once: a random sequential document buffer, so that no micro-batch is of one document.

Legend: G slots, U documents of a slot's buffer at least, S tokens of a sequence.
Source: the Trinity report's RSDB (arXiv 2602.17004): of the documents in a buffer one is picked, and read on from where its
head stands, until a sequence is full; nothing is dropped.
Decisions. There are as many slots as sequences in a step, each with every G-th document of an epoch's order, so that any number
of workers reads the same sequences: those of a slot follow from lengths and the seed alone, and are replayed without reading a
token. The last input of a span has the document's next token as its target, read ahead and not consumed; after a document's end
there is none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from trinity.data.dataset import IGNORE, Batch, Packed
from trinity.data.token_store import TokenStore


class Span(NamedTuple):
    """`num` tokens of a document, from `head` on."""

    document: int
    head: int
    num: int


class Slot:
    """The sequences of one slot, in their order. Owned by one dataset."""

    def __init__(self, dataset: "BufferedDocuments", slot: int):
        self._dataset, self._slot = dataset, slot
        self._rewind()

    def _rewind(self) -> None:
        self._rng = np.random.default_rng([self._dataset.seed, self._slot, 1])
        self._documents, self._live, self._num = self._dataset.documents_of(self._slot), list[list[int]](), 0

    def sequence(self, number: int) -> list[Span]:
        """The spans of that one of its sequences. Quick for the next one; an older one is found from the beginning."""
        if number < self._num:
            self._rewind()
        while True:
            spans, self._num = self._filled(), self._num + 1
            if self._num > number:
                return spans

    def _filled(self) -> list[Span]:
        spans, room, most = list[Span](), self._dataset.seq_len, self._dataset.num_buffered
        while room:
            if len(self._live) <= most:
                self._live += [[next(self._documents), 0] for _ in range(2 * most - len(self._live))]
            at = int(self._rng.integers(len(self._live)))
            document, head = self._live[at]
            num = min(int(self._dataset.lengths_N[document]) - head, room)
            spans.append(Span(document, head, num))
            room -= num
            self._live[at][1] = head + num
            if head + num == self._dataset.lengths_N[document]:
                self._live[at] = self._live[-1]
                self._live.pop()
        return spans


class BufferedDocuments(Packed):
    """Sequences in the order of the steps that take them: number n is the (n // G)-th of slot n % G."""

    def __init__(self, store: TokenStore, seq_len: int, seed: int, num_slots: int, num_buffered: int):
        super().__init__(store, seq_len, seed)
        self.lengths_N = np.diff(store.starts_N)
        self.num_slots, self.num_buffered = num_slots, num_buffered
        self.num_sequences = int(self.lengths_N.sum()) // seq_len
        self._slots: dict[int, Slot] = {}

    def _too_little(self) -> str:
        return (
            f"{len(self.store.tokens)} tokens of text are less than one sequence of train.seq_len {self.seq_len}; "
            "give more text or a smaller train.seq_len"
        )

    def sequences(self, step: int, global_batch: int) -> np.ndarray:
        """Numbers of the sequences of `step`, int64 [global_batch]; each document is read once before any is read again."""
        self.require_text()
        return np.arange(step * global_batch, (step + 1) * global_batch)

    def documents_of(self, slot: int) -> Iterator[int]:
        """Its documents, epoch after epoch, each in an order of its own. Where there are fewer documents than slots, those of
        the slots that would have none are all of them."""
        epoch = 0
        while True:
            order_N = self._permutation(epoch)
            mine = order_N[slot :: self.num_slots]
            yield from (int(n) for n in (mine if len(mine) else order_N))
            epoch += 1

    def _new_permutation(self, epoch: int) -> np.ndarray:
        """Permute the documents, not the sequences."""
        return np.random.default_rng([self.seed, epoch]).permutation(np.flatnonzero(self.lengths_N))

    def take(self, sequences_B: np.ndarray) -> Batch:
        rows = [self._row(int(number)) for number in sequences_B]
        return Batch(*(torch.from_numpy(np.stack(side)) for side in zip(*rows, strict=True)))

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, targets, documents) of a sequence, int64 [S]."""
        slot, nth = number % self.num_slots, number // self.num_slots
        if slot not in self._slots:
            self._slots[slot] = Slot(self, slot)
        spans = self._slots[slot].sequence(nth)
        parts = [self._span(span) for span in spans]
        ids, targets = (np.concatenate(side) for side in zip(*parts, strict=True))
        return ids, targets, np.repeat(np.arange(len(spans)), [span.num for span in spans])

    def _span(self, span: Span) -> tuple[np.ndarray, np.ndarray]:
        begin, end = (int(each) for each in self.store.starts_N[span.document : span.document + 2])
        at = begin + span.head
        ids = self.store.tokens[at : min(at + span.num + 1, end)].astype(np.int64)
        followed = ids[1:] if len(ids) > span.num else np.append(ids[1:], IGNORE)
        return ids[: span.num], followed
