"""The commands that start processes, run as a person runs them: the whole demo in small, then the server and its end.

How long they take is the machine's affair. A command that hangs is one that says nothing new any more.
"""

import re
import signal
from pathlib import Path

import httpx
import pytest
from matplotlib.image import imread

from tests.chaos.meter import family
from tests.commands import Running
from tests.sockets import listening_each
from trinity.checkpoint import latest_checkpoint

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
    for picture in ("loss.png", "expert_load.png"):
        assert imread(out / picture).std() > 0.05
    assert latest_checkpoint(out).name == "step-000006"


def test_a_run_is_resumed_and_stops_on_sigterm_with_a_checkpoint(demo, tmp_path):
    out, _, _ = demo
    settings = ["train", "tiny", "--train.out_dir", out, "--train.steps", 5000, "--train.eval_every", 0]
    settings += ["--placement.niceness", 0]  # other work may have the cores
    refused = Running(tmp_path, *settings)
    assert refused.ended() == 2
    assert "already holds step-000006; continue it with --resume" in refused.stderr
    run = Running(tmp_path, *settings, "--resume")
    run.until(lambda: len(steps_of(out)) >= 8)
    run.process.send_signal(signal.SIGTERM)
    assert run.ended() == 130, run.stderr
    stdout, stderr = run.stdout, run.stderr
    steps = steps_of(out)
    assert steps == list(range(1, len(steps) + 1))
    assert "continuing from step 6" in stderr
    assert f"stopped at step {len(steps)} of 5000; continue with --resume" in stderr
    assert latest_checkpoint(out).name == f"step-{len(steps):06d}"
    assert f"after {len(steps)} steps" in stdout


def steps_of(out):
    return [int(n) for n in re.findall(r'"step": (\d+), "loss"', (out / "metrics.jsonl").read_text())]


def test_serve_answers_and_leaves_on_sigterm(demo, tmp_path):
    checkpoint = latest_checkpoint(demo[0])
    running = Running(tmp_path, "serve", checkpoint, "--http-port", 0, "--grpc-port", 0)
    server = running.process
    try:
        running.until(lambda: "\nready" in running.stdout)
        (url,) = re.findall(r"^HTTP (\S+)", running.stdout, re.MULTILINE)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "import ", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] > 0
        ports = listening_each(family(server.pid))
        assert sum(map(len, ports.values())) > 6  # Ray's as well as ours
        assert {host for found in ports.values() for host, _ in found} == {"127.0.0.1"}, ports
        busy = Running(tmp_path, "serve", checkpoint, "--http-port", url.rsplit(":", 1)[1])
        assert busy.ended() == 2
        assert "choose another" in busy.stderr
        server.send_signal(signal.SIGTERM)
        assert running.ended() == 0
    finally:
        if server.poll() is None:
            server.kill()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5)
    assert not Path(f"/proc/{server.pid}").exists()
