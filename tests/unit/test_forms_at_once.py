"""Experts in 8 and 4 bits that are moved, replicated and updated while callers ask all the time: each answer is the one of a
monolith of that form at that version, bit for bit, through rings and without."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.dataplane import ring
from tests.unit.test_replicas import MovingView
from tests.unit.test_ring import ALL, LAYER, MODEL, Served, batch
from trinity.config import OptimConfig
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.near import NearExchange
from trinity.dispatch.transport import LocalTransport
from trinity.experts.migration import migrate_in
from trinity.pool.local import local_pool
from trinity.rpc.messages import Commit, Copy, Load, Prepare, PruneTo, Stage

NAMES, NUM = ("shard-0", "shard-1", "shard-2"), 3
LRS = dict.fromkeys(("matrices", "others", "muon", "adamw", "expert"), 0.1)
changes = st.one_of(
    st.just(("step",)),
    *[st.tuples(st.sampled_from(["copy", "move"]), st.sampled_from(ALL), st.sampled_from(NAMES))] * 2,
)


class Pool:
    """Shards in this process, and what is done to them; `whole` is the monolith."""

    def __init__(self, form):
        load, made = Load(seed=5), {"optim": OptimConfig(), "backend": "torch", "expert_dtype": form}
        self.whole = local_pool(MODEL, load, **made)
        self.served = Served(NUM, None, torch.float32, form) if ring.is_possible() else None
        pool = self.served.local if self.served else local_pool(MODEL, load, num_shards=NUM, **made)
        self.transport, self.view, self.version = pool.transport, MovingView(pool.table), 0
        x, ids, weights = batch()
        self.rows = x, ids[:, :2].contiguous(), weights[:, :2].contiguous()  # whose sums have one order
        self.wanted = [self._of_whole(0)]  # by version

    @torch.inference_mode()
    def _of_whole(self, version):
        return self.whole.dispatcher(version)(LAYER, *self.rows)

    def callers(self):
        transports = [LocalTransport(self.transport.shards), *([self.served.transport] if self.served else [])]
        return [Dispatcher(self.view, each, timeout_s=60) for each in transports]

    def step(self):
        for shard in (*self.whole.transport.shards.values(), *self.transport.shards.values()):
            shard.prepare(Prepare(self.version + 1))
            shard.stage(Stage(self.version + 1, LRS, 1.0))
            shard.commit(Commit(self.version + 1))
        self.wanted.append(self._of_whole(self.version + 1))
        self.version += 1

    def copy(self, expert, shard, *, stays=True):
        table, name = self.view.table, (LAYER, expert)
        holders = [table.shards[at] for at in table.holders(name)]
        new = table if shard in holders else table.with_replica(name, shard)
        for other in () if stays else holders:
            new = new if other == shard else new.without_replica(name, other)
        new = replace(new, epoch=table.epoch + 1)
        if shard not in holders:
            message = Copy(LAYER, (expert,), (holders[0],), self.version, 4e9, self.version, new.epoch)
            migrate_in(self.transport.shards[shard], message, self.transport, None)
        self.view.table = new
        for each, held in self.transport.shards.items():
            held.prune_to(PruneTo(new.experts_of(each), new.epoch))

    def move(self, expert, shard):
        self.copy(expert, shard, stays=False)

    def close(self):
        if self.served:
            self.served.close()


class Asking:
    """Callers that take turns and never stop."""

    def __init__(self, pool):
        self.pool, self.news, self.is_over = pool, threading.Condition(), False
        self.num_answers = self.num_near = 0
        self.wrong = []

    @torch.inference_mode()
    def run(self):
        callers = self.pool.callers()
        while not self.is_over:
            caller, version = callers[self.num_answers % len(callers)], self.pool.version
            caller.use(version)
            sent = caller.begin(LAYER, *self.pool.rows)
            is_right = torch.equal(sent.result(), self.pool.wanted[version])
            with self.news:
                self.num_answers += 1
                self.num_near += isinstance(sent, NearExchange)
                self.wrong += [] if is_right else [(self.num_answers, version, type(sent))]
                self.news.notify_all()

    def wait(self):
        """Until each caller has asked anew and been answered."""
        with self.news:
            until = self.num_answers + 3
            assert self.news.wait_for(lambda: self.num_answers >= until or self.is_over, 60)


@contextmanager
def asking(pool):
    found = Asking(pool)
    thread = threading.Thread(target=found.run)
    thread.start()
    try:
        yield found
    finally:
        found.is_over = True
        thread.join()
        pool.close()


@pytest.mark.parametrize("form", ["int8", "fp8", "nvfp4"])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(trace=st.lists(changes, min_size=1, max_size=4))
def test_callers_get_a_monoliths_answers_whatever_is_done_meanwhile(form, trace):
    pool = Pool(form)
    with asking(pool) as found:
        found.wait()
        for what, *which in (*trace, ("copy", 0, "shard-2"), ("step",), ("move", 0, "shard-1"), ("step",)):
            getattr(pool, what)(*which)
            found.wait()
    assert not found.wrong
    assert found.num_near > 0 or not ring.is_possible()
    assert len(pool.wanted) > 2
    assert all(not torch.equal(a, b) for a, b in zip(pool.wanted, pool.wanted[1:], strict=False)), "weights decay"
