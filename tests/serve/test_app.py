"""The Ray Serve application with the fake engine: both edges, killed engines and gateways, addresses, draining."""

import asyncio
import json
import os
import re
import signal
import socket
import threading

import grpc
import httpx
import openai
import pytest
from balancer import Balancer
from processes import engine_pids, gateway_pids, processes
from test_access import listening

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.app import start
from tests.sockets import free_ports
from tests.waiting import WAIT_S, eventually
from trinity.config import Config
from trinity.errors import ConfigError

NUM_GATEWAYS = 2


@pytest.fixture(scope="module")
def config():
    ports = dict(zip(("http_port", "grpc_port"), free_ports(NUM_GATEWAYS), strict=True))
    serve = {**ports, "gateways": NUM_GATEWAYS, "max_concurrent_requests": 200, "drain_timeout_s": 90}
    return Config.load(model="tiny", serve=serve, engine={"replicas": 2, "kv_tier_bytes": 1, "min_prefill_tokens": 64})


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """Prompts with the word "stay" stay while it is shut; then they are the other files in it."""
    found = tmp_path_factory.mktemp("served") / "fake-model"
    found.mkdir()
    (found / "shut").touch()
    return found


@pytest.fixture(scope="module")
def server(ray_session, config, gate):
    from ray import serve

    server = start(config, str(gate), "tests.serve.fake:build")
    yield server
    server.stop()
    serve.shutdown()


def replicas():
    """(title, its listening sockets) of each of them."""
    return [(title, listening(pid)) for pid, title in processes()]


async def test_both_edges_give_the_same_text(server):
    async with openai.AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="x") as client:
        whole = await client.completions.create(model="fake-model", prompt="the lazy dog", max_tokens=8)
        stream = await client.completions.create(model="fake-model", prompt="the lazy dog", max_tokens=8, stream=True)
        chunks = [chunk.choices[0].text async for chunk in stream]
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        request = pb.GenerateRequest(text="the lazy dog", sampling=pb.SamplingParams(max_tokens=8))
        responses = [response async for response in rpc.InferenceStub(channel).Generate(request)]
    assert "".join(chunks) == whole.choices[0].text == "".join(r.delta.text for r in responses)
    assert responses[-1].final.usage.completion_tokens == 8


async def test_errors_cross_processes_with_their_type_or_as_nothing(server):
    async with httpx.AsyncClient(base_url=server.http_url, timeout=WAIT_S) as http:
        answer = await http.post("/v1/completions", json={"prompt": "refuse"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        assert answer.json()["error"]["message"] == "the queue is full"
        answer = await http.post("/v1/completions", json={"prompt": "fail"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="refuse")).read()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_s3_only_loopback_is_open(server):
    """Each replica has the same two sockets of Ray's on all interfaces, behind Ray's token; the edges add loopback only."""
    pairs = [{port_of(door.http_url), port_of(door.grpc_address)} for door in server.doors]
    found = replicas()
    assert not [title for title, _ in found if "Proxy" in title]
    gateways = [sockets for title, sockets in found if "Gateway" in title]
    engines = [sockets for title, sockets in found if "Engine" in title]
    opened = [{port for host, port in sockets if host == "127.0.0.1"} for sockets in gateways]
    assert sorted(map(sorted, opened)) == sorted(map(sorted, pairs))
    edges = {("127.0.0.1", port) for pair in pairs for port in pair}
    assert {len(sockets - edges) for sockets in (*gateways, *engines)} == {2}


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def test_a_taken_port_is_named(server, config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"http_port {port}"):
            start(config.replace(serve={"http_port": port}), "fake-model", "tests.serve.fake:build")


def test_gateways_of_one_machine_have_neighbouring_ports(server, config):
    first = [config.serve.http_port, config.serve.grpc_port]
    found = [[port_of(door.http_url), port_of(door.grpc_address)] for door in server.doors]
    assert found == [[port + at for port in first] for at in range(NUM_GATEWAYS)]


def num_staying(gate):
    return len(list(gate.iterdir())) - 1


async def counted(http, name):
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


async def test_cancelling_reaches_the_engine(server, gate):
    """The answers would never end by themselves."""

    async def until_running(wanted):
        async with asyncio.timeout(WAIT_S):
            while (await counted(http, "trinity_requests_running") > 0) != wanted:
                await asyncio.sleep(0.1)

    async with httpx.AsyncClient(base_url=server.http_url, timeout=WAIT_S) as http:
        body = {"prompt": "stay", "max_tokens": 4}
        calls = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(8)]
        await eventually(lambda: num_staying(gate) == 8)
        await until_running(True)
        for call in calls:
            call.cancel()
        await eventually(lambda: num_staying(gate) == 0)
        await until_running(False)


async def said(http, prompt):
    """-> the text of a stream, which has no error in it."""
    body = {"prompt": prompt, "max_tokens": 90, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    assert all("choices" in event for event in events), events[-1]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def test_f22_killed_engines_pause_their_streams_and_change_none(server):
    """One in the middle of all of them, then the other, before or after the first is back."""
    prompts = [f"the lazy dog {number} jumps" for number in range(12)]
    async with httpx.AsyncClient(base_url=server.http_url, timeout=WAIT_S) as http:
        undisturbed = await asyncio.gather(*(said(http, prompt) for prompt in prompts))
        began = await counted(http, "trinity_generated_tokens_total")
        streams = [asyncio.create_task(said(http, prompt)) for prompt in prompts]
        for pid, number, tokens in zip(engine_pids(), (signal.SIGKILL, signal.SIGTERM), (100, 400), strict=True):
            while await counted(http, "trinity_generated_tokens_total") < began + tokens:
                await asyncio.sleep(0.01)
            os.kill(pid, number)
        assert await asyncio.gather(*streams) == undisturbed
        assert await counted(http, "trinity_continuation_seconds_count") > 0
        while len(engine_pids()) < 2:
            await asyncio.sleep(0.05)


def door_pids():
    """-> the process of the gateway that listens on each port."""
    return {port: pid for pid in gateway_pids() for host, port in listening(pid) if host == "127.0.0.1"}


async def asked(http, prompt):
    """`said`, and how often it had to be asked anew."""
    for again in range(10):
        try:
            return await said(http, prompt), again
        except httpx.TransportError:
            pass
    raise AssertionError("no gateway serves it")


async def engines_shown(http):
    """-> requests that run in each engine, with its role."""
    name = "trinity_engine_requests_running{"
    lines = [line for line in (await http.get("/metrics")).text.splitlines() if line.startswith(name)]
    return sorted((re.search('role="(.*)"', line)[1], float(line.split()[-1])) for line in lines)


async def test_prompts_that_begin_alike_go_to_one_engine_and_roles_change(server, gate):
    """Each engine is shown by itself. The one that computes prompts is sent no answer while there is another."""
    prompt = "stay " + "the quick brown fox jumps over the lazy dog " * 8
    async with httpx.AsyncClient(base_url=server.http_url, timeout=WAIT_S) as http:
        async with asyncio.timeout(WAIT_S):
            while len(await engines_shown(http)) < 2:  # those that were killed may be starting
                await asyncio.sleep(0.1)

        async def stay(name, shown):
            calls = [
                http.post("/v1/completions", json={"prompt": f"{prompt}{name}{i}", "max_tokens": 1}) for i in range(3)
            ]
            calls = [asyncio.create_task(call) for call in calls]
            async with asyncio.timeout(WAIT_S):
                while await engines_shown(http) != shown:
                    await asyncio.sleep(0.1)
            for call in calls:
                call.cancel()
            await eventually(lambda: num_staying(gate) == 0)

        await stay("a", [("both", 0.0), ("both", 3.0)])
        assert (await http.post("/engine_roles", json={"roles": ["prefill", "decode"]})).status_code == 200
        assert not (gate.parent / "prefilled").exists()
        await stay("b", [("decode", 3.0), ("prefill", 0.0)])
        assert (gate.parent / "prefilled").exists()
        answer = await http.post("/engine_roles", json={"roles": ["prefill"]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "roles")
        assert (await http.post("/engine_roles", json={"roles": ["both"]})).status_code == 200


async def test_f23_a_killed_gateway_takes_its_own_streams_and_no_others(server):
    """Behind a balancer: those of the other go on, new ones are served, and it comes back at its address."""
    prompts = [f"the quick brown fox {number}" for number in range(12)]
    url, victim = server.doors[1].http_url, door_pids()[port_of(server.doors[1].http_url)]
    async with (
        Balancer([door.http_url for door in server.doors]) as balancer,
        httpx.AsyncClient(base_url=balancer.url, timeout=WAIT_S) as http,
        httpx.AsyncClient(base_url=url, timeout=WAIT_S) as direct,
    ):
        undisturbed = await asyncio.gather(*(said(http, prompt) for prompt in prompts))
        assert balancer.num_by_url == dict.fromkeys(balancer.num_by_url, len(prompts) // 2)
        began = await counted(direct, "trinity_generated_tokens_total")
        http._transport = httpx.AsyncHTTPTransport()  # connections of its own for each
        streams = [asyncio.create_task(asked(http, prompt)) for prompt in prompts]
        while await counted(direct, "trinity_generated_tokens_total") < began + 60:
            await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        found = await asyncio.gather(*streams)
        assert [text for text, _ in found] == undisturbed
        assert sum(again > 0 for _, again in found) == len(prompts) // 2
        async with asyncio.timeout(WAIT_S):
            await balancer.notices(url, False)
            assert [await said(http, prompt) for prompt in prompts[:4]] == undisturbed[:4]
            await balancer.notices(url, True)
        assert door_pids()[port_of(url)] != victim
        assert await said(direct, prompts[0]) == undisturbed[0]
        async with asyncio.timeout(WAIT_S):
            while await counted(direct, "trinity_gateways") != NUM_GATEWAYS:
                await asyncio.sleep(0.05)


def test_a_factory_that_is_not_there_is_named(server, config):
    with pytest.raises(ConfigError, match="no engine factory"):
        start(config.replace(serve={"http_port": 0, "grpc_port": 0}), "fake-model", "tests.serve.fake:nothing")


async def test_f16_stopping_lets_running_streams_end_and_waits_for_no_engine(server, gate, monkeypatch):
    """The last test of this file: the server is gone after it. One of its engines has died, and another is being built."""
    from ray import serve

    monkeypatch.setattr("serving.removal.OWN_S", 0.5)
    (gate.parent / "never").touch()
    os.kill(engine_pids()[0], signal.SIGKILL)
    await eventually((gate.parent / "building").exists)

    async with httpx.AsyncClient(base_url=server.http_url, timeout=WAIT_S) as http:
        body = {"prompt": "stay", "max_tokens": 150}
        calls = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(20)]
        await eventually(lambda: num_staying(gate) == 20)
        assert (await http.get("/ready")).status_code == 200
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        async with asyncio.timeout(WAIT_S):
            while (await http.get("/ready")).status_code == 200:
                await asyncio.sleep(0.05)
        assert (await http.post("/v1/completions", json=body)).status_code == 503
        assert not any(call.done() for call in calls)
        (gate / "shut").unlink()
        assert {answer.status_code for answer in await asyncio.gather(*calls)} == {200}
        await asyncio.to_thread(stopping.join)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.http_url}/health")
    assert not serve.status().applications
    assert not engine_pids()
    await asyncio.to_thread(server.stop)
