"""`trinity bench experts --device cuda --quick` on a real GPU: every backend that is there is right and has times."""

import json

import pytest
import torch

from trinity.bench.expert_timing import CudaClock, bandwidth
from trinity.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_quick_on_the_gpu(tmp_path):
    assert main(["bench", "experts", "--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
    tree = json.loads((tmp_path / "experts.json").read_text())
    state, verdicts = ({row[i]: row[2] for row in tree["tables"][n]["rows"]} for n, i in ((0, 0), (1, 1)))
    ready = [name for name, text in state.items() if text == "ready"]
    assert {"torch-grouped", "torch-loop", "auto", "reference"} <= set(ready)
    assert verdicts == dict.fromkeys(ready, "right")
    assert {(raw["rows"], raw["backend"]) for raw in tree["results"]} == {(n, name) for n in (1, 128) for name in ready}
    assert all(0 < raw["backward_s"] < raw["both_s"] < 10 for raw in tree["results"])
    if torch.cuda.get_device_capability()[0] >= 9:
        assert {raw["backend"] for raw in tree["results"] if raw["replay_s"]} >= {"torch-grouped"}


def test_events_time_the_device_and_not_the_launch():
    """Ten large products take as long as the host's clock says once everything is done, not the time to queue them."""
    clock, a = CudaClock(), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    a @ a
    clock.synchronize()
    marks = [clock.mark()]
    for _ in range(10):
        a @ a
    marks.append(clock.mark())
    (seconds,) = clock.laps(*marks)
    assert 10 * 2 * 8192**3 / seconds < 3e15  # faster than that is no device of today


def test_stated_bandwidth_is_near_a_copy():
    found = bandwidth(torch.device("cuda"), CudaClock())
    x = torch.empty(1 << 28, device="cuda")
    clock = CudaClock()
    best = 0.0
    for _ in range(5):
        y, start = torch.empty_like(x), clock.mark()
        y.copy_(x)
        best = max(best, 2 * x.nbytes / clock.laps(start, clock.mark())[0])
    assert 0.8 <= best / found.bytes_per_s <= 1.25
