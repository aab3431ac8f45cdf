"""The launcher's files in clusters/, held to Ray's own checks and to each other: no cloud is asked, nothing is started.

Three oracles: Ray's validation; Ray's own autoscaler, which is asked what it would buy for what the code requests (a
mistyped resource buys nothing); bash and Ray's binaries, for what a node's start command says. Kubernetes and Ray Serve:
test_clusters_serving.py.
"""

import json
import math
import mmap
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.fake_multi_node import node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

from clusters import fake
from tests import units
from tests.unit.cluster_files import (
    ALL,
    BOUGHT,
    CLOUD,
    DEMANDS,
    ENGINE,
    EXPERT_SHARD,
    FOLDER,
    GATEWAY,
    HEAD_ENV,
    KUBERAY,
    SHARD,
    TRAIN_SLOT,
    bought,
    launcher_config,
    read,
    without_minimum,
)
from tests.units import node_env
from trinity.config import Config, setup_environment

# ---- units of systemd, for machines of one's own ----


def test_units_start_what_the_launcher_starts_and_start_it_again():
    head, node = units.settings("trinity-head.service"), units.settings("trinity-node.service")
    assert head["Restart"] == node["Restart"] == ["always"]
    assert head["StartLimitIntervalSec"] == node["StartLimitIntervalSec"] == ["0"], "however often it ends"
    for unit in (head, node):
        assert unit["EnvironmentFile"][0] == "/home/ubuntu/trinity/clusters/node.env"
    assert units.environment("trinity-head.service").items() >= HEAD_ENV.items()
    launched = read("aws-p5.yaml")[0]["head_start_ray_commands"][1]
    by_unit = set(head["ExecStart"][0].split()) - {"--block", "--num-cpus=0"}
    assert {word for word in by_unit if word.startswith("--")} <= set(launched.split())


def test_units_are_ones_to_systemd(tmp_path):
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("no systemd here")
    for name in ("trinity-head.service", "trinity-node.service"):
        text = (FOLDER / name).read_text().replace("/home/ubuntu/trinity/.venv/bin/ray", "/bin/true")
        (tmp_path / name).write_text(text)
        done = subprocess.run([analyze, "verify", tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert name not in done.stderr, "it may complain of other units of this machine"


# ---- the launcher's files ----


@pytest.mark.parametrize("name", [*CLOUD, "local.yaml"])
def test_ray_accepts_the_file(name):
    launcher_config(name)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("who", DEMANDS)
def test_what_the_code_asks_for_buys_the_node_meant_for_it(name, who):
    launched, impossible = bought(without_minimum(launcher_config(name)), [DEMANDS[who]])
    assert not impossible
    assert launched == {BOUGHT[who]: 1}


@pytest.mark.parametrize("name", ALL)
def test_a_node_takes_as_many_shards_as_it_has_gpus(name):
    config = without_minimum(launcher_config(name))
    kind = config["available_node_types"]["shard"]
    most = kind["max_workers"] * kind["resources"]["GPU"]
    launched, impossible = bought(config, [SHARD] * most)
    assert (launched, impossible) == ({"shard": kind["max_workers"]}, [])
    assert len(bought(config, [SHARD] * (most + 1))[1]) == 1


@pytest.mark.parametrize("name", ALL)
def test_spot_nodes_take_shards_once_they_are_allowed(name):
    config = without_minimum(launcher_config(name))
    types = {**config["available_node_types"]}
    assert types["shard-spot"]["max_workers"] == 0
    assert types["shard-spot"]["resources"] == types["shard"]["resources"]
    types |= {"shard-spot": {**types["shard-spot"], "max_workers": 1}, "shard": {**types["shard"], "max_workers": 0}}
    config = {**config, "available_node_types": types, "max_workers": config["max_workers"] + 1}
    assert bought(config, [SHARD])[0] == {"shard-spot": 1}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("resource", [EXPERT_SHARD, ENGINE, TRAIN_SLOT])
def test_a_mistyped_resource_would_be_noticed(name, resource):
    """The oracle above can fail: rename the resource in the parsed file and Ray says that the demand is impossible."""
    config = without_minimum(launcher_config(name))
    for kind in config["available_node_types"].values():
        kind["resources"] = {re.sub(f"^{resource}$", resource + "s", key): n for key, n in kind["resources"].items()}
    who = next(who for who, demand in DEMANDS.items() if resource in demand)
    assert len(bought(config, [DEMANDS[who]])[1]) == 1


@pytest.mark.parametrize("name", ALL)
def test_node_types_and_resources_are_the_same_everywhere(name):
    config = launcher_config(name)
    types = config["available_node_types"]
    workers = {
        key: set(kind["resources"]) - {"memory"} for key, kind in types.items() if key != config["head_node_type"]
    }
    shards = {"CPU", "GPU", EXPERT_SHARD}
    own_pods = {"gateway": {"CPU", GATEWAY}} if name in KUBERAY else {}
    assert workers == {"shard": shards, "shard-spot": shards, "engine": {"CPU", "GPU", ENGINE, TRAIN_SLOT}, **own_pods}
    head = types[config["head_node_type"]]["resources"]
    assert head["CPU"] == 0
    assert set(head) - {"memory"} == {"CPU"} | (set() if own_pods else {GATEWAY})
    assert all(kind["resources"].get(GATEWAY, 1) == 1 for kind in types.values()), "one on each node"
    for kind in types.values():
        own = set(kind["resources"]) & {EXPERT_SHARD, ENGINE, TRAIN_SLOT}
        assert all(kind["resources"][key] == kind["resources"]["GPU"] for key in own)
    bounds = [(kind["min_workers"], kind["max_workers"]) for kind in types.values()]
    assert all(low <= high for low, high in bounds)
    assert config["max_workers"] >= sum(high for _, high in bounds)


@pytest.mark.parametrize("name", CLOUD)
def test_clouds_start_nodes_in_the_same_way(name):
    first, this = read(CLOUD[0])[0], read(name)[0]
    for key in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands", "worker_setup_commands"):
        assert this[key] == first[key]
    for key in ("file_mounts", "rsync_exclude", "initialization_commands", "auth", "head_node_type"):
        assert this[key] == first[key]


@pytest.mark.parametrize("name", CLOUD)
def test_code_is_pinned_and_kernels_are_built(name):
    config = read(name)[0]
    assert "make setup" in " ".join(config["setup_commands"])
    assert "make gpu-kernels" in " ".join(config["worker_setup_commands"])
    targets = (FOLDER.parent / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", targets, re.M) for target in ("setup", "gpu-kernels"))
    assert f"ray=={ray.__version__}" in (FOLDER.parent / "constraints.txt").read_text().split()


@pytest.mark.parametrize("name", ["aws-p5.yaml", "aws-g6e.yaml"])
def test_aws_nodes_are_what_they_say(name):
    config = read(name)[0]
    sizes = {"p5.48xlarge": (192, 8), "p5.4xlarge": (16, 1), "g6e.12xlarge": (48, 4), "g6e.4xlarge": (16, 1)}
    for key, kind in config["available_node_types"].items():
        node = kind["node_config"]
        if key != "head":
            assert (kind["resources"]["CPU"], kind["resources"]["GPU"]) == sizes[node["InstanceType"]]
        market = node.get("InstanceMarketOptions")
        assert market == ({"MarketType": "spot"} if key.endswith("-spot") else None)
        assert node["ImageId"].startswith("resolve:ssm:/aws/service/")
        assert set(node) <= {
            "InstanceType",
            "ImageId",
            "BlockDeviceMappings",
            "MetadataOptions",
            "InstanceMarketOptions",
        }
    group = config["provider"]["security_group"]
    assert group == {"GroupName": "trinity", "IpPermissions": []}, "SSH and the group itself, nothing else"


def test_gcp_nodes_are_what_they_say():
    config = read("gcp-a3.yaml")[0]
    for key, kind in config["available_node_types"].items():
        node = kind["node_config"]
        assert set(node) <= {"machineType", "networkInterfaces", "disks", "scheduling"}
        (interface,) = node["networkInterfaces"]
        assert interface["subnetwork"].endswith("/trinity"), "the network whose rules docs/clusters.md makes"
        if key != "head":
            assert (kind["resources"]["CPU"], kind["resources"]["GPU"]) == (208, 8)
            assert node["machineType"] == "a3-highgpu-8g"
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"
            assert (node["scheduling"].get("provisioningModel") == "SPOT") == key.endswith("-spot")


@pytest.mark.parametrize("name", ALL)
def test_the_pool_of_the_settings_fits_every_cluster(name):
    placement = Config.load(FOLDER / "settings.yaml", model="tiny").placement
    config = launcher_config(name)
    demand = {"CPU": 0.01, "GPU": placement.num_gpus_per_shard, EXPERT_SHARD: 1}
    launched, impossible = bought(without_minimum(config), [demand] * placement.num_shards)
    assert not impossible
    per_node = config["available_node_types"]["shard"]["resources"]["GPU"]
    assert launched == {"shard": math.ceil(placement.num_shards / per_node)}
    assert config["available_node_types"]["shard"]["min_workers"] == launched["shard"], "ready without a purchase"


# ---- authentication, health checks, storage ----


def test_the_environment_of_nodes_is_that_of_a_local_cluster(monkeypatch):
    wanted = {}
    monkeypatch.setattr(os, "environ", wanted)
    setup_environment("token", is_local=False)
    assert node_env() == wanted | {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}


@pytest.fixture
def start(tmp_path):
    """Run a file's start command in bash, in a home of its own, with a `ray` that only says how it was called.

    -> (its environment, its options).
    """
    (tmp_path / "trinity/clusters").mkdir(parents=True)
    (tmp_path / "trinity/clusters/node.env").write_text((FOLDER / "node.env").read_text())
    stub = tmp_path / "trinity/.venv/bin/ray"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"#!/bin/sh\nenv -0 > {tmp_path}/env\nprintf '%s\\n' \"$@\" > {tmp_path}/options\n")
    stub.chmod(0o700)

    def run(config, which):
        base = {"HOME": str(tmp_path), "PATH": f"{stub.parent}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}
        subprocess.run(["bash", "-c", config[f"{which}_start_ray_commands"][-1]], env=base, check=True, timeout=60)
        env = dict(pair.split("=", 1) for pair in (tmp_path / "env").read_text().split("\0") if pair)
        return env, (tmp_path / "options").read_text().split("\n")

    return run


@pytest.mark.parametrize("name", [*CLOUD, "local.yaml"])
def test_the_head_starts_with_a_token_checks_storage_and_a_stated_object_store(name, start, tmp_path):
    env, options = start(read(name)[0], "head")
    expected = node_env() | HEAD_ENV | {"RAY_AUTH_MODE": "token", "RAY_gcs_storage_path": f"{tmp_path}/ray-gcs"}
    assert {key: env.get(key) for key in expected} == expected
    assert (tmp_path / "ray-gcs").is_dir()
    assert {"--head", "--dashboard-host=127.0.0.1", "--object-store-memory=2147483648", "--port=6379"} <= set(options)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in options  # Ray expands it


@pytest.mark.parametrize("name", CLOUD)
def test_a_worker_starts_with_a_token_and_finds_the_head(name, start):
    env, options = start(read(name)[0], "worker")
    assert {key: env.get(key) for key in node_env()} == node_env()
    assert {"--address=10.0.0.1:6379", "--object-store-memory=8589934592"} <= set(options)


@pytest.mark.parametrize("name", CLOUD)
def test_every_node_gets_the_token_of_whoever_runs_ray_up(name):
    config = read(name)[0]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


@pytest.mark.parametrize("name", CLOUD)
def test_a_shell_on_a_node_knows_trinity_and_the_token_mode(name, tmp_path):
    """The initialization command, twice as after a second `ray up`: one line in the profile, which works."""
    (tmp_path / "trinity/clusters").mkdir(parents=True)
    (tmp_path / "trinity/clusters/node.env").write_text((FOLDER / "node.env").read_text())
    base = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    (command,) = read(name)[0]["initialization_commands"]
    (tmp_path / ".bashrc").touch()
    for _ in range(2):
        subprocess.run(["bash", "-ec", command], env=base, check=True, timeout=60)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 1
    asked = ["bash", "-ec", ". ~/.bashrc; sh -c 'echo \"$RAY_AUTH_MODE $PATH\"'"]
    said = subprocess.run(asked, env=base, check=True, timeout=60, capture_output=True, text=True).stdout
    assert said.startswith(f"token {tmp_path}/trinity/.venv/bin:")


@pytest.mark.parametrize("name", CLOUD)
def test_bash_understands_every_command(name):
    config = read(name)[0]
    for key in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"):
        for command in config[f"{key}_commands"]:
            subprocess.run(["bash", "-n", "-c", command], check=True, timeout=60)


def test_ray_knows_every_variable():
    """Its binaries hold the names; a mistyped RAY_ variable would be ignored in silence."""
    ours = {key for key in [*HEAD_ENV, *node_env(), "RAY_gcs_storage_path"] if re.match("RAY_[a-z]", key)}
    assert len(ours) >= 8
    with open(Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server", "rb") as file:
        known = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        unknown = {key for key in ours if known.find(key.removeprefix("RAY_").encode() + b"\0") < 0}
    assert not unknown


def test_the_local_node_offers_what_clouds_offer(start):
    env, options = start(read("local.yaml")[0], "head")
    assert env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", "else Ray listens on all interfaces"
    (resources,) = [word.removeprefix("--resources=") for word in options if word.startswith("--resources=")]
    assert json.loads(resources) == {GATEWAY: 1, EXPERT_SHARD: 8, ENGINE: 8, TRAIN_SLOT: 8}
    assert f"--resources '{resources}'" in (FOLDER / "local.yaml").read_text(), "the command in the comment is the same"
    assert "--node-ip-address=127.0.0.1" in options
    assert "ray stop" not in " ".join(read("local.yaml")[0]["head_start_ray_commands"]), "it would end every Ray here"


# ---- fake nodes ----


@pytest.mark.parametrize("name", CLOUD)
def test_a_fake_cluster_has_the_clouds_node_types(name):
    cloud = read(name)[0]
    config = fake.fake_config(cloud, "127.0.0.1:21500", max_cpus=2)
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert set(types) == {fake.HEAD_TYPE, "shard", "shard-spot", "engine"}
    for key, kind in cloud["available_node_types"].items():
        made = types[fake.HEAD_TYPE if key == "head" else key]
        kept = {k: n for k, n in made["resources"].items() if k not in ("CPU", "object_store_memory")}
        assert kept == {k: n for k, n in kind["resources"].items() if k != "CPU"}
        assert made["resources"]["CPU"] <= 2
        assert made["min_workers"] == 0
    for who, demand in DEMANDS.items():
        assert bought(config, [demand]) == ({BOUGHT[who]: 1}, [])


def test_the_fake_provider_is_addressed_by_its_own_names():
    assert (fake.HEAD_TYPE, fake.HEAD_ID) == (node_provider.FAKE_HEAD_NODE_TYPE, node_provider.FAKE_HEAD_NODE_ID)
    module, _, name = fake.PROVIDER.rpartition(".")
    assert (module, name) == (node_provider.__name__, node_provider.FakeMultiNodeProvider.__name__)


def test_fake_config_and_environment_are_printed(capsys):
    fake.main([str(FOLDER / "aws-p5.yaml"), "127.0.0.1:21500"])
    assert yaml.safe_load(capsys.readouterr().out)["provider"]["gcs_address"] == "127.0.0.1:21500"
    fake.main(["--env"])
    assert dict(word.split("=") for word in capsys.readouterr().out.split()) == fake.HEAD_ENV


# ---- what must not be in any file ----


def test_files_hold_no_secret_and_the_guide_names_each_of_them():
    guide = (FOLDER.parent / "docs/clusters.md").read_text()
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    for path in files:
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|RAY_AUTH_TOKEN=\S", text), path.name
        assert path.name in guide, f"docs/clusters.md does not mention {path.name}"
    others = {
        "local.yaml",
        "serve.yaml",
        "settings.yaml",
        "trinity-head.service",
        "trinity-node.service",
        "node.env",
        "Dockerfile",
        "Dockerfile.dockerignore",
        "fake.py",
        "grafana.json",
        "prometheus.yml",
        "haproxy.cfg",
    }
    assert {path.name for path in files} == others | set(ALL)
