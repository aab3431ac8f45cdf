"""The driver of test_gateways.py, in a process of its own: gateways on the nodes of a cluster that come, die and are drained.

python gateways_driver.py MODEL_DIR HTTP_PORT GRPC_PORT
"""

# ruff: noqa: E402
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from trinity.config import Config, setup_environment

setup_environment("disabled", is_local=True)

import httpx
import ray
from ray.cluster_utils import Cluster

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "serve")]
from serving import app
from tests.waiting import until

NODE = {"num_cpus": 1, "resources": {"gateway": 1}}
HEAD = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20}
WITHIN_S = 120.0


def urls(server):
    """Doors that answer as ready, of those that the gateways say they have."""
    said = [about.door.http_url for about in app.all_about(server.gateway, 10)]
    return [url for url in said if is_ready(url)]


def is_ready(url):
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200


def tell(what, server):
    print(json.dumps({"what": what, "urls": urls(server)}), flush=True)


def drain(cluster, node):
    """A node gets notice that it will be gone."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(cluster.address).drain_node(node.node_id, reason, "spot", int(1000 * (time.time() + 60)))
    assert accepted, why


def main(model_dir, http_port, grpc_port):
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    ray.init(address=cluster.address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
    serve = {"http_port": int(http_port), "grpc_port": int(grpc_port), "max_concurrent_requests": 60}
    serve |= {"gateways": "every_node", "gateway_resources": {"gateway": 1}}
    server = app.start(Config.load(model="tiny", serve=serve), model_dir, "tests.serve.fake:build")
    until(lambda: len(urls(server)) == 2, WITHIN_S)
    tell("two nodes", server)
    nodes.append(cluster.add_node(**NODE))
    until(lambda: len(urls(server)) == 3, WITHIN_S)
    tell("a third came", server)
    cluster.remove_node(nodes.pop(0), allow_graceful=False)
    until(lambda: len(urls(server)) == 2, WITHIN_S)
    tell("one died", server)
    drain(cluster, nodes[0])
    until(lambda: len(urls(server)) == 1, WITHIN_S)
    tell("one is drained", server)
    nodes.append(cluster.add_node(**NODE))
    until(lambda: len(urls(server)) == 2, WITHIN_S)
    tell("another came", server)
    server.stop()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
