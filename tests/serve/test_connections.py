"""How many may be connected, and what a request may not say twice: on raw sockets, where no client library helps."""

import asyncio
import select
import socket
import ssl
from contextlib import AsyncExitStack, ExitStack, closing, suppress

import grpc
import httpx
import pytest
from certificates import self_signed
from fake import HeldEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving import limits
from serving.grpc import guard
from serving.grpc import server as grpc_server
from serving.http.server import HttpServer
from tests.chaos.unruly import HEADERS, PREFACE, RST, SETTINGS, frame
from tests.unit.fuzzed_port import num_descriptors
from tests.waiting import WAIT_S, eventually
from trinity.config import ServeConfig

GOAWAY = 0x7
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


def connected(address):
    host, port = address.removeprefix("http://").rsplit(":", 1)
    made = socket.create_connection((host, int(port)), timeout=WAIT_S)
    return closing(made)


async def answered(sock, words=HEALTH, end=b"}"):
    """The answer up to its end, or none where the connection is closed."""

    def exchange():
        found = b""
        try:
            sock.sendall(words)
            while end not in found and (piece := sock.recv(4096)):
                found += piece
        except ConnectionError:
            return b""
        return found

    return await asyncio.to_thread(exchange)


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_peer"])
async def test_for_one_connection_too_many_the_oldest_idle_one_goes(start, limit):
    async with start(**{limit: 3}) as server:
        with ExitStack() as stack:
            within = [stack.enter_context(connected(server.url)) for _ in range(3)]
            for sock in within:
                assert b"200" in await answered(sock)
            within.append(within.pop(0))
            assert b"200" in await answered(within[-1])
            within.insert(0, stack.enter_context(connected(server.url)))
            assert [await answered(sock) != b"" for sock in within] == [True, False, True, True], (
                "longest without a word"
            )
            crowd = [stack.enter_context(connected(server.url)) for _ in range(50)]
            assert b"200" in await answered(stack.enter_context(connected(server.url)))
            for sock in (*within, *crowd[:-2]):
                assert await answered(sock) == b""
            assert b"200" in await answered(crowd[-1])


async def test_who_makes_room_is_gone_whether_it_says_goodbye_or_not(start, tmp_path):
    """Over TLS, and its peer reads nothing: its descriptor is free all the same."""
    cert, key = self_signed(tmp_path)
    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False
    async with start(max_connections=3, tls_cert=str(cert), tls_key=str(key)) as server:
        before, crowd = num_descriptors(), []
        with ExitStack() as stack:
            for _ in range(30):
                plain = stack.enter_context(connected(server.url.replace("https", "http")))
                crowd.append(stack.enter_context(await asyncio.to_thread(context.wrap_socket, plain)))

            async def holds():
                return num_descriptors() <= before + len(crowd) + 3

            await comes_true(holds)


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_peer"])
async def test_one_connection_too_many_beside_busy_ones_is_closed(start, limit):
    engine = HeldEngine(num_free=1)
    async with start(engine, **{limit: 3}) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        body = {"prompt": "a", "max_tokens": 2, "stream": True}
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(http.stream("POST", "/v1/completions", json=body)) for _ in range(3)
            ]
            for _ in range(5):
                with connected(server.url) as sock:
                    assert await answered(sock) == b""
            engine.go.set()
            for stream in streams:
                assert "[DONE]" in (await stream.aread()).decode()
        with connected(server.url) as sock:
            assert b"200" in await answered(sock)


async def test_connections_that_never_say_what_they_want_make_room(start, monkeypatch):
    """Of gRPC's: a preface and nothing else."""
    monkeypatch.setattr(grpc_server, "HANDSHAKE_MS", 300)
    async with start(max_connections=4) as server:
        with ExitStack() as stack:
            idle = [stack.enter_context(connected(server.grpc_address)) for _ in range(20)]
            for sock in idle:
                await answered(sock, PREFACE, b"")
            async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
                assert (await http.get("/health")).status_code == 200
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                models = await rpc.InferenceStub(channel).ListModels(
                    pb.ListModelsRequest(), wait_for_ready=True, timeout=WAIT_S
                )
    assert models.models[0].name == "fake"


def resets(sock):
    """Begin calls and take them back until the server ends the connection (HTTP/2 rapid reset)."""
    head, number = b"\x83\x86\x84\x01\x01x", 1  # POST, http, /, an authority
    sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
    with suppress(ConnectionError):
        while True:
            for at in range(number, number + 100, 2):
                sock.sendall(frame(HEADERS, 0x4, at, head) + frame(RST, 0, at, (8).to_bytes(4, "big")))
            number += 100
            while select.select([sock], [], [], 0.01)[0]:
                if not sock.recv(1 << 16):
                    return


async def test_a_flood_of_resets_is_ended_and_others_are_served(start, monkeypatch):
    monkeypatch.setattr(grpc_server, "AGE_MS", 200)
    monkeypatch.setattr(grpc_server, "SPARE_MS", 0)
    async with start(request_timeout_s=0.5) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        with connected(server.grpc_address) as sock:
            flood = asyncio.create_task(asyncio.to_thread(resets, sock))
            while not flood.done():
                await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), wait_for_ready=True)
            await flood


async def test_those_who_watch_health_are_bounded(start, monkeypatch):
    monkeypatch.setattr(guard, "MOST_OPEN_CALLS", 3)
    async with start(api_key="secret") as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub, watching = health_pb2_grpc.HealthStub(channel), []
        for _ in range(3):
            watching.append(stub.Watch(health_pb2.HealthCheckRequest()))
            assert (await watching[-1].read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="3 calls are under way as open"):
            await stub.Watch(health_pb2.HealthCheckRequest()).read()
        assert await is_answered(server, "secret")
        for call in watching:
            call.cancel()

        async def checked():
            with suppress(grpc.aio.AioRpcError):
                return (await stub.Check(health_pb2.HealthCheckRequest())).status
            return 0

        await comes_true(checked)


async def test_who_needs_no_key_sends_little(start):
    """What a watcher of health sent is kept for as long as it watches."""
    async with start(api_key="secret") as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for ask in (stub.Check, lambda request: stub.Watch(request).read()):
            with pytest.raises(grpc.aio.AioRpcError, match="without a key 1024 are taken") as refused:
                await ask(health_pb2.HealthCheckRequest(service="x" * 1024))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(health_pb2.HealthCheckRequest(service="x" * 1000))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_calls_that_say_nothing_are_bounded_by_client(start):
    """Two slots, so four calls under way: streams are opened, and their messages never come."""
    asked = b"/trinity.v1.Inference/Generate"
    fields = (
        b"\x04" + bytes([len(asked)]) + asked,
        b"\x01\x01x",
        b"\x0f\x10\x10application/grpc",
        b"\x00\x02te\x08trailers",
    )
    head = b"\x83\x86" + b"".join(fields)
    async with start(max_concurrent_requests=2) as server:
        with ExitStack() as stack:
            for _ in range(8):  # a connection has as many as there are slots, and the server may refuse some of a burst
                silent = b"".join(frame(HEADERS, 0x4, number, head) for number in (1, 3))
                sock = stack.enter_context(connected(server.grpc_address))
                await asyncio.to_thread(sock.sendall, PREFACE + frame(SETTINGS, 0, 0) + silent)
            await comes_true(lambda: is_refused(server))
        await comes_true(lambda: is_answered(server))


async def comes_true(holds):
    async with asyncio.timeout(WAIT_S):
        while not await holds():
            await asyncio.sleep(0.01)


async def is_answered(server, key=""):
    asking = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=1))
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        with suppress(grpc.aio.AioRpcError):
            call = rpc.InferenceStub(channel).Generate(asking, metadata=(("authorization", f"Bearer {key}"),))
            return await call.read() is not None
    return False


async def is_refused(server):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        try:
            await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "4 calls are under way" in error.details()
    return False


async def test_a_call_goes_on_when_its_connection_is_old(start, monkeypatch):
    monkeypatch.setattr(grpc_server, "AGE_MS", 200)
    engine = HeldEngine(num_free=1)
    async with start(engine) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        asked = pb.GenerateRequest(text="the lazy dog", sampling=pb.SamplingParams(max_tokens=4))
        call = rpc.InferenceStub(channel).Generate(asked)
        await call.read()
        with connected(server.grpc_address) as younger:
            told = await answered(younger, PREFACE + frame(SETTINGS, 0, 0), b"max_age")
            assert bytes([GOAWAY, 0]) in told
        engine.go.set()
        rest = 0
        while await call.read() is not grpc.aio.EOF:
            rest += 1
        assert rest == 4, "three tokens and the end"
        await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("localhost", True), ("127.0.0.1:1", True), ("[::1]:80", True), ("LOCALHOST:7", True), ("box.lan:8000", True)]
    + [("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example:80", False), ("[", False)]
    + [("", False)],
)
async def test_without_a_key_the_server_answers_to_its_own_names_only(start, host, is_ours):
    """A page of another name, whose address became this machine's, would be asking: DNS rebinding."""
    async with start(allowed_hosts=("box.lan",)) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, headers={"host": host}) as http:
            for path in ("/v1/models", "/health"):
                answer = await http.get(path)
                assert answer.status_code == (200 if is_ours else 400)
        if not is_ours:
            assert "serve.allowed_hosts" in answer.json()["error"]["message"]


async def test_with_a_key_any_name_will_do(start):
    async with start(api_key="a-long-key") as server:
        headers = {"host": "public.example", "authorization": "Bearer a-long-key"}
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, headers=headers) as http:
            assert (await http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        "content-length: 2\r\ntransfer-encoding: chunked\r\n",
        "authorization: Bearer a\r\nauthorization: Bearer b\r\n",
        "host: other\r\n",
    ],
)
async def test_what_two_readers_could_read_in_two_ways_is_refused(start, headers):
    async with start(api_key="a") as server:
        with connected(server.url) as sock:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{headers}\r\n"
            answer = await answered(sock, head.encode() + b"2\r\n{}\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")


async def test_two_keys_in_one_call_open_nothing(start):
    async with start(api_key="a") as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        metadata = (("authorization", "Bearer b"), ("authorization", "Bearer a"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_connections_are_counted_down_again(start):
    async with start() as server:
        for _ in range(3):
            with connected(server.url) as sock:
                await answered(sock)
        others = server.gateway.http.server.config.http_protocol_class.others
        await eventually(lambda: not others.by_peer)


class Held:
    """A program behind a listener: it answers when it may go on."""

    def __init__(self):
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.begun.set()
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def test_a_listener_that_stops_closes_who_asks_nothing_and_lets_an_answer_end():
    held = Held()
    listener = HttpServer(held, ServeConfig(http_port=0))
    listener.bind(0)
    await listener.start()
    url = f"http://127.0.0.1:{listener.port}"
    with connected(url) as idle, connected(url) as asking:
        asked = asyncio.create_task(answered(asking))
        await held.begun.wait()
        stopping = asyncio.create_task(listener.stop(WAIT_S))
        assert await answered(idle, b"") == b""
        with pytest.raises(ConnectionRefusedError):
            connected(url)
        assert not stopping.done()
        held.go.set()
        assert b"200" in await asked
        await stopping


async def test_a_listener_that_stops_does_not_wait_for_ever():
    held = Held()
    listener = HttpServer(held, ServeConfig(http_port=0))
    listener.bind(0)
    await listener.start()
    with connected(f"http://127.0.0.1:{listener.port}") as asking:
        asked = asyncio.create_task(answered(asking))
        await held.begun.wait()
        await listener.stop(0.01)
        assert listener._task.done()
        assert not asked.done()
        held.go.set()
        await asked


@pytest.mark.parametrize(("soft", "hard", "given"), [(1024, 1024, 384), (300, 300, 22), (256, 4096, 1920), (10, 10, 1)])
def test_connections_fit_the_descriptors(monkeypatch, soft, hard, given):
    """HTTP keeps some for itself, whatever gRPC's clients do: each listener has half of what there is."""
    taken = []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda kind, both: taken.append(both))
    config = limits.within_descriptors(ServeConfig(max_connections=2048))
    assert config.max_connections == given
    assert taken == ([(hard, hard)] if soft < hard else [])
