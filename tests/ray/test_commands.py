"""The whole demo in small, run as a person runs it, and its run gone on with. tests/ray/test_environments.py has the server.

How long they take is the machine's affair. A command that hangs is one that says nothing new any more.
"""

import os
import re
import signal
import threading

import pytest
from matplotlib.image import imread

from tests.commands import Running
from tests.ray.runs import any_name
from tests.waiting import until
from trinity.checkpoint import latest_checkpoint
from trinity.cli import main

pytestmark = pytest.mark.timeout(900)  # the demo is the fixture of whoever comes first; a hang ends sooner, by silence


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of a few steps, in a Ray of its own with the default token authentication."""
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "run"
    done = Running(folder, "demo", "--steps", 6, "--out", out)
    assert done.ended() == 0, done.stdout + done.stderr
    return out, done.stdout, done.stderr


def test_the_demo_trains_serves_and_answers_twice(demo):
    out, stdout, stderr = demo
    losses = [float(x) for x in re.findall(r"step \d+/6  loss ([\d.]+)", stderr)]
    assert losses[-1] < losses[0] < 8
    assert re.search(r"loss \d+\.\d+, validation loss \d+\.\d+ after 6 steps", stdout)
    assert ">>> Asked over HTTP (streaming), 'def __init__(self, ':\ndef __init__(self, " in stdout
    assert ">>> Asked over gRPC" in stdout
    assert "everything is shut down" in stdout
    for picture in ("loss.png", "expert_load.png", "run.png"):
        assert imread(out / picture).std() > 0.05
    assert latest_checkpoint(out).name == "step-000006"


def test_a_run_is_resumed_and_stops_on_sigterm_with_a_checkpoint(demo, ray_session, capfd):
    from actors import pool as pools

    out, _, _ = demo
    settings = {"train.out_dir": out, "train.steps": 5000, "train.eval_every": 0, "placement.pool": any_name()}
    pool = settings["placement.pool"]
    settings |= {"placement.num_shards": 1, "placement.niceness": 0}  # other work may have the cores
    words = ["train", "tiny", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
    assert main(words) == 2
    assert "already holds step-000006; continue it with --resume" in capfd.readouterr().err
    stopping = threading.Thread(target=stop_after, args=(out, 8), daemon=True)
    stopping.start()
    assert main([*words, "--resume"]) == 130
    stopping.join()
    stdout, stderr = capfd.readouterr()
    steps = steps_of(out)
    assert steps == list(range(1, len(steps) + 1))
    assert "continuing from step 6" in stderr
    assert f"stopped at step {len(steps)} of 5000; continue with --resume" in stderr
    assert latest_checkpoint(out).name == f"step-{len(steps):06d}"
    assert f"after {len(steps)} steps" in stdout
    pools.destroy(pool, "trinity")


def stop_after(out, step):
    until(lambda: len(steps_of(out)) >= step, within_s=300)
    os.kill(os.getpid(), signal.SIGTERM)


def steps_of(out):
    return [int(n) for n in re.findall(r'"step": (\d+), "loss"', (out / "metrics.jsonl").read_text())]
