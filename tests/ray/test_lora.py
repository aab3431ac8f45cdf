"""Adapters on shards in actors: whatever is killed, they are bitwise those of an undisturbed run, over one base."""

import os
import signal

import pytest
import torch

from tests.ray.runs import config_for, train_here, weights_of
from trinity.checkpoint import open_checkpoint
from trinity.data.prepare import prepare
from trinity.train.collectives import Alone
from trinity.train.trainer import Trainer


@pytest.mark.chaos
@pytest.mark.parametrize("verb", ["prepare", "stage", "commit"])
def test_a_shard_is_killed_and_its_adapters_are_there_again(ray_session, tmp_path, verb):
    from actors import pool as pools

    plain = config_for(tmp_path, steps=1, num_shards=2)
    _, base = train_here(plain, tmp_path / "base")
    config = plain.replace(
        train={"steps": 5, "init_from": str(base.path)}, optim={"lora": {"rank": 4}, "adamw_lr": 1e-2}
    )
    want, reference = train_here(config, tmp_path / "here")
    pool = pools.create(config.placement, "trinity", config.model, config.optim, str(tmp_path / "placement"))
    try:
        data = prepare(config.data, config.train, config.model, config.train.out_dir)
        trainer, killed = Trainer(config, pool, data, Alone()), []
        trainer.start()
        send = pool.transport.send

        def murderous(shard, what, message):
            if what == verb and shard == "shard-1" and trainer.position == 2 and not killed:
                killed.append(ray_session.get(pool.shards[shard].where.remote())[1])
                os.kill(killed[0], signal.SIGKILL)
            return send(shard, what, message)

        pool.transport.send = murderous
        losses = [trainer.step().loss for _ in range(5)]
        saved = open_checkpoint(trainer.save())
    finally:
        pools.destroy(config.placement.pool, "trinity")
    assert killed
    assert losses == list(want.values())
    assert saved.adapter.modules == reference.adapter.modules
    mine, theirs = weights_of(saved), weights_of(reference)
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
