"""Whatever is killed while training, the final weights are bitwise those of the undisturbed run, and no step is lost."""

import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch

from actors.chaos.faulty_transport import FaultyTransport
from tests.ray.runs import config_for, decisions, train_here, weights_of
from tests.waiting import until
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.data.prepare import prepare
from trinity.errors import VersionGone
from trinity.placement.table import PlacementTable
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer
from trinity.utils import trying
from trinity.utils.lines import named

NUM_STEPS = 16


@pytest.fixture
def config(tmp_path):
    """A run of its own, in a pool that nobody has made yet."""
    return config_for(tmp_path, steps=NUM_STEPS, num_shards=3)


@pytest.fixture(scope="module")
def shared_pool(ray_session, tmp_path_factory):
    """Three shards that outlive a run: each test here begins another in them, as `trinity train` may."""
    from actors import pool as pools

    folder = tmp_path_factory.mktemp("pool")
    made = config_for(folder, steps=1, num_shards=3)
    pools.create(made.placement, "trinity", made.model, made.optim, str(folder / "placement"))
    yield made.placement
    pools.destroy(made.placement.pool, "trinity")


@pytest.fixture
def pool(shared_pool):
    """Its experts are where they were at first: bits depend on that."""
    from actors import pool as pools

    found = pools.connect(shared_pool, "trinity")
    assert found.table.replicas == PlacementTable.spread(found.table.layers, 4, found.table.shards).replicas
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """-> (losses, checkpoint) of such a run here. Text and seeds are the same in all tests: one serves those that ask alike."""
    known = {}

    def run(config):
        asked = config.train.steps, config.train.global_batch_size, config.optim, config.placement.num_shards
        if str(asked) not in known:
            known[str(asked)] = train_here(config, tmp_path_factory.mktemp("here"))
        return known[str(asked)]

    return run


def trainer_of(config, pool):
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, config.train.out_dir), Alone())
    trainer.start()
    return trainer


def same_as_undisturbed(undisturbed, trainer, losses):
    config, (want, reference) = trainer.config, undisturbed(trainer.config)
    assert losses == list(want.values())
    saved = open_checkpoint(trainer.save())
    assert saved.version == reference.version == config.train.steps
    mine, theirs = weights_of(saved), weights_of(reference)
    assert mine.keys() == theirs.keys()
    differ = {
        key: float((mine[key] - theirs[key]).abs().max()) for key in mine if not torch.equal(mine[key], theirs[key])
    }
    assert differ == {}


def pid_of(ray, pool, shard):
    return ray.get(pool.shards[shard].where.remote())[1]


class Killer(threading.Thread):
    """Kills a random shard at a random moment of each of some steps."""

    def __init__(self, ray, pool, trainer, seed, steps):
        super().__init__(daemon=True)
        self.ray, self.pool, self.trainer, self.steps = ray, pool, trainer, steps
        self.rng, self.num_kills, self.step_s = random.Random(seed), 0, 0.3

    def run(self):
        for step in self.steps:
            while self.trainer.position < step:
                time.sleep(0.005)
            time.sleep(self.rng.uniform(0, self.step_s))
            os.kill(pid_of(self.ray, self.pool, self.rng.choice(self.pool.table.shards)), signal.SIGKILL)
            self.num_kills += 1


@pytest.mark.chaos
def test_shards_are_killed_at_random_and_no_step_is_lost(ray_session, config, pool, undisturbed):
    """F1, a smoke; tests/chaos has the long one."""
    trainer = trainer_of(config, pool)
    killer = Killer(ray_session, pool, trainer, seed=1, steps=(3, 7, 12))
    killer.start()
    losses = [trainer.step().loss for _ in range(NUM_STEPS)]
    killer.join(60)
    assert killer.num_kills == 3
    same_as_undisturbed(undisturbed, trainer, losses)


# One by default: tests/unit/test_protocol.py has a shard die between any two of its messages.
@pytest.mark.parametrize(
    "verb", ["prepare", *(pytest.param(verb, marks=pytest.mark.chaos) for verb in ("stage", "commit"))]
)
def test_a_shard_is_killed_in_any_phase_of_a_step(ray_session, config, pool, undisturbed, verb):
    """F3: killed before it answers one of three shards' verbs. All are at one version after every step."""
    trainer = trainer_of(config.replace(train={"steps": 5}), pool)
    send, killed = pool.transport.send, []

    def murderous(shard, what, message):
        if what == verb and shard == "shard-1" and trainer.position == 2 and not killed:
            killed.append(pid_of(ray_session, pool, shard))
            os.kill(killed[0], signal.SIGKILL)
        return send(shard, what, message)

    pool.transport.send = murderous
    losses = []
    for step in range(1, 6):
        losses.append(trainer.step().loss)
        assert set(pool.versions().values()) == {step}
    assert killed
    assert trainer.num_replays == (0 if verb == "commit" else 1), "what was decided is not made again"
    same_as_undisturbed(undisturbed, trainer, losses)


def test_lost_requests_and_replies_of_all_verbs_change_nothing(config, pool, undisturbed, monkeypatch):
    """F2 over actors: 30 % of requests and of replies are lost."""
    monkeypatch.setattr(trying, "LAST_PAUSE_S", 0.1)
    trainer = trainer_of(config.replace(train={"steps": 4, "global_batch_size": 1}), pool)
    faulty = [
        FaultyTransport(t, random.Random(n), lose_request=0.3, lose_reply=0.3)
        for n, t in enumerate((pool.transport, trainer.dispatcher.transport))
    ]
    pool.transport, trainer.dispatcher.transport = faulty
    losses = [trainer.step().loss for _ in range(4)]
    pool.transport = faulty[0].inner
    assert min(each.lost for each in faulty) > 3
    assert trainer.num_replays == 0, "lost messages are sent again under the same name"
    same_as_undisturbed(undisturbed, trainer, losses)


def test_a_shard_that_hangs_is_waited_for_up_to_the_deadline(ray_session, config, pool, undisturbed):
    """F8, shorter: SIGSTOP for longer than a call may take."""
    config = config.replace(train={"steps": 4})
    trainer = trainer_of(config, pool)
    trainer.dispatcher.timeout_s = pool.timeout_s = 2.0
    losses = [trainer.step().loss]
    pid = pid_of(ray_session, pool, "shard-2")
    os.kill(pid, signal.SIGSTOP)
    threading.Thread(target=wake, args=(trainer, pid), daemon=True).start()
    losses += [trainer.step().loss for _ in range(3)]
    assert trainer.num_replays >= 1
    assert pid_of(ray_session, pool, "shard-2") == pid, "nobody was started again"
    same_as_undisturbed(undisturbed, trainer, losses)


def wake(trainer, pid):
    """As soon as a step was given up for it."""
    try:
        until(lambda: trainer.num_replays)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_placement_service_is_killed_while_training(ray_session, config, pool, undisturbed):
    trainer = trainer_of(config.replace(train={"steps": 5}), pool)
    losses = [trainer.step().loss for _ in range(2)]
    from actors.names import PLACEMENT, find

    ray_session.kill(find(pool.name, PLACEMENT, "trinity"), no_restart=False)
    losses += [trainer.step().loss for _ in range(3)]
    assert pool.decided().version == 5
    same_as_undisturbed(undisturbed, trainer, losses)


def test_a_trainer_that_was_replaced_can_decide_nothing(config, pool):
    """Two workers believe that they are the job's: the older one's attempt is void wherever it shows up."""
    from trinity.errors import StepConflict
    from trinity.train.retry import RetryStep

    old, new = trainer_of(config, pool), trainer_of(config, pool)
    ticket = old._begin_attempt()
    totals = old._forward_backward(ticket, old._next_batch)
    new.step()
    with pytest.raises(RetryStep) as retried:
        old._prepare(totals, ticket)
    assert retried.value.reason == "step_conflict"
    with pytest.raises(StepConflict, match="was given up for"):
        pool.decide(1, ticket.attempt, {})
    assert pool.decided().version == 1


@pytest.mark.chaos  # tests/ray/test_chaos.py kills one by default
def test_a_killed_worker_goes_on_from_the_last_step(config, pool, undisturbed, tmp_path):
    """F4: SIGKILL of the training worker; no checkpoint but the last is ever written."""
    from actors.train import fit

    config = config.replace(train={"steps": 40}, placement={"pool": pool.name})
    seen, done = [], threading.Event()

    def kill_once():
        while not done.is_set() and not ((decision := pool.decided()) and decision.version >= 8):  # others make fewer
            time.sleep(0.05)
        _, folder = decision.notes["backbone"][0]
        seen.append(decision.version)
        os.kill(writer_of(Path(folder)), signal.SIGKILL)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    result = fit(config)
    done.set()
    killer.join(10)
    assert seen
    assert result["version"] == 40
    assert decisions(tmp_path / "ray") == list(range(1, 41)), "each step was logged once, in order: none was lost"
    _, reference = undisturbed(config)
    mine, theirs = (weights_of(c) for c in (open_checkpoint(latest_checkpoint(tmp_path / "ray")), reference))
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []


def writer_of(folder):
    """The process that has a tensor of that store mapped, and is no shard: the training worker."""
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(folder) in path.read_text():
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nobody has {folder}")


@pytest.mark.chaos
def test_two_workers_sum_in_one_order(ray_session, config, tmp_path):
    """Two runs with two workers each have the same bits, whoever was faster."""
    from actors import pool as pools
    from actors.train import fit

    found = []
    for n in range(2):
        out_dir = tmp_path / f"run{n}"
        own = config.replace(
            train={"steps": 4, "num_workers": 2, "out_dir": str(out_dir)},
            placement={"pool": f"w-{uuid.uuid4().hex[:8]}", "num_shards": 2},
        )
        pools.create(own.placement, "trinity", own.model, own.optim, str(tmp_path / f"placement{n}"))
        fit(own)
        pools.destroy(own.placement.pool, "trinity")
        found.append(weights_of(open_checkpoint(latest_checkpoint(out_dir))))
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


def test_a_shard_that_lost_its_memory_gets_it_from_its_replicas(ray_session, config, undisturbed, tmp_path):
    """What a lost host means to a shard: started again elsewhere, with nothing. No step is lost, no checkpoint is read."""
    import shutil

    from actors import pool as pools

    config = config.replace(
        optim={"decay": "none"}, placement={"redundancy": 1, "memory_dir": str(tmp_path / "memory")}
    )
    pool = pools.create(config.placement, "trinity", config.model, config.optim, str(tmp_path / "placement"))
    trainer = trainer_of(config, pool)
    losses = []
    until(lambda: losses.append(trainer.step().loss) or pool.table.num_replicas_LE.min() == 2, every_s=0.1)
    (folder,) = (tmp_path / "memory").glob("*/shard-1")
    pid = pid_of(ray_session, pool, "shard-1")
    os.kill(pid, signal.SIGSTOP)
    shutil.rmtree(folder)
    os.kill(pid, signal.SIGKILL)
    losses += [trainer.step().loss for _ in range(3)]
    assert set(pool.versions().values()) == {len(losses)}
    pools.destroy(config.placement.pool, "trinity", config.placement.memory_dir)
    assert not list((tmp_path / "memory").glob("*")), "nothing is left in memory"
    want, _ = undisturbed(config.replace(train={"steps": len(losses)}))
    torch.testing.assert_close(losses, list(want.values()), atol=1e-5, rtol=0)


def test_without_replicas_a_lost_memory_sends_the_job_back_to_its_checkpoint(ray_session, config, pool, undisturbed):
    from trinity.errors import StateLost

    config = config.replace(train={"steps": 5})
    trainer = trainer_of(config, pool)
    losses = [trainer.step().loss for _ in range(2)]
    trainer.save()
    trainer.step()
    from trinity.rpc.messages import Load

    pool.transport.send("shard-0", "load", Load(training=False)).result()  # other weights: none of this run's
    with pytest.raises(StateLost, match="going back to the last checkpoint"):
        trainer.step()
    held = named(pool.decided().line, 2)
    again = trainer_of(config, pool)
    assert (again.version, again.position) == (2, 2)
    layer, x_TD = config.model.moe_layers[0], torch.ones(1, config.model.hidden_size)
    asked = layer, x_TD, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(VersionGone, match="the run went back"):
        pool.service.pin(held, "an engine", 10.0)
    with torch.no_grad(), pytest.raises(VersionGone, match="the run has gone back"):
        pool.dispatcher(held)(*asked)
    with torch.no_grad():
        assert torch.equal(pool.dispatcher(named(pool.decided().line, 2))(*asked), pool.dispatcher(2)(*asked))
    losses += [again.step().loss for _ in range(3)]
    same_as_undisturbed(undisturbed, again, losses)


def test_replicas_come_and_go_while_training_and_the_losses_are_the_same(ray_session, config, pool, undisturbed):
    """F10 for replicas: 1 -> 3 -> 1. All replicas of an expert have the same bits after every step.

    The last of those that share a pool: experts are elsewhere afterwards."""
    from actors.control.admin import operator
    from trinity.rpc.messages import Fetch

    config = config.replace(train={"steps": 8}, placement={"pool": pool.name})
    trainer, asked = trainer_of(config, pool), operator(config.placement, "trinity")
    losses, replicas = [], []
    for step in range(1, 9):
        for at, num in ((3, 3), (6, 1)):
            if step == at:
                for layer in config.model.moe_layers:
                    for expert in range(config.model.num_experts):
                        asked.replicate(layer, expert, num)
        losses.append(trainer.step().loss)
        replicas.append(int(pool.table.num_replicas_LE.max()))
        for layer, experts in pool.table.shared.items():
            for expert, holders in experts.items():
                for kind in ("weight", "momentum"):
                    call = Fetch(layer, expert, step, 4e9, kind)
                    first, *others = (pool.transport.send(s, "fetch", call).result() for s in holders)
                    assert all(torch.equal(first, other) for other in others)
    assert replicas == [1, 1, 3, 3, 3, 1, 1, 1]
    want, reference = undisturbed(config)
    torch.testing.assert_close(losses, list(want.values()), atol=1e-5, rtol=0)
    mine, theirs = weights_of(open_checkpoint(trainer.save())), weights_of(reference)
    for key in theirs:
        torch.testing.assert_close(mine[key], theirs[key], atol=1e-5, rtol=0)
