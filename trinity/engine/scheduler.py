"""Which tokens go into the next forward passes: continuous batching, chunked prefill, preemption. Host code, no torch.

Clients take turns (fair_queue.py), and what was taken up first comes first: `running` is in that order, and all in `waiting`
comes later. A sequence is admitted when all its tokens fit; when the cache runs out, the last one taken up gives its blocks
back and is recomputed later. The first can take everything and always fits (kv_cache.py), so there is always progress.
Decodes go before prefill without a special case: all but the last running sequence have finished their prefill,
because a prefill that is cut short has used up the token budget.
"""

from typing import NamedTuple

from trinity.engine.fair_queue import FairQueue
from trinity.engine.kv_cache import KVCache
from trinity.engine.request import Chunk, Sequence
from trinity.engine.versions import Versions


class Pass(NamedTuple):
    """A forward pass to come: its weights, and the tokens that it computes. Their cache blocks are already theirs."""

    version: int
    chunks: list[Chunk]


class Scheduler:
    """Owns the sequences and the rows of the cache. `versions` says which weights each sequence computes with."""

    def __init__(self, cache: KVCache, versions: Versions, max_num_seqs: int, max_num_batched_tokens: int):
        self.cache, self.versions = cache, versions
        self.max_tokens = max_num_batched_tokens
        self.max_running = min(max_num_seqs, max_num_batched_tokens)  # so that every decode finds a place in every pass
        self.running: list[Sequence] = []
        self.waiting = FairQueue()
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        if sequence.num_generated:
            self.waiting.resume(sequence)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is finished, aborted or failed: forget it and take its blocks back."""
        if sequence.row is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Pass]:
        """The passes of the next step: one for each version that requests use. Takes up the newest version first, with or
        without work; empty only when nothing is left to do."""
        self.versions.follow(self.running)
        return [Pass(*each) for each in self.versions.passes(self._chunks())]

    def _chunks(self) -> list[Chunk]:
        batch: list[Chunk] = []
        budget, at = self.max_tokens, 0
        while budget and (at < len(self.running) or self._admit()):
            sequence = self.running[at]
            count = min(sequence.num_uncomputed, budget)
            if not self._make_room(sequence, sequence.num_computed + count):
                break  # the last one; it keeps what it has and waits for the others
            batch.append(Chunk(sequence, sequence.num_computed, count))
            self.waiting.charge(sequence, count)
            budget, at = budget - count, at + 1
        assert batch or not (self.running or self.waiting), "there is work but nothing could be scheduled"
        return batch

    def _admit(self) -> bool:
        """Start the sequence whose turn it is if it fits beside a spare block for each running one."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        if not self.cache.fits(len(self.waiting.first().token_ids), reserve=len(self.running)):
            return False
        sequence = self.waiting.take()
        sequence.row = self.cache.open_row()
        sequence.admitted()
        self.running.append(sequence)
        return True

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Get blocks for num_tokens, preempting what was taken up later if need be."""
        assert sequence.row is not None
        while not self.cache.grow(sequence.row, num_tokens):
            if self.running[-1] is sequence:
                return False
            self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.cache.close_row(sequence.row)
        sequence.row, sequence.num_computed = None, 0
