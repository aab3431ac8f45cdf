"""Failures of Ray itself: a run goes on where it can, and a command ends with a sentence."""

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

FAILURES = [ControllerError(RayActorError()), RayActorError(), OutOfMemoryError("4 worker(s) were killed\nmore")]


def job_of(*failures):
    """-> a job that ends with each of these and then well, and how often it was run."""
    left, runs = list(failures), []

    def run():
        runs.append(1)
        if left:
            raise left.pop(0)
        return {"loss": 1.0}

    return run, runs


@pytest.mark.parametrize("most", [3, -1])
def test_a_run_outlives_ray_trains_own_processes(most, caplog):
    run, runs = job_of(*FAILURES)
    assert outcome_of(run, most, pause_s=0) == {"loss": 1.0}
    assert len(runs) == 4
    assert "Ray Train has ended (4 worker(s) were killed); it is started again" in caplog.text


def test_it_does_not_do_so_for_ever():
    run, runs = job_of(*FAILURES)
    with pytest.raises(Unavailable, match=r"ended 3 times \(4 worker.s. were killed\); go on from the last checkpoint"):
        outcome_of(run, 2, pause_s=0)
    assert len(runs) == 3


def test_a_workers_full_disk_is_named():
    run, _ = job_of(
        WorkerGroupError("workers failed", {0: OSError(errno.ENOSPC, "No space left on device", "run/a.jsonl")})
    )
    with pytest.raises(Unavailable, match=r"cannot write run/a\.jsonl: No space left on device; make room there"):
        outcome_of(run, 3)


def test_what_ends_a_worker_for_good_is_not_tried_again():
    cause = DataError("no such row")
    run, runs = job_of(WorkerGroupError("workers failed", {0: cause}))
    with pytest.raises(DataError) as caught:
        outcome_of(run, 3)
    assert (caught.value, len(runs)) == (cause, 1)


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
