"""The job under Ray Train, with its experts in actors, against the same training in one process."""

import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from tests.ray.runs import config_for, losses_of, train_here, weights_of
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.data.prepare import prepare
from trinity.observability.train_log import read_rows
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer
from trinity.utils.lines import step_of


@pytest.fixture(scope="module")
def shared_pool(ray_session, tmp_path_factory):
    """Two shards that outlive a run: each test here begins another in them, as `trinity train` may."""
    from actors import pool as pools

    made = config_for(tmp_path_factory.mktemp("pool"), steps=1)
    pools.create(made.placement, "trinity", made.model, made.optim, str(tmp_path_factory.mktemp("pool") / "placement"))
    yield made.placement.pool
    pools.destroy(made.placement.pool, "trinity")


@pytest.fixture
def config(shared_pool, tmp_path):
    return config_for(tmp_path, steps=6, pool=shared_pool)


@contextmanager
def scraped(config, found):
    """Inside the block the run is paused in its first step until somebody has read its metrics, which go to `found`."""
    pause = Path(config.train.out_dir, ".pause")
    pause.parent.mkdir()
    pause.touch()

    def scrape():
        until_s = time.monotonic() + 100
        while not found and thread.is_wanted and time.monotonic() < until_s:
            try:
                found.append(
                    urlopen(f"http://127.0.0.1:{config.train.metrics_port}/metrics", timeout=10).read().decode()
                )
            except OSError:  # not there yet
                time.sleep(0.02)
        pause.unlink()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.is_wanted = True
    thread.start()
    try:
        yield
    finally:
        thread.is_wanted = False
        thread.join(20)


def served_version(config):
    """The step whose weights an engine would serve of a pool."""
    from actors import pool as pools

    view = pools.connect(config.placement, "trinity").view
    view.watch_version(-1)
    return step_of(view.other_version(-1, 20))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.chaos), 2])
def test_training_through_actors_equals_training_in_one_process(ray_session, config, tmp_path, num_workers):
    from actors.train import fit

    config, found = config.replace(train={"num_workers": num_workers, "metrics_port": free_port()}), []
    closed = {"task": "niah", "lengths": [64], "questions": 2, "at_least": 2.0}  # a gate that nobody passes
    config = config.replace(evaluate={"every": 3, "tasks": [closed]})
    with scraped(config, found):
        result = fit(config)
    assert 'trinity_train_retries_total{reason="unavailable"} 0.0' in found[0], "worker 0 serves its metrics"
    assert served_version(config) == 2, "the last one before an exam was due"
    rows = [row for row in read_rows(tmp_path / "ray" / "metrics.jsonl") if "scores" in row]
    assert [(row["step"], row["scores"][0]["passes"]) for row in rows] == [(3, False), (6, False)]
    want, reference = train_here(config, tmp_path / "here")
    got = losses_of(tmp_path / "ray")
    assert list(got) == list(want)
    torch.testing.assert_close(list(got.values()), list(want.values()), atol=1e-5, rtol=0)
    found = open_checkpoint(latest_checkpoint(tmp_path / "ray"))
    assert found.version == result["version"] == config.train.steps
    mine, theirs = weights_of(found), weights_of(reference)
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], atol=1e-5, rtol=0)
    if num_workers == 1:
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), "one worker sums in one order: same bits"


@pytest.mark.chaos
def test_a_killed_shard_sends_the_job_back_to_its_last_checkpoint_and_the_result_is_the_same(
    ray_session, config, tmp_path
):
    from actors import pool as pools
    from actors.train import fit

    config = config.replace(train={"steps": 40, "save_every": 5})
    killed = []

    def kill_once():
        while not latest_checkpoint(tmp_path / "ray"):
            time.sleep(0.02)
        shard = pools.connect(config.placement, "trinity").shards["shard-1"]
        killed.append(ray_session.get(shard.where.remote())[1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    fit(config)
    killer.join(10)
    assert killed
    want, reference = train_here(config, tmp_path / "here")
    assert losses_of(tmp_path / "ray") == want
    mine, theirs = (weights_of(c) for c in (open_checkpoint(latest_checkpoint(tmp_path / "ray")), reference))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_shards_come_and_go_while_training_and_the_losses_are_the_same(ray_session, config, tmp_path):
    """F10 for shards: 2 -> 4 -> 1, each change between two steps, weights and optimizer state with their experts.

    The last of those that share a pool: one shard is left."""
    from actors import pool as pools
    from actors.control.admin import operator
    from actors.control.reconciler import STARTING_S
    from actors.names import find

    pool = pools.connect(config.placement, "trinity")
    seen, out_dir = operator(config.placement, "trinity"), Path(config.train.out_dir)
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, out_dir), Alone())
    trainer.start()
    losses, sizes = {}, []
    for step in range(1, config.train.steps + 1):
        for at, num in ((3, 4), (5, 1)):
            if step == at:
                seen.scale(num, "test")
        losses[step] = trainer.step().loss
        sizes.append(len(pool.table.shards))
        if step == 3:  # the new ones start beside the steps
            for name in ("shard-2", "shard-3"):
                ray_session.get(find(config.placement.pool, name, "trinity").where.remote())
            time.sleep(STARTING_S)
    saved = open_checkpoint(trainer.save())
    assert sizes == [2, 2, 2, 4, 1, 1]
    want, reference = train_here(config, tmp_path / "here")
    torch.testing.assert_close(list(losses.values()), list(want.values()), atol=1e-5, rtol=0)
    mine, theirs = weights_of(saved), weights_of(reference)
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], atol=1e-5, rtol=0)
