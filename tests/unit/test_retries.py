"""A step that is tried again says why, everywhere one would look; one that cannot succeed ends with the true reason."""

import json
import logging
import math

import prometheus_client
import pytest
import torch

from actors.train_metrics import TrainExporter
from tests.unit.test_trainer import all_weights, config_for, trainer_for
from trinity.errors import DeadlineExceeded, StepConflict, TrinityError, Unavailable
from trinity.observability.train_log import TrainLog
from trinity.train import trainer as module
from trinity.train.phases import PhaseClock, phase
from trinity.train.retry import WorkerFailed
from trinity.utils.deadline import Deadline


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for n in range(6):
        (folder / f"{n}.txt").write_text(" ".join(f"word{(n * i) % 37} is {i * n}" for i in range(300)))
    return folder


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)


def failing(call, *errors):
    """The call, after it has raised these."""
    left = list(errors)

    def made(*arguments):
        if left:
            raise left.pop(0)
        return call(*arguments)

    return made


def test_a_retried_step_says_why_in_log_rows_pictures_and_metrics(texts, tmp_path, caplog):
    trainer, undisturbed = trainer_for(config_for(texts, tmp_path)), trainer_for(config_for(texts, tmp_path / "calm"))
    log, exporter = TrainLog(tmp_path, 6), TrainExporter(trainer.config.model.moe_layers)
    trainer.logs = [log, exporter]
    pool = trainer.pool
    pool.begin_attempt = failing(pool.begin_attempt, Unavailable("shard-1 is away"), Unavailable("still away"))
    pool.prepare = failing(pool.prepare, StepConflict("one op is missing"), DeadlineExceeded("no answer"))
    with caplog.at_level(logging.WARNING):
        got = [trainer.step() for _ in range(3)]
    want = [undisturbed.step() for _ in range(3)]
    log.close()
    assert dict(got[0].retries) == {"unavailable": 2, "step_conflict": 1, "deadline": 1}
    assert got[1].retries == got[2].retries == {}
    assert trainer.num_replays == 4
    assert "step 1 is tried again (unavailable): shard-1 is away" in caplog.messages
    assert "step 1 is tried again (step_conflict): one op is missing" in caplog.messages
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("retries", {}) for row in rows] == [got[0].retries, {}, {}]
    exposed = prometheus_client.generate_latest(exporter.registry).decode()
    assert 'trinity_train_retries_total{reason="unavailable"} 2.0' in exposed
    assert 'trinity_train_retries_total{reason="step_conflict"} 1.0' in exposed
    assert 'trinity_train_retries_total{reason="input_gone"} 0.0' in exposed, "what has not happened is 0, not absent"
    assert [metrics.loss for metrics in got] == [metrics.loss for metrics in want], "a retry changes no bit"
    weights = all_weights(undisturbed)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in all_weights(trainer).items())


def test_a_void_attempt_of_rows_says_whose_they_were(texts, tmp_path):
    trainer, failure = trainer_for(config_for(texts, tmp_path)), Unavailable("shard-0 hung up")
    run = trainer.micro_batches.run

    def broken(batch_of, num):
        trainer.dispatcher.failure, trainer.micro_batches.run = failure, run
        return run(batch_of, num)

    trainer.micro_batches.run = broken
    assert dict(trainer.step().retries) == {"unavailable": 1}
    total = trainer.micro_batches.total

    def elsewhere(micros, sent, has_failed):
        trainer.micro_batches.total = total
        return total(micros, sent, has_failed)._replace(num_failed=1)

    trainer.micro_batches.total = elsewhere
    assert dict(trainer.step().retries) == {"worker_failed": 1}


def test_a_stage_that_failed_leaves_nothing_staged(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path), num_shards=2)
    stage, seen = trainer.pool.stage, []

    def once(message):
        wait = stage(message)
        trainer.pool.stage = lambda again: seen.append(trainer.backbone.store.staged) or stage(again)
        return failing(wait, DeadlineExceeded("no answer"))

    trainer.pool.stage = once
    assert dict(trainer.step().retries) == {"deadline": 1}
    assert seen == [None]
    assert trainer.version == 1


def test_after_the_deadline_the_true_reason_is_raised(texts, tmp_path):
    config = config_for(texts, tmp_path).replace(placement={"recover_timeout_s": 0.05})
    trainer, error = trainer_for(config), Unavailable("shard-1 is away for good")
    trainer.pool.begin_attempt = failing(None, *[error] * 1_000_000)
    with pytest.raises(Unavailable) as raised:
        trainer.step()
    assert raised.value is error
    assert trainer.num_replays >= 1
    assert trainer.position == 0


def test_what_no_attempt_can_mend_is_not_tried_again(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path))
    trainer.pool.prepare = failing(None, TrinityError("a fault of the program"))
    with pytest.raises(TrinityError, match="a fault of the program"):
        trainer.step()
    assert trainer.num_replays == 0


def test_a_step_has_its_phases_and_its_rates(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path))
    first = trainer.step()
    assert list(first.phases_s) == ["begin", "forward_backward", "prepare", "stage", "commit"]
    assert 0 < sum(first.phases_s.values()) <= first.seconds
    optim = trainer.config.optim
    assert first.lrs == {"muon": optim.muon_lr / 2, "adamw": optim.adamw_lr / 2}, "the first of two steps of warmup"
    trainer._prepare = lambda *_: math.inf
    assert "commit" not in trainer.step().phases_s


def test_a_checkpoints_seconds_are_told_once(texts, tmp_path):
    trainer = trainer_for(config_for(texts, tmp_path))
    assert trainer.step().checkpoint_s is None
    trainer.save()
    assert trainer.step().checkpoint_s > 0
    assert trainer.step().checkpoint_s is None


def test_another_workers_failure_is_unavailable_to_whoever_asks():
    assert isinstance(WorkerFailed("one worker could not reach a shard"), Unavailable)


def test_deadlines_expire_and_never_have_less_than_nothing_left():
    now_s = 10.0
    deadline = Deadline(5.0, clock_s=lambda: now_s)
    assert (deadline.expired, deadline.remaining_s) == (False, 5.0)
    now_s = 15.0
    assert (deadline.expired, deadline.remaining_s) == (False, 0.0)
    now_s = 15.1
    assert (deadline.expired, deadline.remaining_s) == (True, 0.0)
    assert not Deadline().expired


def test_a_phase_that_fails_is_not_noted():
    class Work:
        clock = PhaseClock()

        @phase("good")
        def good(self, value):
            return value

        @phase("bad")
        def bad(self):
            raise ZeroDivisionError

    work = Work()
    assert work.good(3) == 3
    with pytest.raises(ZeroDivisionError):
        work.bad()
    assert list(work.clock.phases_s) == ["good"]
