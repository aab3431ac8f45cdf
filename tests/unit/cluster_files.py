"""The files of clusters/ as Ray reads them, and what Ray's own autoscaler would buy; for the tests of those files."""

import json
from pathlib import Path

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

FOLDER = Path(__file__).parents[2] / "clusters"
CLOUD = ("aws-p5.yaml", "aws-g6e.yaml", "gcp-a3.yaml")
KUBERAY = ("kuberay-cluster.yaml", "kuberay-service.yaml")
ALL = CLOUD + KUBERAY

# The resource names that actors/pool.py, Serve's config and actors/train.py ask for. One of each, and a GPU.
EXPERT_SHARD, ENGINE, TRAIN_SLOT, GATEWAY = "expert_shard", "engine", "train_slot", "gateway"
SHARD = {"GPU": 1, EXPERT_SHARD: 1}
DEMANDS = {"shard": SHARD, "engine": {"GPU": 1, ENGINE: 1}, "trainer": {"GPU": 1, TRAIN_SLOT: 1}}
BOUGHT = {"shard": "shard", "engine": "engine", "trainer": "engine"}  # who asks -> the node type that comes

HEAD_ENV = {
    "RAY_gcs_storage": "rocksdb",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}


def read(name):
    """The documents of a file, each value of its own where YAML has aliases, so that a test may change them."""
    return json.loads(json.dumps(list(yaml.safe_load_all((FOLDER / name).read_text()))))


def of_kind(name, kind):
    (found,) = [doc for doc in read(name) if doc["kind"] == kind]
    return found


def ray_cluster(name):
    """The RayClusterSpec of a manifest."""
    (found,) = [doc for doc in read(name) if doc["apiVersion"] == "ray.io/v1"]
    return found["spec"] if found["kind"] == "RayCluster" else found["spec"]["rayClusterConfig"]


def launcher_config(name):
    """What Ray's launcher or KubeRay's autoscaler makes of a file, validated by Ray."""
    if name in KUBERAY:
        return _derive_autoscaling_config_from_ray_cr(
            {"metadata": {"name": "trinity", "namespace": "default"}, "spec": ray_cluster(name)}
        )
    config = prepare_config(read(name)[0])
    validate_config(config)
    return config


def bought(config, demands):
    """-> (how many nodes of each type Ray's autoscaler would launch, demands that no type can ever meet)."""
    settings = AutoscalingConfig(config, skip_content_hash=True)
    requests = [ResourceRequestUtil.make(demand) for demand in demands]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=settings.get_node_type_configs(),
            max_num_nodes=settings.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}, reply.infeasible_resource_requests


def without_minimum(config):
    types = {name: {**kind, "min_workers": 0} for name, kind in config["available_node_types"].items()}
    return {**config, "available_node_types": types}
