"""Sequences from many documents at once: a random sequential document buffer, so that no micro-batch is of one document.

Legend: G slots, U documents of a slot's buffer at least, S tokens of a sequence, B sequences of a batch, P spans of a batch.
Source: the Trinity report's RSDB (arXiv 2602.17004): of the documents in a buffer one is picked, and read on from where its
head stands, until a sequence is full; nothing is dropped.
Decisions. There are as many slots as sequences in a step, each with every G-th document of an epoch's order, so that any number
of workers reads the same sequences: those of a slot follow from lengths and the seed alone, and are replayed without reading a
token, from the newest state that is kept (slot_states.py). The last input of a span has the document's next token as its
target, read ahead and not consumed; after a document's end there is none.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from trinity.data.dataset import IGNORE, Batch, Drawn, Facts, Packed
from trinity.data.shards import ranges
from trinity.data.slot_states import SlotStates
from trinity.data.token_store import TokenStore

AT_ONCE = 1024  # documents of a slot whose places are looked up together, and numbers that are drawn together
Span = tuple[int, int, int]  # a document, the place in it where the span begins, and its tokens


class Draws:
    """Numbers as `rng.integers(n)` gives them one after the other, drawn many at a time: of 32 bits each, made smaller by
    Lemire's method (arXiv 1805.10941), as numpy does."""

    def __init__(self, seed: Sequence[int], before: int = 0):
        """`before` of them have been drawn: two at a time are one step of the generator."""
        generator = np.random.PCG64(seed)
        self._rng, self._ahead = np.random.Generator(generator.advance(before // 2)), list[int]()
        self._num_made = before
        if before % 2:
            self._rng.integers(2**32, dtype=np.uint32)

    @property
    def num(self) -> int:
        """Numbers drawn so far."""
        return self._num_made - len(self._ahead)

    def below(self, num: int) -> int:
        """A number of 0 .. num - 1; of one nothing is drawn."""
        if num == 1:
            return 0
        while True:
            if not self._ahead:
                self._ahead = self._rng.integers(2**32, size=AT_ONCE, dtype=np.uint32)[::-1].tolist()
                self._num_made += AT_ONCE
            product = self._ahead.pop() * num
            rest = product & 0xFFFFFFFF
            if rest >= num or rest >= (2**32 - num) % num:
                return product >> 32


class Slot:
    """The sequences of one slot, in their order. Owned by one dataset."""

    def __init__(self, dataset: "BufferedDocuments", slot: int):
        self._dataset, self._slot = dataset, slot
        self._take_up(np.zeros(3, np.int64))

    @property
    def state(self) -> np.ndarray:
        """Sequences, documents and numbers taken so far, then document and head of each in the buffer: int64."""
        live = [each for document, head, _ in self._live for each in (document, head)]
        return np.array([self._num, self._num_documents, self._draws.num, *live], np.int64)

    def _take_up(self, state: np.ndarray) -> None:
        self._num, self._num_documents, num_drawn = state[:3].tolist()
        self._draws = Draws([self._dataset.seed, self._slot, 1], num_drawn)
        self._documents = self._dataset.documents_of(self._slot, self._num_documents)
        lengths = self._dataset.lengths_N[state[3::2]]
        self._live = np.stack([state[3::2], state[4::2], lengths], 1).tolist()  # document, head, length

    def sequence(self, number: int) -> list[Span]:
        """The spans of that one of its sequences. Quick for the next one; others are found from the state before them that is
        kept, or from the beginning."""
        if number != self._num:
            self._come_near(number)
        while True:
            if self._states is not None and self._states.is_due(self._slot, self._num):
                self._states.save(self._slot, self.state)
            spans, self._num = self._filled(), self._num + 1
            if self._num > number:
                return spans

    def _come_near(self, number: int) -> None:
        kept = self._states.latest(self._slot, number) if self._states is not None else None
        if number < self._num or (kept is not None and kept[0] > self._num):
            self._take_up(np.zeros(3, np.int64) if kept is None else kept)

    @property
    def _states(self) -> SlotStates | None:
        return self._dataset.states

    def _filled(self) -> list[Span]:
        spans, room, most = list[Span](), self._dataset.seq_len, self._dataset.num_buffered
        live, below = self._live, self._draws.below
        while room:
            if len(live) <= most:
                self._refill(2 * most - len(live))
            at = below(len(live))
            document, head, length = live[at]
            num = min(length - head, room)
            spans.append((document, head, num))
            room -= num
            if head + num == length:
                live[at] = live[-1]
                live.pop()
            else:
                live[at][1] = head + num
        return spans

    def _refill(self, num: int) -> None:
        found = list(itertools.islice(self._documents, num))
        self._num_documents += num
        lengths = self._dataset.lengths_N[found].tolist()
        self._live += [[document, 0, length] for document, length in zip(found, lengths, strict=True)]


class BufferedDocuments(Packed):
    """Sequences in the order of the steps that take them: number n is the (n // G)-th of slot n % G."""

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        seed: int,
        num_slots: int,
        num_buffered: int,
        drawn: Drawn | None = None,
        states: SlotStates | None = None,
    ):
        super().__init__(store, seq_len, seed, drawn)
        self.states = states
        self.lengths_N = np.diff(store.starts_N)
        self.num_slots, self.num_buffered = num_slots, num_buffered
        self._documents_M = np.flatnonzero(self.lengths_N) if drawn is None else drawn.documents_M
        self.num_sequences = int(self.lengths_N[self._documents_M].sum()) // seq_len
        self._slots: dict[int, Slot] = {}

    def _too_little(self) -> str:
        return (
            f"{len(self.store.tokens)} tokens of text are less than one sequence of train.seq_len {self.seq_len}; "
            "give more text or a smaller train.seq_len"
        )

    @property
    def facts(self) -> Facts:
        return {**super().facts, "rsdb_documents": self.num_buffered}

    @property
    def _num_shuffled(self) -> int:
        """The documents are, not the sequences."""
        return len(self._documents_M)

    def indices(self, nth_B: np.ndarray) -> np.ndarray:
        """Numbers of the order itself; each document is read once before any is read again."""
        return nth_B

    def documents_of(self, slot: int, before: int = 0) -> Iterator[int]:
        """Its documents, epoch after epoch, each in an order of its own, after so many. Where there are fewer documents than
        slots, those of the slots that would have none are all of them."""
        first, apart = (slot, self.num_slots) if slot < self._num_shuffled else (0, 1)
        epochs, rest = divmod(before, len(range(first, self._num_shuffled, apart)))
        for epoch in itertools.count(epochs):
            order, at_once = self._order(epoch), AT_ONCE * apart
            for begin in range(first + rest * apart, self._num_shuffled, at_once):
                places = np.arange(begin, min(begin + at_once, self._num_shuffled), apart)
                yield from self._documents_M[order[places]].tolist()
            rest = 0

    def take(self, sequences_B: np.ndarray) -> Batch:
        found = [self._spans(int(number)) for number in sequences_B]
        documents_P, heads_P, nums_P = np.array(list(itertools.chain.from_iterable(found)), np.int64).T
        at_T = ranges(self.store.starts_N[documents_P] + heads_P, nums_P)
        ids_T = self.store.tokens[at_T].astype(np.int64)
        targets_T = np.append(ids_T[1:], IGNORE)
        targets_T[np.cumsum(nums_P) - 1] = self._after(documents_P, heads_P + nums_P)
        spans_P = np.concatenate([np.arange(len(spans)) for spans in found])
        arrays = (ids_T, targets_T, np.repeat(spans_P, nums_P))
        return Batch(*(torch.from_numpy(each.reshape(len(found), self.seq_len)) for each in arrays))

    def _spans(self, number: int) -> list[Span]:
        slot, nth = number % self.num_slots, number // self.num_slots
        if slot not in self._slots:
            self._slots[slot] = Slot(self, slot)
        return self._slots[slot].sequence(nth)

    def _after(self, documents_P: np.ndarray, ends_P: np.ndarray) -> np.ndarray:
        """The token of each document after a span that ends there; IGNORE after its last."""
        is_last_P = ends_P == self.lengths_N[documents_P]
        at_P = self.store.starts_N[documents_P] + ends_P - is_last_P
        return np.where(is_last_P, IGNORE, self.store.tokens[at_P].astype(np.int64))
