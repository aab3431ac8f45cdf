"""Which tokens go into the next forward passes: continuous batching, chunked prefill, preemption. Host code, no torch.

What is urgent comes first, then clients take turns (fair_queue.py), then what was taken up first: `running` is in that order,
and all of the same priority in `waiting` comes later. A sequence is admitted when all its tokens fit, or when they do once
less urgent ones have given way; it begins with what is cached of it. One whose beginning is being computed by another follows:
it is admitted when that is done (prefix_cache.py). When the cache runs out, the last one gives its blocks back and goes on
later, as does whose blocks are of no more use. The first can take everything and always fits (block_table.py), so there is
always progress.
Among equals decodes go before prefill without a special case: all but the last of them have finished their prefill, because a
prefill that is cut short has used up the token budget. While a prompt is computed nothing less urgent is in its passes: it
would wait for that, too.
"""

import bisect
import time
from typing import NamedTuple

from trinity.engine.fair_queue import PriorityQueue
from trinity.engine.kv_cache import Hit, KVCache
from trinity.engine.pace import Pace
from trinity.engine.prefix_cache import PrefixCache
from trinity.engine.request import Chunk, Sequence
from trinity.engine.speculation import Speculation
from trinity.engine.versions import Versions
from trinity.errors import Overloaded

RETRY_AFTER_S = 1.0
RECALL_S = 0.1  # before a pass, to bring what others have cached; of `engine.max_pass_ms` a quarter


class Pass(NamedTuple):
    """A forward pass to come: its weights, and the tokens that it computes. Their cache blocks are already theirs."""

    version: int
    chunks: list[Chunk]


def overloaded(most: int) -> Overloaded:
    return Overloaded(
        f"{most} requests are waiting, as many as engine.max_num_waiting allows; try again later",
        retry_after_s=RETRY_AFTER_S,
    )


class Scheduler:
    """Owns the sequences and the rows of the cache. `versions` says which weights each sequence computes with, `prefixes` what
    it need not compute, `pace` how many tokens a step has, `drafts` what may follow a sequence's last token."""

    def __init__(
        self,
        cache: KVCache,
        versions: Versions,
        prefixes: PrefixCache,
        max_running: int,
        pace: Pace,
        drafts: Speculation,
    ):
        self.cache, self.versions, self.prefixes, self.pace, self.drafts = cache, versions, prefixes, pace, drafts
        self.max_running = max_running
        self.running: list[Sequence] = []
        self.following: list[Sequence] = []  # each has a place among the running ones, and no row
        self.waiting = PriorityQueue()
        self.num_preemptions = 0
        self.recall_s = pace.max_s / 4 if pace.max_s else RECALL_S
        self._is_recalling = False  # what the next one begins with is brought, and not all there

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.following)

    def add(self, sequence: Sequence) -> None:
        if sequence.num_generated:
            self.waiting.resume(sequence)
        else:
            self.waiting.append(sequence)

    def room_for(self, priority: int, most: int) -> Sequence | None:
        """The waiting sequence whose place a newcomer of that priority takes, where `most` wait. Raises Overloaded where all
        are as urgent."""
        if self.num_waiting < most:
            return None
        last = self.waiting.last() if self.waiting else None
        if last is None or last.priority <= priority or last.num_generated:
            raise overloaded(most)
        return last

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
        self._is_recalling = False
        if self.versions.follow(self.running, self.following):
            self.prefixes.drop(self.versions.is_withdrawn)
        for sequence in [each for each in reversed(self.following) if not each.is_waiting_for_another]:
            self._let_go_on(sequence)
        for sequence in [each for each in reversed(self.running) if not each.num_computed]:
            self._put_back(sequence)
        return [Pass(*each) for each in self.versions.passes(self._chunks())]

    def late(self) -> list[Sequence]:
        """Waiting sequences that cannot have their next token by their deadline, even if all else stood still."""
        now_s = time.monotonic()
        soon = self.waiting.soon(lambda num_tokens, until_s: until_s - now_s < self.pace.least_s(num_tokens))
        return [s for s in (*self.following, *soon) if self._is_late(s, s.until_s - now_s)]

    def _is_late(self, sequence: Sequence, left_s: float) -> bool:
        if left_s >= self.pace.least_s(sequence.num_uncomputed):
            return False
        most = 1 if sequence.awaits is not None else sequence.num_uncomputed - self.prefixes.num_at_hand(sequence)
        return left_s < self.pace.least_s(most)

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
            draft = self._draft(sequence, budget - (len(self.running) - at)) if count == 1 else ()
            batch.append(Chunk(sequence, sequence.num_computed, count + len(draft), draft))
            urgent = min(urgent, sequence.priority) if batch[-1].is_prefill else urgent
            self.waiting.charge(sequence, count)
            budget, at = budget - count - len(draft), at + 1
        assert batch or not (self.running or self.following or self.waiting), (
            "there is work but nothing could be scheduled"
        )
        for chunk in batch:
            self.prefixes.keep(chunk)
        return batch

    def _draft(self, sequence: Sequence, spare: int) -> tuple[int, ...]:
        """Tokens that may follow its last one, which is all that it computes. Nobody gives way for a draft."""
        if sequence.num_uncomputed != 1 or spare <= 0:
            return ()
        draft = self.drafts.draft(sequence, min(spare, self.cache.layout.max_model_len - len(sequence.token_ids) - 1))
        if not draft or self.cache.num_spare <= len(self.running):
            return ()
        assert sequence.row is not None
        return draft if self.cache.grow(sequence.row, len(sequence.token_ids) + len(draft)) else ()

    def _make_way(self) -> None:
        """Start what is more urgent than the last that runs; less urgent ones give way where it does not fit."""
        while self._is_urgent():
            if self._take_up() is None and not self._is_recalling:
                self._preempt(self.running[-1])

    def _is_urgent(self) -> bool:
        is_other = bool(self.waiting and self.running) and not self._is_recalling
        return is_other and self.waiting.first().priority < self.running[-1].priority

    def _admit(self) -> bool:
        """Start the sequence whose turn it is. Whoever finds another one about to compute what it needs lets the next pass."""
        while (sequence := self._take_up()) is not None:
            if sequence.row is not None:
                return True
        return False

    def _take_up(self) -> Sequence | None:
        """-> the next one, which has begun or follows another now; None: it does not fit beside a spare block for each running
        one, or what it begins with is not all there yet."""
        is_full = len(self.running) + len(self.following) >= self.max_running
        if not self.waiting or is_full or self._is_recalling:
            return None
        sequence = self.waiting.first()
        hit = self.prefixes.match(sequence)
        sequence.awaits = self.prefixes.leader(sequence, hit, self.running)
        if sequence.awaits is not None:
            self.following.append(self.waiting.take())
        elif self.cache.fits(len(sequence.token_ids), hit, reserve=len(self.running)):
            return self._begin(sequence, hit)
        else:
            return None
        return sequence

    def _begin(self, sequence: Sequence, hit: Hit) -> Sequence | None:
        """Start the first that waits. Where others run it waits for what the node's tier has, a piece before each pass."""
        until_s = time.perf_counter() + self.recall_s if self.running else float("inf")
        hit, is_all = self.prefixes.recall(sequence, hit, until_s)
        if not is_all:
            self._is_recalling = True
            return None
        self.prefixes.begin(self.waiting.take(), hit)
        sequence.admitted()
        bisect.insort(self.running, sequence, key=lambda each: each.priority)
        return sequence

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
