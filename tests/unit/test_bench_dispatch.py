"""`trinity bench dispatch` measures what it says, writes what it found, and leaves no process behind."""

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from trinity import native
from trinity.bench import dispatch, echo, process
from trinity.cli import main
from trinity.errors import Unavailable


def is_alive(pid):
    """A process that nobody has waited for yet is not alive."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, within_s=60.0):
    end_s = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < end_s:
        time.sleep(0.02)
    return not is_alive(pid)


def test_the_smoke_run_writes_tables_json_and_a_picture(tmp_path, capsys):
    assert main(["bench", "dispatch", "--quick", "--no-ray", "--out", str(tmp_path)]) == 0
    tree = json.loads((tmp_path / "dispatch.json").read_text())
    assert (tmp_path / "dispatch.png").read_bytes().startswith(b"\x89PNG")
    cores, tcp, trips, sizes, shards, callers, targets = tree["tables"]
    figures = {row[0]: row[1:] for row in trips["rows"]}
    assert set(figures) == {
        dispatch.RAW, dispatch.DIRECT, dispatch.TWO, dispatch.SOCKETS, dispatch.TWO_SOCKETS, dispatch.EXPERTS,
        dispatch.LOCAL, dispatch.WIRE,
    }  # fmt: skip
    assert all(0 < p50 <= p99 for p50, p99, *_ in figures.values())
    assert figures[dispatch.RAW][3] == 1
    assert figures[dispatch.RAW][0] < figures[dispatch.SOCKETS][0] < figures[dispatch.EXPERTS][0]
    assert [row[0] for row in sizes["rows"]] == list(dispatch.QUICK.kib)
    assert [row[:2] for row in shards["rows"]] == [[1, 16], [2, dispatch._rows_sent(2)]]
    assert [row[0] for row in callers["rows"]] == list(dispatch.QUICK.counts)
    assert [row[0] for row in cores["rows"]] == list(dispatch._cores())
    assert tree["results"][0]["direct_over_raw_socket"] == max(row[-2] for row in cores["rows"][1:] or cores["rows"])
    over = tree["results"][1]["over_raw_tcp"]
    assert [row[:2] for row in tcp["rows"]] == [[where, path] for where in over for path in over[where]]
    assert all(over[where][dispatch.RAW_TCP] == 1 for where in over)
    wanted = ["direct / raw socket", "direct to 2 shards / raw socket", "direct"]
    assert [row[0].split(",")[0] for row in targets["rows"]] == wanted
    assert len(tree["curves"]) == 3
    assert all(len(y) == len(curve["x"]) for curve in tree["curves"] for y in curve["lines"].values())
    assert "| raw socket" in capsys.readouterr().out


def test_the_raw_echo_returns_the_same_bytes():
    with process.children([{"role": "raw"}]) as [child]:
        said = child.hear()
        for size, where in itertools.product((1, 1000, 1 << 20), (said["path"], ("127.0.0.1", said["port"]))):
            payload = os.urandom(size)
            sock, call = process.raw_caller(where, memoryview(payload))
            assert bytes(call()) == bytes(call()) == payload
            sock.close()
    assert gone(child.process.pid)


def test_the_ray_path_speaks_as_shard_actors_do():
    """Without Ray: what the actor's `handle` is given and gives back, packed as the transport packs it."""
    from actors.dataplane.ray_transport import pack, unpack

    class Near:
        def send(self, shard, verb, message):
            return echo.Done(unpack(echo.EchoActor().handle(verb, pack(message))))

    with torch.inference_mode():
        dispatch._dispatch(Near(), 1, 16, 8)()  # checks the answer itself


def test_a_wrong_answer_is_not_timed():
    class Wrong(echo.Echo):
        def infer(self, call):
            return call.rows.x_RD + 1

    with torch.inference_mode(), pytest.raises(AssertionError, match="not close"):
        dispatch._dispatch(echo.Recorder(Wrong()), 2, 16, 8)


def test_experts_in_a_child_are_those_of_a_shard_here(monkeypatch, capfd):
    """Also in one without the extension, which says so, near and far away: its callers are answered with the same bits."""
    dim, secret = 16, "5e" * 32
    orders = [{"role": "shard", "dim": dim, "secret": secret}]
    with ExitStack() as stack, torch.inference_mode():
        [child] = stack.enter_context(process.children(orders))
        monkeypatch.setenv("TRINITY_NATIVE", "0")
        [plain] = stack.enter_context(process.children(orders))
        here, batch = echo.ExpertShard(echo.shard_spec(dim)), echo.batch(16, dim)
        here.load(echo.Load(seed=0))
        want = echo.dispatcher_of(echo.Recorder(here), 1)(echo.LAYER, *batch)
        near = [echo.Address(**each.hear()) for each in (child, plain)]
        for address in (*near, *(replace(each, machine="elsewhere") for each in near)):
            dispatcher = echo.dispatcher_of(dispatch._direct([address], secret, stack), 1)
            for _ in range(3):
                assert torch.equal(dispatcher(echo.LAYER, *batch), want)
    if native.lib is not None:
        told = [line for line in capfd.readouterr().err.splitlines() if "takes the plain path" in line]
        assert len(told) == 1
        assert told[0].startswith("a caller at unix:")
        assert f"computes with {native.computes()}, this process with python" in told[0]


def test_children_end_when_the_bench_is_killed():
    """Nothing closes them then but the end of their stdin."""
    script = (
        "from trinity.bench import process\n"
        "child = process.Child(role='raw')\n"
        "child.hear()\n"
        "print(child.process.pid, flush=True)\n"
        "child.process.wait()\n"
    )
    bench = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(bench.stdout.readline())
    assert is_alive(pid)
    bench.kill()
    bench.wait()
    bench.stdout.close()
    assert gone(pid)


def test_a_child_that_ends_early_says_so():
    child = process.Child(role="raw")
    child.process.kill()
    with pytest.raises(Unavailable, match=f"process {child.process.pid} ended early"):
        child.hear()
    child.close()
