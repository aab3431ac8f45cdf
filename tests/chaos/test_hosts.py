"""Over hosts of their own: what vanishes, is cut off, comes back or has another clock, and nobody waits longer than need be.

`make chaos`, as root; hosts alone, without Ray, are in tests/unit/test_hosts.py.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.chaos.hosts import cut, why_not
from tests.chaos.ray_hosts import BIN, ROOT, ray_hosts
from tests.chaos.world import NODES
from tests.waiting import until
from trinity.bench.models import checkpoint
from trinity.chaos.train import undisturbed
from trinity.checkpoint import latest_checkpoint, open_checkpoint
from trinity.config import preset
from trinity.launch import load

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "it can"),
]
DRIVER = Path(__file__).with_name("hosts_driver.py")
MENDED_S = 2.0  # from the mending of a cable to the first answer, where the cores are free


CALLER, HOSTS = "caller", ("node0", "node1", "node2")


class Driver:
    """The program of that name, on a host without experts. A verb is a method of its class."""

    def __init__(self, cluster, where, log, settings):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        command = [sys.executable, DRIVER, cluster.address, json.dumps(settings)]
        self._process = cluster.hosts[where].start(*command, env=cluster.env, **pipes)
        assert self.finish() == "on"

    def start(self, verb, *arguments):
        self._process.stdin.write(json.dumps([verb, arguments]) + "\n")
        self._process.stdin.flush()

    def finish(self):
        line = self._process.stdout.readline()
        assert line, "the driver has ended; its log says why"
        return json.loads(line)

    def __call__(self, verb, *arguments):
        self.start(verb, *arguments)
        return self.finish()


@contextmanager
def driven(tmp_path, num_nodes, mtu=1500, where=CALLER, **settings):
    """-> a cluster of a head, a caller's host and nodes with room for two shards each, and the driver of a pool."""
    resources = {name: {"CPU": 1, "expert_shard": 2} for name in HOSTS[:num_nodes]}
    with (
        (tmp_path / "driver.log").open("w") as log,
        ray_hosts(tmp_path, mtu, caller={"CPU": 0}, **resources) as cluster,
    ):
        try:
            yield cluster, Driver(cluster, where, log, {"call_timeout_s": 600, **settings})
        except BaseException:
            print((tmp_path / "driver.log").read_text()[-3000:])
            raise


def at(cluster, address):
    return next(name for name in cluster.hosts if cluster.hosts[name].address == address)


def test_rows_flow_at_once_when_a_cable_is_mended(tmp_path):
    """Between the caller's host and the shard's: Ray, whose head hears both, sees nothing of it. One second, then more than TCP
    tries again at once, then more than any time-out of ours but the call's."""
    with driven(tmp_path, 1, num_shards=1) as (cluster, driver):
        driver("whole")
        for name, for_s in (("ways", 1), ("ways_from", 8), ("ways", 31), ("ways", 180)):
            driver("more", 3)
            with cut(getattr(cluster.hosts, name)("node0", CALLER)):
                time.sleep(for_s)
            mended_s = time.monotonic()
            driver("more", 3)
            took_s = time.monotonic() - mended_s
            print(f"\n{name}, {for_s} s: on after {took_s:.2f} s")
            assert took_s <= MENDED_S
        assert driver("longest_s") > 100
        driver("end")


def test_a_cut_with_replicas_costs_no_second(tmp_path):
    with driven(tmp_path, 2, num_shards=2, redundancy=1) as (cluster, driver):
        driver("whole", [1, 1])
        driver("longest_s")
        before = driver("more", 20)
        with cut(cluster.hosts.ways("node0", CALLER)):
            time.sleep(20)
            during = driver("calls") - before
        driver("more", 20)
        longest_s = driver("longest_s")
        print(f"\n{during} calls in 20 s of the cut, the longest {longest_s:.2f} s")
        assert during > 20
        assert longest_s <= 1.5
        driver("end")


def test_two_shards_that_do_not_hear_each_other_finish_their_move_afterwards(tmp_path):
    """Experts are copied from shard to shard; one way is cut before a third shard comes, the other way after."""
    with driven(tmp_path, 3, num_shards=2) as (cluster, driver):
        homes = driver("whole")
        used = {at(cluster, address) for address in homes.values()}
        others = [name for name in HOSTS if name not in used] or [HOSTS[2]]
        for wanted, cutting in ((3, cluster.hosts.ways_from), (2, cluster.hosts.ways)):
            with cut([way for name in used for way in cutting(name, others[0])]):
                driver("scale", wanted)
                driver("more", 200)
                time.sleep(10)
                driver("more", 200)
            homes = driver("settled", wanted)
            assert len(homes) == wanted
        print(f"\nlongest call {driver('longest_s'):.2f} s, changes {driver('changes')}")
        driver("end")


def test_a_node_is_lost_and_back_at_another_address(tmp_path):
    with driven(tmp_path, 2, num_shards=2, redundancy=1) as (cluster, driver):
        driver("whole", [1, 1])
        for address in (None, cluster.hosts.new_address()):
            lost = at(cluster, driver("whole", [1, 1])["shard-0"])
            cluster.hosts[lost].power_off()
            driver("more", 50)
            driver("whole", [1, 0])
            cluster.return_of(lost, address)
            homes = driver("whole", [1, 1])
            assert len(set(homes.values())) == 2
            print(f"\n{lost} at {cluster.hosts[lost].address}: longest call {driver('longest_s'):.2f} s")
        driver("end")


def test_all_nodes_lose_power_at_once(tmp_path):
    """Rows wait for whoever is back first."""
    with driven(tmp_path, 2, num_shards=2, redundancy=1) as (cluster, driver):
        driver("whole", [1, 1])
        for name in HOSTS[:2]:
            cluster.hosts[name].power_off()
        time.sleep(5)
        for name in HOSTS[:2]:
            cluster.return_of(name)
        began_s = time.monotonic()
        driver("more", 3)
        print(f"\nrows flow {time.monotonic() - began_s:.1f} s after power is back")
        driver("whole", [1, 1])
        driver("end")


def test_the_head_loses_power_and_is_back(tmp_path):
    """Rows flow without it; then the pool can be changed again."""
    with driven(tmp_path, 2, num_shards=2) as (cluster, driver):
        driver("whole")
        cluster.head.power_off()
        driver("more", 500)
        cluster.return_of("head")
        driver("more", 500)
        longest_s = driver("longest_s")
        print(f"\nlongest call {longest_s:.2f} s")
        driver("scale", 3)
        assert len(driver("settled", 3)) == 3
        driver("end")


def test_few_rows_go_to_the_replica_on_the_callers_host(tmp_path):
    with driven(tmp_path, 2, where="node0", num_shards=2, redundancy=1, near_rows=32) as (cluster, driver):
        driver("whole", [1, 1])
        for way in cluster.hosts.ways("node0", "node1"):
            way.delay_s = 0.1
        driver("more", 3)
        began_s = time.monotonic()
        driver("more", 50)
        took_s = time.monotonic() - began_s
        print(f"\n50 calls in {took_s:.2f} s, beside a replica 200 ms away")
        assert took_s < 50 * 0.1
        driver("end")


def test_slow_and_lossy_hosts_with_small_frames(tmp_path):
    """RTT 20 ms, 1 % lost, and no frame over 1,400 bytes."""
    with driven(tmp_path, 2, mtu=1400, num_shards=2, redundancy=1) as (cluster, driver):
        driver("whole", [1, 1])
        for way in cluster.hosts.ways(CALLER):
            way.delay_s, way.loss = 0.010, 0.01
        doctor = [BIN / "trinity", "doctor", "--address", cluster.address, "--auth", "disabled"]
        said = cluster.head.run(*doctor, env=cluster.env)
        print("\n" + said[said.index("round trips") :])
        assert re.search(r"10\.88\.0\.2 2\d\.\d\d ms", said)
        driver("longest_s")
        driver("more", 200)
        print(f"\nlongest call {driver('longest_s'):.2f} s")
        driver("end")


WORLD = [sys.executable, "-m", "tests.chaos.world"]
SERVE = """
placement: {num_shards: 3, redundancy: 1, data_host: node, balance_every_s: 0, resources: {expert_shard: 1}}
engine: {num_gpus: 0, resources: {engine: 1}}
"""
TRAIN = """
model: {preset: tiny, vocab_size: 300, num_experts: 4}
data: {train: [stdlib], val_fraction: 0.02}
train: {seq_len: 64, global_batch_size: 4, micro_batch_size: 2, eval_every: 0, save_every: 20, num_threads_per_worker: 1}
placement: {num_shards: 3, data_host: node, balance_every_s: 0, resources: {expert_shard: 1}, num_threads_per_shard: 1}
"""


def test_a_host_that_only_the_head_does_not_hear_is_not_trained_with(tmp_path):
    """Ray starts its shards elsewhere; the old processes are there and answer the worker, who must not go on with them."""
    (tmp_path / "train.yaml").write_text(TRAIN)
    flags = ["--train.out_dir", tmp_path / "run", "--train.steps", 400, "--placement.redundancy", 1]
    metrics = tmp_path / "run" / "metrics.jsonl"

    def num_steps():
        return metrics.read_text().count('"loss"') if metrics.is_file() else 0

    with ray_hosts(tmp_path, **NODES) as cluster, (tmp_path / "train.log").open("w") as log:
        words = cluster.trinity("train", tmp_path / "train.yaml", *flags)
        cluster.head.start(*words, env=cluster.env, stdout=log, stderr=log)
        until(lambda: num_steps() > 8, 120)
        before = num_steps()
        show = [BIN / "trinity", "placement", "show", "--address", cluster.address, "--auth", "disabled"]
        homes = cluster.head.run(*show, env=cluster.env)
        with cut(cluster.hosts.ways("shard0", "head")):
            time.sleep(40)
            during = num_steps() - before
            moved = cluster.head.run(*show, env=cluster.env)
        print(f"\n{during} steps in 40 s of the cut\n{homes}\n{moved}")
        assert during > 10
        assert homes != moved


def test_training_goes_on_from_its_checkpoint_when_the_head_is_at_another_address(tmp_path):
    (tmp_path / "train.yaml").write_text(TRAIN)
    flags = ["--train.out_dir", str(tmp_path / "run"), "--train.steps", "60"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with ray_hosts(tmp_path, **NODES) as cluster, (tmp_path / "train.log").open("w") as log:
        words = cluster.trinity("train", tmp_path / "train.yaml", *flags)
        cluster.head.start(*words, env=cluster.env, stdout=log, stderr=log)
        until(lambda: metrics.is_file() and metrics.read_text().count('"loss"') > 25, 120)
        cluster.begin_anew(cluster.hosts.new_address())
        words = cluster.trinity("train", tmp_path / "train.yaml", *flags, "--resume")
        print("\n" + cluster.head.run(*words, env=cluster.env, timeout_s=300)[-500:])
    config = load(str(tmp_path / "train.yaml"), flags)
    mine, theirs = open_checkpoint(latest_checkpoint(tmp_path / "run")), undisturbed(config)
    assert [key for key in theirs.weight_map if not torch.equal(mine.tensor(key), theirs.tensor(key))] == []


def raged(tmp_path, *words):
    """What `trinity chaos` says of a run over hosts."""
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*WORLD, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )
    print("\n" + done.stdout[-3000:])
    [report] = tmp_path.rglob("chaos.json")
    return done, json.loads(report.read_text())["results"][0]


@pytest.mark.parametrize("seed", range(2))
def test_served_text_is_the_undisturbed_one(tmp_path, seed):
    path = checkpoint(preset("tiny"), tmp_path / "tiny")
    (tmp_path / "serve.yaml").write_text(SERVE)
    faults = "cut-host,cut-one-way,cut-between,lose-power,slow-host,shift-clock"
    plan = ["--faults", faults, "--every", 20, "--seconds", 200, "--rate", 2, "--seed", seed]
    victims = ["--victims", "shard0,shard1,shard2"]  # a stream ends with its engine's host
    done, found = raged(tmp_path, *victims, "serve", path, tmp_path / "serve.yaml", *plan, "--out", tmp_path / "out")
    values = found["values"]
    assert (values["failed"], values["wrong texts"]) == (0, 0), done.stderr[-3000:]
    assert len(found["faults"]) >= 5


@pytest.mark.parametrize("seed", range(2))
def test_trained_weights_are_the_undisturbed_ones(tmp_path, seed):
    (tmp_path / "train.yaml").write_text(TRAIN)
    faults = "cut-host,cut-between,lose-power,shift-clock"
    plan = ["--faults", faults, "--every", 16, "--seconds", 150, "--steps", 150, "--seed", seed, "--compare"]
    done, found = raged(tmp_path, "train", tmp_path / "train.yaml", "--train.out_dir", tmp_path / "run", *plan)
    assert found["values"]["weights bitwise those of the undisturbed run"] == "yes", done.stderr[-3000:]
    assert found["values"]["steps"] == 150
