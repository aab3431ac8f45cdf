"""The commands that start processes, run as a person runs them: the whole demo in small, then the server and its end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from matplotlib.image import imread

from trinity.checkpoint import latest_checkpoint

ENV = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TRITON"))}


def command(*arguments):
    return [sys.executable, "-m", "trinity.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of a few steps, in a Ray of its own with the default token authentication."""
    out = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        command("demo", "--steps", 6, "--out", out), capture_output=True, text=True, timeout=280, env=ENV
    )
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_a_run_is_resumed_and_stops_on_sigterm_with_a_checkpoint(demo):
    out, _, _ = demo
    settings = ["train", "tiny", "--train.out_dir", out, "--train.steps", 5000, "--train.eval_every", 0]
    refused = subprocess.run(command(*settings), capture_output=True, text=True, timeout=120, env=ENV)
    assert refused.returncode == 2
    assert "already holds step-000006; continue it with --resume" in refused.stderr
    run = subprocess.Popen(
        command(*settings, "--resume"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    deadline = time.monotonic() + 120
    while len(steps_of(out)) < 8 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=90)
    assert run.returncode == 130, stderr
    steps = steps_of(out)
    assert steps == list(range(1, len(steps) + 1))
    assert "continuing from step 6" in stderr
    assert f"stopped at step {len(steps)} of 5000; continue with --resume" in stderr
    assert latest_checkpoint(out).name == f"step-{len(steps):06d}"
    assert f"after {len(steps)} steps" in stdout


def steps_of(out):
    return [int(n) for n in re.findall(r'"step": (\d+), "loss"', (out / "metrics.jsonl").read_text())]


def test_serve_answers_and_leaves_on_sigterm(demo):
    checkpoint = latest_checkpoint(demo[0])
    server = subprocess.Popen(
        command("serve", checkpoint, "--http-port", 0, "--grpc-port", 0), stdout=subprocess.PIPE, text=True, env=ENV
    )
    try:
        lines = iter(server.stdout.readline, "")
        url = next(line for line in lines if line.startswith("HTTP ")).split()[1]
        assert next(line for line in lines if line.startswith("ready"))
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "import ", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] > 0
        busy = subprocess.run(
            command("serve", checkpoint, "--http-port", url.rsplit(":", 1)[1]),
            capture_output=True,
            text=True,
            timeout=60,
            env=ENV,
        )
        assert busy.returncode == 2
        assert "choose another" in busy.stderr
        server.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.wait(60) == 0
        assert time.monotonic() - started < 45
    finally:
        if server.poll() is None:
            server.kill()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5)
    assert not Path(f"/proc/{server.pid}").exists()
