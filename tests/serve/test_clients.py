"""Clients with keys of their own: who they are taken for, what share they have, and that others do not starve."""

import asyncio

import grpc
import httpx
import pytest
from fake import HeldEngine
from pydantic import ValidationError

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.metrics import LOAD
from tests.waiting import WAIT_S, eventually
from trinity.config import Client, Config, ServeConfig
from trinity.config.serve import HIDDEN
from trinity.engine.request import INT64
from trinity.errors import ConfigError

KEYS = {"api_key": "key-of-all", "admin_key": "key-of-admin"}
CLIENTS = {"ann": {"key": "key-of-ann", "weight": 2.0}, "bob": {"key": "key-of-bob"}}
BODY = {"prompt": "the lazy dog", "max_tokens": 2}


def headers(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def shared(start):
    """Eight slots: four are ann's, two bob's and two of those with the common key."""
    async with (
        start(HeldEngine(), clients=CLIENTS, max_concurrent_requests=8, **KEYS) as server,
        http_of(server) as http,
    ):
        yield server, http


def http_of(server):
    return httpx.AsyncClient(base_url=server.url, timeout=WAIT_S)


async def ask_over_grpc(server, key):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        asked = pb.GenerateRequest(text="the lazy dog", sampling=pb.SamplingParams(max_tokens=2))
        stream = rpc.InferenceStub(channel).Generate(asked, metadata=[("authorization", f"Bearer {key}")])
        return [answer async for answer in stream]


@pytest.mark.parametrize(
    ("key", "name", "weight", "first"),
    [
        ("key-of-ann", "ann", 2.0, 0),
        ("key-of-bob", "bob", 1.0, 0),
        ("key-of-all", "default", 1.0, -INT64),
        ("key-of-admin", "admin", 1.0, -INT64),
    ],
)
async def test_each_key_has_a_name_that_the_engine_hears(shared, key, name, weight, first):
    server, http = shared
    server.engine.go.set()
    assert (await http.post("/v1/completions", json=BODY, headers=headers(key))).status_code == 200
    await ask_over_grpc(server, key)
    assert server.engine.clients == [Client(name, weight, first)] * 2
    for wrong in ("x", key + "x", key[:-1], name):
        assert (await http.post("/v1/completions", json=BODY, headers=headers(wrong))).status_code == 401


async def test_without_keys_all_are_one_client_that_may_have_all(start):
    async with start(HeldEngine(), max_concurrent_requests=8) as server, http_of(server) as http:
        calls = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(8)]
        await eventually(lambda: server.front.admission.active == 8)
        server.engine.go.set()
        assert {call.status_code for call in await asyncio.gather(*calls)} == {200}


async def test_a_flood_of_one_leaves_the_others_their_share(shared):
    server, http = shared

    def ask(key):
        return asyncio.create_task(http.post("/v1/completions", json=BODY, headers=headers(key)))

    flood = [ask("key-of-ann") for _ in range(12)]
    await eventually(lambda: sum(call.done() for call in flood) == 8)
    refused = [call.result() for call in flood if call.done()]
    assert {answer.status_code for answer in refused} == {429}
    assert "4 requests of client 'ann' are running" in refused[0].json()["error"]["message"]
    others = [ask(key) for key in ("key-of-bob", "key-of-bob", "key-of-all", "key-of-all")]
    await eventually(lambda: server.front.admission.active == 8)
    assert (
        'trinity_client_requests{client="ann"} 4.0' in (await http.get("/metrics", headers=headers("key-of-all"))).text
    )
    with pytest.raises(grpc.aio.AioRpcError) as full:
        await ask_over_grpc(server, "key-of-ann")
    assert full.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    server.engine.go.set()
    assert {call.status_code for call in await asyncio.gather(*others)} == {200}
    await eventually(lambda: not server.front.admission.active)
    assert (
        'trinity_client_requests{client="ann"} 0.0' in (await http.get("/metrics", headers=headers("key-of-all"))).text
    )


async def test_clients_see_of_others_how_busy_they_keep_the_server_and_no_more(shared):
    """Sums of hits, times and computed tokens, looked at before and after, tell what another key's prompts begin with."""
    server, http = shared
    server.engine.go.set()
    await http.post("/v1/completions", json=BODY, headers=headers("key-of-bob"))
    await server.front.probe(timeout_s=WAIT_S)
    lines = {
        key: set((await http.get("/metrics", headers=headers(key))).text.splitlines())
        for key in ("key-of-ann", "key-of-all", "key-of-admin")
    }
    told = {line.split("{")[0].split(" ")[0] for line in lines["key-of-ann"] if line[0] != "#"}
    assert told == set(LOAD)
    for key in ("key-of-all", "key-of-admin"):
        assert lines["key-of-ann"] < lines[key]
        assert {"vllm:prefix_cache_hits_total", "trinity_prompt_tokens_total"} <= {
            line.split("{")[0].split(" ")[0] for line in lines[key]
        }


@pytest.mark.parametrize(("key", "most"), [("key-of-ann", 2), ("key-of-bob", 2), ("key-of-admin", 2)])
async def test_one_request_holds_no_more_than_a_quarter_nor_than_its_share(shared, key, most):
    server, http = shared
    server.engine.go.set()
    for n, status in ((most, 200), (most + 1, 400)):
        answer = await http.post("/v1/completions", json={**BODY, "n": n}, headers=headers(key))
        assert answer.status_code == status
        await eventually(lambda: not server.front.admission.active)


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        ({"clients": {"ann": {"key": "a"}, "bob": {"key": "a"}}}, "clients.bob has the key of clients.ann"),
        ({"clients": {"ann": {"key": "a"}}, "api_key": "a"}, "clients.ann has the key of api_key"),
        ({"clients": {"ann": {"key": "a"}}, "admin_key": "a"}, "admin_key is the key of clients.ann"),
        ({"clients": {"Ann!": {"key": "a"}}}, "no client's name"),
        ({"clients": {"admin": {"key": "a"}}}, "no client's name"),
        ({"clients": {"ann": {"key": ""}}}, "clients.ann.key"),
        ({"clients": {"ann": {"key": "a", "weight": 0}}}, "clients.ann.weight"),
        ({"clients": {"ann": {"key": "a", "weight": float("nan")}}}, "clients.ann.weight"),
        ({"clients": {"ann": {"key": "a", "size": 1}}}, "size"),
        ({"clients": {f"c{at}": {"key": f"k{at}"} for at in range(1001)}}, "at most 1000"),
        ({"clients": {"ann": {"key": HIDDEN}}}, r"clients.ann is '\(set\)', which printed settings show for a key"),
        ({"api_key": HIDDEN}, "api_key is .*give the key"),
        ({"admin_key": HIDDEN}, "admin_key is .*give the key"),
        ({"host": "0.0.0.0", "allow_remote": True}, "set serve.allow_remote true and serve.api_key"),
    ],
)
def test_settings_that_are_refused(serve, said):
    with pytest.raises(ConfigError, match=said):
        Config.from_tree({"model": "tiny", "serve": serve})


def test_keys_are_shown_nowhere():
    config = Config.from_tree({"model": "tiny", "serve": {"clients": CLIENTS, **KEYS}})
    for text in (repr(config), str(config.serve), config.to_yaml()):
        assert "key-of" not in text
    assert "ann" in config.to_yaml()
    with pytest.raises(ValidationError):
        config.serve.clients["ann"].weight = 3.0


def test_clients_come_from_flags_and_a_key_makes_the_server_reachable():
    config = Config.load(
        model="tiny",
        flags=["--serve.clients.ann.key", "abc", "--serve.host", "0.0.0.0", "--serve.allow_remote", "true"],
    )
    assert config.serve.clients["ann"].key == "abc"
    assert config.serve.needs_key
    assert not ServeConfig().needs_key
