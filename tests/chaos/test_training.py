"""Training under every fault of the list, long: whatever is killed, hangs, is lost or moves, no step is lost and the final
weights are bitwise those of the undisturbed run in one process (where experts moved, close: they add up in another order).

`make chaos`, or `pytest -s -m chaos tests/chaos/test_training.py`. F1 takes TRINITY_CHAOS_STEPS and TRINITY_CHAOS_SEEDS.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from actors.chaos.faulty_transport import FaultyTransport
from actors.chaos.plan import OF_PROCESSES, Fault
from tests.ray.runs import config_for, losses_of, train_here, weights_of
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.data.prepare import prepare
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
NUM_STEPS = int(os.environ.get("TRINITY_CHAOS_STEPS", "200"))
NUM_SEEDS = int(os.environ.get("TRINITY_CHAOS_SEEDS", "10"))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """steps -> losses by step and weights, made once for all tests of that length and that many shards."""
    made = {}

    def run(config):
        key = config.train.steps, config.placement.num_shards
        if key not in made:
            losses, checkpoint = train_here(config, tmp_path_factory.mktemp("undisturbed"))
            made[key] = list(losses.values()), weights_of(checkpoint)
        return made[key]

    return run


@pytest.fixture(scope="module")
def three(ray_session, tmp_path_factory):
    """The settings of a pool of three shards that stay where they are, for all tests whose experts do not move."""
    from actors import pool as pools

    folder = tmp_path_factory.mktemp("three")
    config = config_for(folder, steps=NUM_STEPS, num_shards=3)
    pools.create(config.placement, "trinity", config.model, config.optim, str(folder / "placement"))
    yield config
    pools.destroy(config.placement.pool, "trinity")


def run_of(three, tmp_path, steps, **placement):
    """A run of its own in that pool; -> its settings, trainer and what can be done to its pool."""
    from actors import pool as pools
    from actors.chaos.injector import Chaos

    config = three.replace(train={"steps": steps, "out_dir": str(tmp_path / "run")}, placement=placement)
    pool = pools.connect(config.placement, "trinity")
    return config, trainer_of(config, pool), Chaos(pool)


@pytest.fixture
def made(ray_session):
    """config -> its pool; ended after the test."""
    from actors import pool as pools

    found = []

    def make(config):
        found.append(config.placement.pool)
        state_dir = config.train.out_dir + "-placement"
        return pools.create(config.placement, "trinity", config.model, config.optim, state_dir)

    yield make
    for name in found:
        pools.destroy(name, "trinity")


def trainer_of(config, pool):
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, config.train.out_dir), Alone())
    trainer.start()
    return trainer


def same(config, trainer, losses, undisturbed):
    """Every loss and every bit."""
    want, weights = undisturbed(config)
    assert losses == want
    saved = open_checkpoint(trainer.save())
    mine = weights_of(saved)
    assert saved.version == config.train.steps
    assert mine.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(mine[key], weights[key])] == []


class Killer(threading.Thread):
    """SIGKILLs a random shard at a random moment of a step, again and again: every step has a chance of `odds`."""

    def __init__(self, chaos, trainer, rng, odds):
        super().__init__(daemon=True)
        self.chaos, self.trainer, self.rng, self.odds = chaos, trainer, rng, odds
        self.num_kills, self.stop = 0, threading.Event()

    def run(self):
        for step in count(1):
            while self.trainer.position < step:
                if self.stop.wait(0.005):
                    return
            if self.rng.random() < self.odds and not self.stop.wait(self.rng.uniform(0, 0.3)):
                self.chaos.kill(self.rng.choice(self.chaos.pool.table.shards))
                self.num_kills += 1


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_f1_random_shards_are_killed_at_random_points(three, tmp_path, undisturbed, seed):
    config, trainer, chaos = run_of(three, tmp_path, NUM_STEPS)
    killer = Killer(chaos, trainer, random.Random(seed), odds=8 / NUM_STEPS)
    killer.start()
    started = time.monotonic()
    losses = [trainer.step().loss for _ in range(NUM_STEPS)]
    killer.stop.set()
    killer.join(90)
    spent_s = time.monotonic() - started
    print(
        f"\nF1 seed {seed}: {killer.num_kills} kills in {NUM_STEPS} steps, {trainer.num_replays} replays, {spent_s:.0f} s"
    )
    assert killer.num_kills >= 1
    same(config, trainer, losses, undisturbed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("transport", ["direct", "ray"])
def test_f2_30_percent_of_requests_and_replies_are_lost(three, tmp_path, undisturbed, transport, seed):
    """Applied == issued is what `prepare` holds every shard to: a step with one op too few or too many is not decided."""
    config, trainer, chaos = run_of(three, tmp_path, 5, transport=transport)
    plain = chaos.pool.transport
    faulty = [
        FaultyTransport(each, random.Random(10 * seed + n), lose_request=0.3, lose_reply=0.3)
        for n, each in enumerate((plain, trainer.dispatcher.transport))
    ]
    chaos.pool.transport, trainer.dispatcher.transport = faulty
    losses = [trainer.step().loss for _ in range(5)]
    chaos.pool.transport = plain
    lost, sent = sum(each.lost for each in faulty), sum(each.sent for each in faulty)
    print(f"\nF2 {transport}, seed {seed}: {lost} of {sent} lost, {trainer.num_replays} replays")
    assert lost > 0.3 * sent
    assert trainer.num_replays == 0
    same(config, trainer, losses, undisturbed)


PHASES = ("infer", "backward", "prepare", "stage", "decide", "decided", "commit")


def test_f3_a_shard_is_killed_in_each_phase_of_a_step(three, tmp_path, undisturbed):
    """Before it can answer a verb, before the decision and right after it, each of three shards in turn. All shards are at one
    version after every step, and what was staged everywhere is not made again."""
    config, trainer, chaos = run_of(three, tmp_path, 24)
    victims = {3 + n: (phase, f"shard-{n % 3}") for n, phase in enumerate(PHASES * 3)}
    killed, replays = set(), {}
    carriers, decide = (chaos.pool.transport, trainer.dispatcher.transport), chaos.pool.decide

    def hit(phase, shard=None):
        step = trainer.version + (phase != "commit")
        wanted = victims.get(step)
        if wanted and step not in killed and wanted == (phase, shard or wanted[1]):
            killed.add(step)
            chaos.kill(wanted[1])

    def deciding(*arguments):
        hit("decide")
        decide(*arguments)
        hit("decided")

    def murderous(send):
        def sending(shard, verb, message):
            hit(verb, shard)
            return send(shard, verb, message)

        return sending

    for each in carriers:
        each.send = murderous(each.send)
    chaos.pool.decide = deciding
    losses = []
    for step in range(1, 25):
        before = trainer.num_replays
        losses.append(trainer.step().loss)
        replays[step] = trainer.num_replays - before
        assert set(chaos.pool.versions().values()) == {step}
    print(f"\nF3: {len(killed)} kills, replays by phase {[(victims[n][0], replays[n]) for n in sorted(killed)]}")
    assert killed == victims.keys()
    assert all(replays[n] == 0 for n, (phase, _) in victims.items() if phase in ("decide", "decided", "commit"))
    same(config, trainer, losses, undisturbed)


DEATHS = {"prepare": 3, "stage": 4, "decide": 6, "decided": 8, "commit": 10, "save": 14, "saved": 14}
LAST = 14


def dies_at(settings):
    """What the worker runs in the F4 test: it kills itself once at each of the deaths that the test names."""
    from actors.train import train_loop

    folder = Path(settings["config"]["train"]["out_dir"])
    deaths = json.loads((folder / "deaths.json").read_text())

    def prepared(trainer):
        for name in ("prepare", "stage", "decide", "commit", "save"):
            setattr(trainer.pool, name, deadly(trainer, getattr(trainer.pool, name), name))

    def deadly(trainer, call, name):
        def called(*arguments):
            die(trainer, name)
            answer = call(*arguments)
            die(trainer, f"{name}d")
            return answer

        return called

    def die(trainer, point):
        step = trainer.version + (point in ("prepare", "stage", "decide", "decided"))
        if deaths.get(point) == step and not (folder / f"died-{point}").exists():
            (folder / f"died-{point}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return train_loop(settings, prepared)


def test_f4_the_worker_dies_at_each_point_of_a_step(three, tmp_path, undisturbed):
    """It goes on from what was decided: the losses, the order of the data and the weights are those of an uninterrupted run.
    The last deaths are after the last step, while its checkpoint is being written."""
    from actors.train import fit

    out_dir = tmp_path / "run"
    config = three.replace(train={"steps": LAST, "out_dir": str(out_dir), "max_failures": -1})
    out_dir.mkdir()
    (out_dir / "deaths.json").write_text(json.dumps(DEATHS))
    started = time.monotonic()
    result = fit(config, dies_at)
    print(f"\nF4: {len(DEATHS)} deaths in {LAST} steps, {time.monotonic() - started:.0f} s")
    assert {path.name for path in out_dir.glob("died-*")} == {f"died-{point}" for point in DEATHS}
    assert (result["version"], result["position"]) == (LAST, LAST)
    want, weights = undisturbed(config)
    assert losses_of(out_dir) == dict(enumerate(want, 1))
    saved = open_checkpoint(latest_checkpoint(out_dir))
    mine = weights_of(saved)
    assert saved.version == LAST
    assert [key for key in weights if not torch.equal(mine[key], weights[key])] == []


def test_f8_a_shard_hangs_for_15_seconds(three, tmp_path, undisturbed):
    """No caller waits past its deadline, and nobody is started again."""
    config, trainer, chaos = run_of(three, tmp_path, 6)
    attempt, spent_s = trainer._attempt, []
    trainer.dispatcher.timeout_s = chaos.pool.timeout_s = 3.0

    def timed(*arguments, **more):
        started = time.monotonic()
        try:
            return attempt(*arguments, **more)
        finally:
            spent_s.append(time.monotonic() - started)

    trainer._attempt = timed
    losses = [trainer.step().loss for _ in range(2)]
    where = chaos.where("shard-1")
    thread = threading.Thread(target=chaos.stop, args=("shard-1", 15.0), daemon=True)
    started = time.monotonic()
    thread.start()
    losses += [trainer.step().loss]
    stalled_s = time.monotonic() - started
    losses += [trainer.step().loss for _ in range(3)]
    thread.join(30)
    print(f"\nF8: stalled {stalled_s:.1f} s, {trainer.num_replays} replays, longest attempt {max(spent_s):.1f} s")
    assert trainer.num_replays >= 1
    assert max(spent_s) < 14, "an attempt waits 3 s for rows, and as long for an answer to a verb: not for the 15 s"
    assert chaos.where("shard-1") == where, "nobody was started again"
    same(config, trainer, losses, undisturbed)


def near(config, trainer, losses, undisturbed):
    """Rows of experts that moved add up in another order: equal but for rounding."""
    want, weights = undisturbed(config)
    torch.testing.assert_close(losses, want, atol=1e-4, rtol=0)
    mine = weights_of(open_checkpoint(trainer.save()))
    for key, value in weights.items():
        torch.testing.assert_close(mine[key], value, atol=1e-4, rtol=0)


def test_f9_the_placement_service_is_killed_during_moves(ray_session, made, tmp_path, undisturbed):
    """Epochs only grow, and no row is computed by a shard without its expert: that would be an error, and another loss."""
    from actors.chaos.injector import Chaos
    from actors.control.admin import operator

    config = config_for(tmp_path, steps=16, num_shards=2)
    pool = made(config)
    trainer = trainer_of(config, pool)
    chaos, seen, epochs, losses = Chaos(pool), operator(config.placement, "trinity"), [], []
    kills = iter((0.0, 0.05, 0.2, 0.5))  # after the boundary at which experts start to move
    for step in range(1, 17):
        if step % 4 == 2:
            seen.scale(3 if step % 8 == 2 else 2, "test")
            threading.Timer(next(kills), chaos.kill_service).start()
        losses.append(trainer.step().loss)
        epochs.append(pool.table.epoch)
    assert epochs == sorted(epochs)
    assert len(set(epochs)) >= 2, "experts moved"
    print(f"\nF9: epochs {epochs}, {trainer.num_replays} replays")
    near(config, trainer, losses, undisturbed)


def test_f9_the_head_is_restarted_while_training(tmp_path):
    """In a process of its own: Ray's head dies for seconds and comes back."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    env |= storage | {"PYTHONPATH": str(ROOT), "RAY_gcs_rpc_server_reconnect_timeout_s": "120"}
    command = [sys.executable, str(Path(__file__).with_name("training_driver.py")), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "bitwise the undisturbed run" in done.stdout


def test_f10_shards_come_and_go_while_training(made, tmp_path, undisturbed):
    """1 -> 4 -> 2, each change between two steps."""
    from actors.control.admin import operator

    config = config_for(tmp_path, steps=12, num_shards=1)
    pool = made(config)
    trainer = trainer_of(config, pool)
    seen, losses, sizes = operator(config.placement, "trinity"), [], []
    for step in range(1, 13):
        if step in (4, 8):
            seen.scale({4: 4, 8: 2}[step], "test")
        losses.append(trainer.step().loss)
        sizes.append(len(pool.table.shards))
    print(f"\nF10: shards {sizes}")
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 4, 2)
    near(config, trainer, losses, undisturbed)


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once_by_a_plan(three, tmp_path, undisturbed, seed):
    """The command's own plan and hands, every fault but moves, in the job under Ray Train."""
    from actors import pool as pools
    from actors.chaos import plan as plans
    from actors.chaos.injector import Chaos, Watch, exposed_loop, raging
    from actors.train import fit

    out_dir, struck = tmp_path / "run", []
    config = three.replace(train={"steps": NUM_STEPS, "out_dir": str(out_dir), "max_failures": -1})
    pool = pools.connect(config.placement, "trinity")
    faults = tuple(fault for fault in OF_PROCESSES if fault is not Fault.MOVE_EXPERTS)
    with (
        Watch(out_dir) as seen,
        raging(
            Chaos(pool, out_dir),
            plans.plan(seed, math.inf, faults, 1.0),
            lambda: len(seen()) > 1,
            lambda one: plans.recovery_s(seen(), one.time_s),
            struck,
        ),
    ):
        fit(config, exposed_loop)
    noted = seen()
    for one in struck:
        recovered = "-" if one.recovered_s is None else f"{one.recovered_s:.1f} s"
        print(f"\n{one.fault.value}: {one.target or one.error}, got over in {recovered}", end="")
    print(f"\n{len(struck)} faults, {plans.num_replays(noted)} replays, goodput {plans.goodput(noted):.2f}")
    assert len(struck) >= 2
    assert plans.num_lost(noted) == 0
    _, weights = undisturbed(config)
    mine = weights_of(open_checkpoint(latest_checkpoint(out_dir)))
    assert [key for key in weights if not torch.equal(mine[key], weights[key])] == []
