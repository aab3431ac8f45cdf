"""A cloud file as a cluster of fake nodes on one machine, for tests of scaling with Ray's own autoscaler.

    python clusters/fake.py clusters/aws-p5.yaml 127.0.0.1:21500 > fake.yaml
    env $(python clusters/fake.py --env) ray start --head --block --port=21500 --num-cpus=0 --autoscaling-config=fake.yaml ...

Decisions: derived, never written by hand, so that node types, GPUs and custom resources are the cloud file's. Only what
would hurt one machine is changed: a raylet starts a process for each CPU, so CPUs are capped, object stores are small, and
nothing is started before it is asked for. The head's type takes the one name that the fake provider knows.
`ray.cluster_utils.AutoscalingCluster` is not used: it ends every Ray of the machine. The port lies outside 10002-19999.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HEAD_TYPE = "ray.head.default"  # ray.autoscaler._private.fake_multi_node.node_provider.FAKE_HEAD_NODE_TYPE
HEAD_ID = "f" * 51 + "00000"  # ... FAKE_HEAD_NODE_ID
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
UNUSED: dict[str, Any] = {  # the reader of these files wants them all; nodes here are processes and run no commands
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
HEAD_ENV = {  # of `ray start --head`, before anything imports ray
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "RAY_NODE_TYPE_NAME": HEAD_TYPE,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def fake_config(
    cloud: Mapping[str, Any],
    gcs_address: str,
    max_cpus: int = 1,
    object_store_bytes: int = 100 << 20,
    idle_timeout_s: float = 5.0,
) -> dict[str, Any]:
    """The autoscaling config of a fake cluster with the node types of `cloud`, a parsed `ray up` file.

    `gcs_address` is host:port of the head to be started. Bounds are the file's, except that nothing need be there.
    """
    head = cloud["head_node_type"]
    types = {
        HEAD_TYPE if name == head else name: _fake_type(kind, name == head, max_cpus, object_store_bytes)
        for name, kind in cloud["available_node_types"].items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": sum(kind["max_workers"] for kind in types.values()),
        "idle_timeout_minutes": idle_timeout_s / 60,
        "head_node_type": HEAD_TYPE,
        "available_node_types": types,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": gcs_address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        **UNUSED,
    }


def _fake_type(kind: Mapping[str, Any], is_head: bool, max_cpus: int, object_store_bytes: int) -> dict[str, Any]:
    resources = dict(kind["resources"])
    resources["CPU"] = min(resources["CPU"], max_cpus)
    if is_head:
        return {"node_config": {}, "resources": resources, "min_workers": 0, "max_workers": 0}
    resources["object_store_memory"] = object_store_bytes
    return {"node_config": {}, "resources": resources, "min_workers": 0, "max_workers": kind["max_workers"]}


def main(argv: list[str]) -> None:
    if argv == ["--env"]:
        print(*(f"{key}={value}" for key, value in HEAD_ENV.items()))
        return
    path, gcs_address = argv
    print(yaml.safe_dump(fake_config(yaml.safe_load(Path(path).read_text()), gcs_address), sort_keys=False), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
