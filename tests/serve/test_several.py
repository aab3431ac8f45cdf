"""Several gateways without Ray: their ports, their addresses, how many there are to be. With Ray: test_app.py, tests/chaos."""

from types import SimpleNamespace

import pytest
from fake import FakeEngine, fake_tokenizer

from serving import nodes
from serving.addresses import Door, doors
from serving.app import at_node
from serving.engine import LocalClient
from serving.frontend import Frontend
from serving.gateway import Gateway
from tests.sockets import free_ports
from trinity.config import Config, ServeConfig
from trinity.errors import ConfigError


async def made(config):
    client = LocalClient(FakeEngine(), fake_tokenizer(), "fake")
    return Gateway(Frontend(client, client.tokenizer, await client.info(), config))


async def test_each_takes_the_first_pair_of_ports_that_is_free_and_a_new_one_the_dead_ones():
    http_port, grpc_port = free_ports(3)
    config = ServeConfig(http_port=http_port, grpc_port=grpc_port, gateways=3)
    gateways = [await made(config) for _ in range(5)]
    for gateway in gateways[:3]:
        await gateway.start(3)
    places = [(gateway.http.port - http_port, gateway.grpc.port - grpc_port) for gateway in gateways[:3]]
    assert places == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ConfigError, match=f"HTTP cannot listen on 127.0.0.1:{http_port + 2}"):
        await gateways[3].start(3)
    await gateways[1].stop()
    await gateways[4].start(3)
    assert (gateways[4].http.port, gateways[4].grpc.port) == (http_port + 1, grpc_port + 1)
    for gateway in (gateways[0], gateways[2], gateways[4]):
        await gateway.stop()


async def test_a_place_of_which_somebody_else_has_one_port_is_left_to_them():
    http_port, grpc_port = free_ports(2)
    first = await made(ServeConfig(http_port=grpc_port, grpc_port=0))  # a stranger, on the first gRPC port
    await first.start()
    second = await made(ServeConfig(http_port=http_port, grpc_port=grpc_port, gateways=2))
    await second.start(2)
    assert (second.http.port, second.grpc.port) == (http_port + 1, grpc_port + 1)
    await first.stop()
    await second.stop()


def remote(host):
    return ServeConfig(host=host, allow_remote=True, api_key="k" * 20)


@pytest.mark.parametrize(
    ("host", "shown"), [("node", "10.0.0.7"), ("0.0.0.0", "10.0.0.7"), ("127.0.0.1", "127.0.0.1"), ("::", "10.0.0.7")]
)
async def test_a_door_is_where_others_find_it(host, shown):
    gateway = await made(at_node(remote(host), "10.0.0.7"))
    assert gateway.door("10.0.0.7") == (f"http://{shown}:0", f"{shown}:0", "10.0.0.7")


def test_all_doors_are_told():
    found = [Door(f"http://here:{port}", f"here:{port + 1}", f"10.0.0.{port}") for port in (1, 3)]
    assert doors(found[:1]) == "HTTP http://here:1\ngRPC here:2\ntry the model in a browser: http://here:1/"
    assert doors(found).splitlines() == [
        *("gateway on 10.0.0.1", "HTTP http://here:1", "gRPC here:2"),
        *("gateway on 10.0.0.3", "HTTP http://here:3", "gRPC here:4"),
        "try the model in a browser: http://here:1/",
    ]


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        ({"gateways": 0}, "give a number, 1 and more, or `every_node`"),
        ({"gateways": "all"}, "give a number"),
        ({"gateways": 3, "http_port": 8000, "grpc_port": 8002}, "further apart, or fewer gateways"),
        ({"gateways": 8, "http_port": 65530, "grpc_port": 9000}, "65535"),
        ({"host": "node"}, "set serve.allow_remote true"),
        ({"drain_delay_s": -1}, "drain_delay_s"),
    ],
)
def test_settings_that_are_refused(serve, said):
    with pytest.raises(ConfigError, match=said):
        Config.from_tree({"model": "tiny", "serve": serve})


NODES = [
    {"NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 1}},
    {"NodeID": "b", "Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": {"gateway": 1}},
    {"NodeID": "c", "Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": {"gateway": 1}},
    {"NodeID": "d", "Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": {"gateway": 1}},
    {"NodeID": "e", "Alive": True, "NodeManagerAddress": "10.0.0.4", "Resources": {"gateway": 1}},
]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    monkeypatch.setattr("ray._private.state.state", SimpleNamespace(get_draining_nodes=lambda: {"e": 1}))


@pytest.mark.parametrize(
    ("resources", "address", "num"),
    [({}, None, 3), ({"gateway": 1}, None, 2), ({}, "10.0.0.2", 2), ({"gateway": 2}, None, 1)],
)
def test_nodes_that_can_have_a_gateway_are_counted(cluster, resources, address, num):
    assert nodes.num_nodes(resources, address) == num


@pytest.mark.parametrize(("num", "each"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_a_number_of_them_is_spread_evenly(cluster, num, each):
    assert nodes.scaled(num, {}) == {"num_replicas": num, "max_replicas_per_node": each}


def test_one_on_every_node_follows_them_and_asks_once_a_second(cluster, monkeypatch):
    from ray.serve.config import AutoscalingConfig

    options = nodes.scaled("every_node", {"gateway": 1})
    assert options["max_replicas_per_node"] == 1
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert config.initial_replicas == 2
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(None) == (2, {})
    monkeypatch.setattr("ray.nodes", lambda: [])
    assert policy(None) == (2, {}), "the controller asks ten times a second"
