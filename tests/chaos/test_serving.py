"""Streams through a real engine while its shards are killed and its experts move: no error, the text of an undisturbed run.

`pytest -m chaos tests/chaos` for the long ones, with their figures printed by -s; a smoke of them runs by default.
"""

import os
import random
import signal
import statistics
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from trinity.bench.models import checkpoint
from trinity.config import EngineConfig, PlacementConfig, preset
from trinity.engine.request import SamplingParams
from trinity.llm import LLM
from trinity.rpc.messages import Load

MODEL = preset("tiny")
ENGINE = EngineConfig(max_num_seqs=200, max_num_batched_tokens=1024, max_model_len=256)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return checkpoint(MODEL, tmp_path_factory.mktemp("chaos") / "tiny")


class Pool:
    """A pool of shard actors, and the ways to hurt it."""

    def __init__(self, ray, settings, path, state_dir):
        from actors import pool as pools
        from actors.control.admin import operator

        self.ray, self.settings = ray, settings
        self.pool = pools.create(settings, "trinity", MODEL, None, str(state_dir))
        self.pool.load(Load(str(path), training=False))
        self.operator = operator(settings, "trinity")

    def ready(self):
        """Every shard there, and everything where the table says, with the redundancy that was asked for."""
        wanted = min(1 + self.settings.redundancy, len(self.operator.snapshot().table.shards))
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            seen = self.operator.snapshot()
            table = seen.table
            full = sum(s.num_replicas for s in seen.shards) == int(table.num_replicas_LE.sum())
            idle = all(change.phase in ("done", "rolled back") for change in seen.changes)
            if {s.state for s in seen.shards} == {"ready"} and full and idle and table.num_replicas_LE.min() >= wanted:
                return seen
            time.sleep(0.05)
        held = sum(s.num_replicas for s in seen.shards)
        states = [(s.name, s.state, s.num_replicas) for s in seen.shards]
        phases = [(c.epoch, c.reason, c.phase, round(time.time() - c.started_s)) for c in seen.changes[:4]]
        low, num = int(table.num_replicas_LE.min()), int(table.num_replicas_LE.sum())
        pytest.fail(f"not whole: {states} hold {held} of {num} replicas, at least {low} of {wanted}; changes {phases}")

    def recovered(self, num):
        """So many recoveries since the start, and whole."""
        deadline = time.monotonic() + 90
        while self.operator.snapshot().num_recoveries < num:
            assert time.monotonic() < deadline, "the shard did not come back"
            time.sleep(0.05)
        return self.ready()

    def signal(self, shard, number):
        """-> the process id; waits for a shard that is starting again."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                pid = self.ray.get(self.pool.shards[shard].where.remote(), timeout=30)[1]
            except self.ray.exceptions.RayActorError:
                time.sleep(0.1)
                continue
            os.kill(pid, number)
            return pid
        pytest.fail(f"{shard} does not answer")


@pytest.fixture
def made(ray_session, path, tmp_path):
    from actors import pool as pools

    found = []

    def make(**settings):
        fast = dict(watch_every_s=0.2, drain_s=0.1, balance_every_s=0, call_timeout_s=60, attempt_timeout_s=2)
        named = PlacementConfig(pool=f"c-{uuid.uuid4().hex[:8]}", **fast | settings)
        found.append(Pool(ray_session, named, path, tmp_path / named.pool))
        return found[-1]

    yield make
    for each in found:
        pools.destroy(each.settings.pool, "trinity")


class Streams:
    """Greedy requests through an engine: their tokens, what failed, and how long each forward pass took."""

    def __init__(self, path, num, new_tokens, experts=None):
        rng = np.random.default_rng(0)
        self.llm = LLM(path, engine=ENGINE, experts=experts)
        self.prompts = rng.integers(20, 500, (num, 16)).tolist()
        self.params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        self.tokens, self.errors, self.pass_s = {}, [], []

    def run(self, prefix=""):
        """-> the streams' tokens, in order."""
        engine, tokens = self.llm.engine, {f"{prefix}{i}": [] for i in range(len(self.prompts))}
        for name, prompt in zip(tokens, self.prompts, strict=True):
            engine.add(name, prompt, self.params)
        while engine.has_work:
            started = time.monotonic()
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
                if delta.finish_reason == "error":
                    self.errors.append(delta.error)
            self.pass_s.append(time.monotonic() - started)
        return list(tokens.values())


def p99(values):
    return sorted(values)[int(0.99 * len(values))]


def while_streaming(streams, disturb):
    """Run the streams again and again while `disturb` goes on; every round must give what the first one gave."""
    errors = []

    def act():
        try:
            disturb()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    rounds = []
    while thread.is_alive() or not rounds:
        rounds.append(streams.run(f"{len(rounds)}-"))
    thread.join()
    assert not errors, errors
    return rounds


def test_streams_outlive_a_killed_shard_and_a_move(made, path):
    """The smoke: one kill with replicas elsewhere, one shard more."""
    pool = made(num_shards=2, redundancy=1)
    pool.ready()
    want = Streams(path, 8, 24).run()
    streams = Streams(path, 8, 24, pool.pool.dispatcher())
    assert streams.run() == want

    def disturb():
        pool.signal("shard-0", signal.SIGKILL)
        pool.operator.scale(3, "more")
        time.sleep(1.0)
        while len(pool.operator.snapshot().table.shards) < 3:
            time.sleep(0.05)
        pool.ready()

    rounds = while_streaming(streams, disturb)
    assert streams.errors == []
    assert all(tokens == want for tokens in rounds)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_f12_200_streams_lose_one_of_two_replicas_of_everything(made, path):
    pool = made(num_shards=2, redundancy=1)
    pool.ready()
    want = Streams(path, 200, 64).run()
    streams = Streams(path, 200, 64, pool.pool.dispatcher())
    streams.run("quiet-")
    quiet_s, streams.pass_s = streams.pass_s, []

    def disturb():
        for num, victim in enumerate(("shard-0", "shard-1", "shard-0"), 1):
            time.sleep(1.0)
            pool.signal(victim, signal.SIGKILL)
            pool.recovered(num)

    rounds = while_streaming(streams, disturb)
    stall_s = max(streams.pass_s) - statistics.median(quiet_s)
    print(f"\n{200 * len(rounds)} streams, 3 kills: {len(streams.errors)} failed, longest added stall {stall_s:.3f} s")
    assert streams.errors == []
    assert all(tokens == want for tokens in rounds)
    assert pool.operator.snapshot().num_recoveries == 3


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_f13_64_streams_lose_the_only_replica(made, path):
    pool = made(num_shards=2)
    pool.ready()
    want = Streams(path, 64, 64).run()
    streams = Streams(path, 64, 64, pool.pool.dispatcher())
    streams.run("quiet-")
    quiet_s, streams.pass_s = streams.pass_s, []

    def disturb():
        for num, victim in enumerate(("shard-0", "shard-1"), 1):
            time.sleep(1.0)
            pool.signal(victim, signal.SIGKILL)
            pool.recovered(num)

    rounds = while_streaming(streams, disturb)
    stalls_s = sorted(streams.pass_s)[-2:]
    print(f"\n{64 * len(rounds)} streams, 2 kills without a replica: {len(streams.errors)} failed, stalls {stalls_s} s, "
          f"a pass otherwise {statistics.median(quiet_s):.3f} s")  # fmt: skip
    assert streams.errors == []
    assert all(tokens == want for tokens in rounds)


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_f17_100_random_cycles_leave_no_leak_no_error_and_the_same_text(made, path):
    """Grow, shrink, move, replicate, kill and hang at random, while streams run."""
    pool, rng = made(num_shards=2, redundancy=1), random.Random(int(os.environ.get("TRINITY_CHAOS_SEED", "0")))
    pool.ready()
    want = Streams(path, 16, 32).run()
    streams = Streams(path, 16, 32, pool.pool.dispatcher())
    done, descriptors = [], len(os.listdir("/proc/self/fd"))

    def disturb():
        for _ in range(int(os.environ.get("TRINITY_CHAOS_CYCLES", "100"))):
            shards = pool.operator.snapshot().table.shards
            what = rng.choice(["scale", "scale", "drain", "replicate", "rebalance", "kill", "hang"])
            if what == "scale":
                pool.operator.scale(rng.randint(2, 4), "chaos")
            elif what == "drain" and len(shards) > 2:
                pool.operator.drain(rng.choice(shards))
            elif what == "replicate":
                layer, expert = rng.choice(MODEL.moe_layers), rng.randrange(MODEL.num_experts)
                pool.operator.replicate(layer, expert, rng.randint(1, len(shards)))
            elif what == "rebalance":
                pool.operator.rebalance()
            elif what == "kill":
                pool.signal(rng.choice(shards), signal.SIGKILL)
            elif what == "hang":
                pid = pool.signal(rng.choice(shards), signal.SIGSTOP)
                time.sleep(rng.uniform(0.1, 3.0))
                os.kill(pid, signal.SIGCONT)
            done.append(what)
            time.sleep(rng.uniform(0.0, 1.0))
            if rng.random() < 0.5:
                pool.ready()
        pool.ready()

    rounds = while_streaming(streams, disturb)
    seen = pool.ready()
    print(f"\n{len(done)} cycles, {16 * len(rounds)} streams, {len(streams.errors)} errors, {seen.num_recoveries} recoveries, "
          f"epoch {seen.table.epoch}, longest pass {max(streams.pass_s):.2f} s")  # fmt: skip
    assert streams.errors == []
    assert all(tokens == want for tokens in rounds)
    assert len(os.listdir("/proc/self/fd")) < descriptors + 20, "connections to shards that have gone stay open"
    names = {entry["name"] for entry in pool.ray.util.list_named_actors(all_namespaces=True)}
    mine = {name.rsplit("/", 1)[1] for name in names if pool.settings.pool in name}
    assert mine == {"placement", *seen.table.shards}, "a shard that is not in the table is still there"
