"""Ray's own autoscaler brings nodes for shards and takes them after: a cloud file's node types, as processes here."""

# ruff: noqa: E402

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from clusters.fake import HEAD_ENV, fake_config

RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    """Outside the ports that Ray hands to its workers."""
    for port in range(21000, 21900, 7):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


@pytest.fixture
def cluster(tmp_path):
    """A head without CPUs, and nodes of the types of aws-g6e.yaml, one shard each, that come when asked for."""
    address = f"127.0.0.1:{free_port()}"
    cloud = yaml.safe_load((ROOT / "clusters/aws-g6e.yaml").read_text())
    for kind in cloud["available_node_types"].values():
        if "expert_shard" in kind["resources"]:
            kind["resources"] |= {"expert_shard": 1, "GPU": 1}
    config = tmp_path / "fake.yaml"
    config.write_text(yaml.safe_dump(fake_config(cloud, address)))
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= HEAD_ENV | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    command = [str(RAY), "start", "--head", "--block", f"--port={address.rsplit(':')[1]}", "--num-cpus=0"]
    command += [f"--autoscaling-config={config}", "--include-dashboard=false", "--object-store-memory=104857600"]
    folder = f"/tmp/tr-{secrets.token_hex(4)}"  # short: Ray puts sockets into it
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    log = (tmp_path / "head.log").open("w")
    head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    yield address, env, head
    os.killpg(head.pid, signal.SIGTERM)
    time.sleep(3)
    for process in Path("/proc").glob("[0-9]*"):  # fake nodes have sessions of their own; the folder names ours
        try:
            if folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    head.wait(30)
    log.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.chaos
@pytest.mark.timeout(500)
def test_nodes_join_for_shards_and_leave_after_them(cluster, tmp_path):
    address, env, head = cluster
    deadline = time.monotonic() + 60
    while not _is_up(address) and head.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    command = [sys.executable, str(Path(__file__).with_name("nodes_driver.py")), address, str(tmp_path / "placement")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=450)
    print("\n" + done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:] + (tmp_path / "head.log").read_text()[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [each["what"] for each in told] == ["ready", "load up", "left a node", "load down", "nodes left", "gone"]
    assert [each["nodes"] for each in told[:2]] == [1, 3]


def _is_up(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0
