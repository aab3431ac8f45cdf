"""Which tokens go into the next forward passes: continuous batching, chunked prefill, preemption. Host code, no torch.

What is urgent comes first, then clients take turns (fair_queue.py), then what was taken up first: `running` is in that order,
and all of the same priority in `waiting` comes later. A sequence is admitted when all its tokens fit, or when they do once
less urgent ones have given way; when the cache runs out, the last one gives its blocks back and is recomputed later. The
first can take everything and always fits (kv_cache.py), so there is always progress.
Among equals decodes go before prefill without a special case: all but the last of them have finished their prefill, because a
prefill that is cut short has used up the token budget. While a prompt is computed nothing less urgent is in its passes: it
would wait for that, too.
"""

import bisect
import time
from typing import NamedTuple

from trinity.engine.fair_queue import PriorityQueue
from trinity.engine.kv_cache import KVCache
from trinity.engine.pace import Pace
from trinity.engine.request import Chunk, Sequence
from trinity.engine.speculation import Speculation
from trinity.engine.versions import Versions


class Pass(NamedTuple):
    """A forward pass to come: its weights, and the tokens that it computes. Their cache blocks are already theirs."""

    version: int
    chunks: list[Chunk]


class Scheduler:
    """Owns the sequences and the rows of the cache. `versions` says which weights each sequence computes with, `pace` how many
    tokens a step has, `drafts` what may follow a sequence's last token."""

    def __init__(self, cache: KVCache, versions: Versions, max_running: int, pace: Pace, drafts: Speculation):
        self.cache, self.versions, self.max_running, self.pace, self.drafts = cache, versions, max_running, pace, drafts
        self.running: list[Sequence] = []
        self.waiting = PriorityQueue()
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
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

    def late(self) -> list[Sequence]:
        """Waiting sequences that cannot have their next token by their deadline, even if all else stood still."""
        now_s = time.monotonic()
        return [s for s in self.waiting if s.until_s - now_s < self.pace.least_s(s.num_uncomputed)]

    def _chunks(self) -> list[Chunk]:
        self._make_way()
        batch: list[Chunk] = []
        budget, at, urgent = self.pace.size(len(self.running)), 0, float("inf")  # `urgent`: of the prompts in it
        while budget and (at < len(self.running) or self._admit()):
            sequence = self.running[at]
            if sequence.priority > urgent:
                break
            count = min(sequence.num_uncomputed, budget)
            if not self._make_room(sequence, sequence.num_computed + count):
                break  # the last one; it keeps what it has and waits for the others
            draft = self._draft(sequence, count, budget - (len(self.running) - at))
            batch.append(Chunk(sequence, sequence.num_computed, count + len(draft), draft))
            urgent = min(urgent, sequence.priority) if batch[-1].is_prefill else urgent
            self.waiting.charge(sequence, count)
            budget, at = budget - batch[-1].count, at + 1
        assert batch or not (self.running or self.waiting), "there is work but nothing could be scheduled"
        return batch

    def _draft(self, sequence: Sequence, count: int, spare: int) -> tuple[int, ...]:
        """A draft after its last token, where that is all it computes; nobody gives way for it."""
        assert sequence.row is not None
        if count != 1 or sequence.num_uncomputed != 1 or spare <= 0:
            return ()
        room = min(spare, self.cache.layout.max_model_len - len(sequence.token_ids) - 1)
        draft = self.drafts.draft(sequence, room)
        return draft if self.cache.grow(sequence.row, len(sequence.token_ids) + len(draft)) else ()

    def _make_way(self) -> None:
        """Start what is more urgent than the last that runs; less urgent ones give way where it does not fit."""
        while self._is_urgent():
            if not self._admit():
                self._preempt(self.running[-1])

    def _is_urgent(self) -> bool:
        return bool(self.waiting and self.running) and self.waiting.first().priority < self.running[-1].priority

    def _admit(self) -> bool:
        """Start the sequence whose turn it is if it fits beside a spare block for each running one."""
        if not self.waiting or len(self.running) >= self.max_running:
            return False
        if not self.cache.fits(len(self.waiting.first().token_ids), reserve=len(self.running)):
            return False
        sequence = self.waiting.take()
        sequence.row = self.cache.open_row()
        sequence.admitted()
        bisect.insort(self.running, sequence, key=lambda each: each.priority)
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
