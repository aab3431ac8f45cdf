"""Which tokens go into the next forward passes: continuous batching, chunked prefill, preemption. Host code, no torch.

Clients take turns (fair_queue.py), and what was taken up first comes first: `running` is in that order, and all in `waiting`
comes later. A sequence is admitted when all its tokens fit; it begins with what is cached of it. One whose beginning is being
computed by another follows: it is admitted when that is done (prefix_cache.py). When the cache runs out, the last one taken up
gives its blocks back and goes on later, as does whose blocks are of no more use. The first can take everything and always fits
(block_table.py), so there is always progress.
Decodes go before prefill without a special case: all but the last running sequence have finished their prefill,
because a prefill that is cut short has used up the token budget.
"""

from typing import NamedTuple

from trinity.engine.fair_queue import FairQueue
from trinity.engine.kv_cache import KVCache
from trinity.engine.prefix_cache import PrefixCache
from trinity.engine.request import Chunk, Sequence
from trinity.engine.versions import Versions


class Pass(NamedTuple):
    """A forward pass to come: its weights, and the tokens that it computes. Their cache blocks are already theirs."""

    version: int
    chunks: list[Chunk]


class Scheduler:
    """Owns the sequences and the rows of the cache. `versions` says which weights each sequence computes with, `prefixes` what
    it need not compute."""

    def __init__(
        self,
        cache: KVCache,
        versions: Versions,
        prefixes: PrefixCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ):
        self.cache, self.versions, self.prefixes = cache, versions, prefixes
        self.max_tokens = max_num_batched_tokens
        self.max_running = min(max_num_seqs, max_num_batched_tokens)  # so that every decode finds a place in every pass
        self.running: list[Sequence] = []
        self.following: list[Sequence] = []  # each has a place among the running ones, and no row
        self.waiting = FairQueue()
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.following)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is finished, aborted or failed: forget it and take its blocks back."""
        if sequence.row is not None:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.awaits is not None:
            self.following.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Pass]:
        """The passes of the next step: one for each version that requests use. Takes up the newest version first, with or
        without work; empty only when nothing is left to do."""
        if self.versions.follow(self.running, self.following):
            self.cache.drop(self.versions.is_withdrawn)
        for sequence in [each for each in reversed(self.following) if not each.is_waiting_for_another]:
            self._let_go_on(sequence)
        for sequence in [each for each in reversed(self.running) if not each.num_computed]:
            self._put_back(sequence)
        return [Pass(*each) for each in self.versions.passes(self._chunks())]

    def _chunks(self) -> list[Chunk]:
        batch: list[Chunk] = []
        budget, at = self.max_tokens, 0
        while budget and (at < len(self.running) or self._admit()):
            sequence = self.running[at]
            count = min(sequence.num_uncomputed, budget)
            some = self.prefixes.stop(sequence, count)
            if not self._make_room(sequence, sequence.num_computed + some):
                break  # the last one; it keeps what it has and waits for the others
            batch.append(Chunk(sequence, sequence.num_computed, some))
            self.waiting.charge(sequence, some)
            budget, at = budget - count, at + 1
        assert batch or not (self.running or self.following or self.waiting), (
            "there is work but nothing could be scheduled"
        )
        return batch

    def _admit(self) -> bool:
        """Start the sequence whose turn it is if it fits beside a spare block for each running one. Those that find another one
        about to compute what they need let the next one pass."""
        while self.waiting and len(self.running) + len(self.following) < self.max_running:
            sequence = self.waiting.first()
            hit = self.prefixes.match(sequence)
            if (other := self.prefixes.leader(sequence, hit, self.running)) is not None:
                sequence.awaits = other
                self.following.append(self.waiting.take())
            elif self.cache.fits(len(sequence.token_ids), hit, reserve=len(self.running)):
                self.prefixes.begin(self.waiting.take(), hit)
                sequence.admitted()
                self.running.append(sequence)
                return True
            else:
                return False
        return False

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Get blocks for num_tokens, preempting what was taken up later if need be."""
        assert sequence.row is not None
        while not self.cache.grow(sequence.row, num_tokens):
            if self.running[-1] is sequence:
                return False
            self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._put_back(sequence)
        self.num_preemptions += 1

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.put_back(sequence)

    def _let_go_on(self, sequence: Sequence) -> None:
        """The one that it has followed is where their ways part, or gone."""
        self.following.remove(sequence)
        sequence.awaits = None
        self.waiting.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.cache.close_row(sequence.row)
        sequence.row, sequence.num_computed = None, 0
