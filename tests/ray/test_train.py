"""The job under Ray Train, with its experts in actors, against the same training in one process."""

import json
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer

SMALL = dict(vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4)


@pytest.fixture
def config(tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    return Config.from_tree(
        {
            "model": {"preset": "tiny", **SMALL},
            "data": {"train": [str(tmp_path / "*.txt")], "val_fraction": 0.2},
            "train": dict(steps=6, seq_len=32, global_batch_size=4, micro_batch_size=1, eval_every=0, eval_sequences=4)
            | {"num_threads_per_worker": 1, "out_dir": str(tmp_path / "ray")},
            "placement": {"pool": f"p-{uuid.uuid4().hex[:8]}", "num_shards": 2, "call_timeout_s": 60},
            "optim": {"warmup_steps": 2},
        }
    )  # fmt: skip


def losses_of(out_dir):
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def train_here(config, out_dir):
    """The oracle: the same run in this process."""
    config = config.replace(train={"out_dir": str(out_dir), "num_workers": 1, "micro_batch_size": 1})
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    trainer = Trainer(config, pool, prepare(config.data, config.train, config.model, out_dir), Alone())
    trainer.start()
    losses = {step + 1: trainer.step().loss for step in range(config.train.steps)}
    return losses, open_checkpoint(trainer.save())


def fit_with_pool(config):
    from actors import pool as pools
    from actors.train import fit

    state_dir = config.train.out_dir + "-placement"
    pools.create(config.placement, "trinity", config.model, config.optim, state_dir)
    return fit(config)


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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def weights_of(checkpoint):
    return {key: checkpoint.tensor(key) for key in checkpoint.weight_map}


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.chaos), 2])
def test_training_through_actors_equals_training_in_one_process(ray_session, config, tmp_path, num_workers):
    from actors import pool as pools

    config, found = config.replace(train={"num_workers": num_workers, "metrics_port": free_port()}), []
    with scraped(config, found):
        result = fit_with_pool(config)
    pools.destroy(config.placement.pool, "trinity")
    assert 'trinity_train_retries_total{reason="unavailable"} 0.0' in found[0], "worker 0 serves its metrics"
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
    fit_with_pool(config)
    killer.join(10)
    pools.destroy(config.placement.pool, "trinity")
    assert killed
    want, reference = train_here(config, tmp_path / "here")
    assert losses_of(tmp_path / "ray") == want
    mine, theirs = (weights_of(c) for c in (open_checkpoint(latest_checkpoint(tmp_path / "ray")), reference))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_shards_come_and_go_while_training_and_the_losses_are_the_same(ray_session, config, tmp_path):
    """F10 for shards: 2 -> 4 -> 1, each change between two steps, weights and optimizer state with their experts."""
    from actors import pool as pools
    from actors.control.admin import operator

    config = config.replace(train={"num_workers": 1})
    state_dir = config.train.out_dir + "-placement"
    pool = pools.create(config.placement, "trinity", config.model, config.optim, state_dir)
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
    saved = open_checkpoint(trainer.save())
    pools.destroy(config.placement.pool, "trinity")
    assert sizes == [2, 2, 4, 4, 1, 1]
    want, reference = train_here(config, tmp_path / "here")
    torch.testing.assert_close(list(losses.values()), list(want.values()), atol=1e-5, rtol=0)
    mine, theirs = weights_of(saved), weights_of(reference)
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], atol=1e-5, rtol=0)
