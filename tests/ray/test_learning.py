"""Runs on preferences and on rewards under Ray Train give what one process gives."""

import json

import pytest

from tests.ray.runs import any_name, losses_of
from tests.unit import test_preference_runs, test_reward_runs
from trinity.checkpoint import open_checkpoint


def fitted(config):
    from actors import pool as pools
    from actors.train import fit

    pools.create(config.placement, config.cluster.namespace, config.model, config.optim, config.train.out_dir)
    try:
        return fit(config)
    finally:
        pools.destroy(config.placement.pool, config.cluster.namespace)


def in_ray(config, out_dir, **train):
    placement = {"pool": any_name(), "num_shards": 2, "backend": "torch", "balance_every_s": 0}
    return config.replace(placement=placement, train={"out_dir": str(out_dir), "num_threads_per_worker": 1, **train})


def test_two_workers_prefer_as_one_process_does(ray_session, tmp_path):
    config = test_preference_runs.config_for(tmp_path)
    alone, told = test_preference_runs.trainer_for(config), test_preference_runs.Told()
    alone.logs = [told]
    alone.run()
    fitted(in_ray(config, tmp_path / "ray", num_workers=2))
    assert list(losses_of(tmp_path / "ray").values()) == pytest.approx([each.loss for each in told.steps], rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] == pytest.approx(told.validations[-1][1], rel=1e-3)
    assert rows[-1]["val_measures"].keys() == told.validations[-1][2].keys()


def test_rewards_are_learned_from_under_ray(ray_session, tmp_path):
    config = test_reward_runs.config_for(tmp_path)
    alone, told = test_reward_runs.trainer_for(config), test_preference_runs.Told()
    alone.logs = [told]
    alone.run()
    result = fitted(in_ray(config, tmp_path / "ray"))
    assert list(losses_of(tmp_path / "ray").values()) == [each.loss for each in told.steps]
    assert open_checkpoint(result["checkpoint"]).version == 4
