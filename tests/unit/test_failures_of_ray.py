"""Failures of Ray itself end a command with a sentence."""

import errno

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, RunConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from actors import cluster
from actors.train import Job, outcome_of
from trinity.config import ClusterConfig
from trinity.errors import DataError, Unavailable


def failing(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ControllerError(OutOfMemoryError("4 worker(s) were killed\nmore")), "4 worker.s. were killed"),
        (OutOfMemoryError("4 worker(s) were killed\nmore"), "4 worker.s. were killed"),
        (RayActorError(), "The actor experienced an error before finishing this task."),
    ],
)
def test_the_end_of_ray_trains_own_processes_is_a_sentence(error, why):
    with pytest.raises(
        Unavailable, match=rf"Ray Train has ended \({why}\); go on from the last checkpoint with --resume"
    ):
        outcome_of(failing(error))


def test_a_workers_full_disk_is_named():
    full = OSError(errno.ENOSPC, "No space left on device", "run/a.jsonl")
    with pytest.raises(Unavailable, match=r"cannot write run/a\.jsonl: No space left on device; make room there"):
        outcome_of(failing(WorkerGroupError("workers failed", {0: full})))


def test_what_ends_a_worker_for_good_is_what_a_command_says():
    cause = DataError("no such row")
    with pytest.raises(DataError) as caught:
        outcome_of(failing(WorkerGroupError("workers failed", {0: cause})))
    assert caught.value is cause
    assert outcome_of(lambda: {"loss": 1.0}) == {"loss": 1.0}


def test_a_machine_on_which_ray_does_not_start_is_told_so(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup. This could happen because")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "setup_environment", lambda *_, **__: None)
    with pytest.raises(
        Unavailable, match=r"Ray did not start on this machine \(The current node timed out during startup\); it"
    ):
        cluster.start(ClusterConfig(address="local"))


def test_a_job_has_what_ray_train_gives_every_job_but_its_process_for_data_sets():
    """By names of Ray's own that are not public: a newer Ray may have others."""
    given, ours = (
        {type(each).__name__ for each in kind(print, run_config=RunConfig(name="any"))._create_default_callbacks()}
        for kind in (TorchTrainer, Job)
    )
    assert given - ours == {"DatasetsCallback"}
    assert "BackendSetupCallback" in ours
