"""Runs on preferences and on rewards under Ray Train give what one process gives, a worker that is killed included."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.ray.runs import any_name, losses_of, weights_of
from tests.unit import test_preference_runs, test_reward_runs
from trinity.checkpoint import open_checkpoint


def dies_once(settings):
    """A worker's loop that is killed before the step after the second."""
    from actors.train import train_loop

    mark = Path(settings["config"]["train"]["out_dir"]) / "died"

    def prepared(trainer):
        step = trainer.step

        def called(*batches):
            if trainer.position == 2 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*batches)

        trainer.step = called

    return train_loop(settings, prepared)


@pytest.fixture(scope="module")
def pool(ray_session, tmp_path_factory):
    """Two shards that outlive a run: each test here begins another in them, as `trinity train` may."""
    from actors import pool as pools

    placement = {"pool": any_name(), "num_shards": 2, "backend": "torch", "balance_every_s": 0}
    made = test_preference_runs.config_for(tmp_path_factory.mktemp("pool")).replace(placement=placement)
    pools.create(made.placement, "trinity", made.model, made.optim, made.train.out_dir)
    yield placement
    pools.destroy(made.placement.pool, "trinity")


def fitted(config, out_dir, pool, loop=None, **train):
    from actors.train import fit

    train |= {"out_dir": str(out_dir), "num_threads_per_worker": 1}
    return fit(config.replace(placement=pool, train=train), loop)


PAIRS, PROMPTS = pytest.param(test_preference_runs, id="pairs"), pytest.param(test_reward_runs, id="prompts")
LATER = {"marks": pytest.mark.chaos}


@pytest.mark.parametrize("kind", [pytest.param(test_preference_runs, id="pairs", **LATER), PROMPTS])
def test_two_workers_learn_as_one_process_does(pool, tmp_path, kind):
    """The same answers, too: which are drawn depends on their places in the step alone."""
    config = kind.config_for(tmp_path, train={"steps": 3})
    alone, told = kind.trainer_for(config), test_preference_runs.Told()
    alone.logs = [told]
    alone.run()
    fitted(config, tmp_path / "ray", pool, num_workers=2)
    assert list(losses_of(tmp_path / "ray").values()) == pytest.approx(
        [each.loss for each in told.steps], rel=1e-3, abs=1e-5
    )
    rows = [json.loads(line) for line in (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["measures"] == pytest.approx(dict(told.steps[0].measures), rel=1e-3, abs=1e-5)
    assert rows[-1]["val_measures"].keys() == told.validations[-1][2].keys()


@pytest.mark.parametrize("kind", [PAIRS, pytest.param(test_reward_runs, id="prompts", **LATER)])
def test_a_worker_that_is_killed_costs_no_bit(pool, tmp_path, kind):
    config = kind.config_for(tmp_path, train={"steps": 4})
    alone, told = kind.trainer_for(config), test_preference_runs.Told()
    alone.logs = [told]
    alone.run()
    result = fitted(config, tmp_path / "ray", pool, dies_once)
    assert (tmp_path / "ray" / "died").exists()
    assert list(losses_of(tmp_path / "ray").values()) == [each.loss for each in told.steps]
    mine, theirs = weights_of(open_checkpoint(result["checkpoint"])), weights_of(open_checkpoint(alone.saver.target(4)))
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
