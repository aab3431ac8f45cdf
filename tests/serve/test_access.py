"""Who may do what: keys on every route and rpc, loopback only, nothing secret in logs or answers, TLS."""

import asyncio
import logging

import grpc
import httpx
import pytest
from certificates import self_signed
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from serving.access import key_matches
from serving.http.routes import ROUTES
from tests.sockets import listening
from tests.waiting import WAIT_S
from trinity.config import ServeConfig

KEY = "correct-horse-battery"
BODY = {"prompt": "the secret prompt", "max_tokens": 2}
OPEN = {"/health", "/ready", "/-/healthz", "/", "/dashboard"}


@pytest.fixture
async def locked(start):
    async with start(api_key=KEY) as server:
        yield server


def test_routes_of_the_app_are_those_that_declare_their_access(server):
    app = server.gateway.http.server.config.app
    served = {(method, route.path) for route, _ in app.app.routes for method in route.methods}
    assert served == {(method, route.path) for route in ROUTES for method in route.methods}
    assert app.access == {route.path: route.access for route in ROUTES}
    assert {route.path for route in ROUTES if route.access == "open"} == OPEN


async def test_the_scheme_may_be_written_in_any_case(locked):
    """RFC 9110, 11.1."""
    async with httpx.AsyncClient(base_url=locked.url, timeout=WAIT_S) as http:
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert (await http.get("/v1/models", headers={"authorization": f"{scheme} {KEY}"})).status_code == 200


async def test_s2_http_without_the_key(locked):
    wrong = [{}, {"authorization": KEY}, {"authorization": f"bearer{KEY}"}, {"authorization": f"Bearer {KEY}x"}]
    wrong += [{"authorization": "Bearer"}, {"authorization": f"Basic {KEY}"}, {"x-api-key": f"{KEY}x"}]
    async with httpx.AsyncClient(base_url=locked.url, timeout=WAIT_S) as http:
        paths = [
            (route.method, route.path.replace("{name:path}", "fake")) for route in ROUTES if route.path not in OPEN
        ]
        for method, path in [
            *paths,
            ("GET", "/index.html"),
            ("GET", "/nowhere"),
            ("PUT", "/health/"),
            ("GET", f"{locked.url}//health"),
        ]:
            for headers in wrong:
                answer = await http.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
        for path in OPEN:
            assert (await http.get(path)).status_code == 200
        answer = await http.post("/v1/completions", json=BODY, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200


async def test_the_key_is_checked_before_the_body(locked):
    reader, writer = await asyncio.open_connection("127.0.0.1", locked.gateway.http.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 999999\r\n\r\n{")
    async with asyncio.timeout(WAIT_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.close()


async def call_everything(address, metadata):
    """(name, status) of one call to each rpc there is, and to one that is not."""
    async with grpc.aio.insecure_channel(address) as channel:
        found = await call_each(channel, metadata)
    return found | {"Reflection": await asyncio.to_thread(reflect, address, metadata)}


def reflect(address, metadata):
    """Status of a call to the reflection service, by grpc's other client: the one of asyncio says INTERNAL where its
    stream of requests is written to after the server's status has come (grpc/grpc issue 36066)."""
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(address) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([asked]), metadata=metadata, timeout=WAIT_S
        )
        try:
            for _ in answers:
                pass
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


async def call_each(channel, metadata):
    inference, health = rpc.InferenceStub(channel), health_pb2_grpc.HealthStub(channel)
    calls = {
        "Generate": lambda: inference.Generate(pb.GenerateRequest(text="fox"), metadata=metadata),
        "ListModels": lambda: inference.ListModels(pb.ListModelsRequest(), metadata=metadata),
        "Tokenize": lambda: inference.Tokenize(pb.TokenizeRequest(text="a"), metadata=metadata),
        "Detokenize": lambda: inference.Detokenize(pb.DetokenizeRequest(token_ids=[5]), metadata=metadata),
        "Nothing": lambda: channel.unary_unary("/trinity.v1.Nothing/At")(b"", metadata=metadata),
        "Check": lambda: health.Check(health_pb2.HealthCheckRequest(), metadata=metadata),
    }
    return {name: await status_of(call()) for name, call in calls.items()}


async def status_of(call):
    try:
        async for _ in call if hasattr(call, "__aiter__") else one(call):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def one(call):
    yield await call


async def test_s2_grpc_without_the_key(locked):
    declared = {method.name for method in pb.DESCRIPTOR.services_by_name["Inference"].methods}
    for metadata in ((), (("authorization", KEY),), (("authorization", f"Bearer {KEY}x"),)):
        found = await call_everything(locked.grpc_address, metadata)
        assert found.pop("Check") == "OK"
        assert declared < found.keys()
        assert set(found.values()) == {"UNAUTHENTICATED"}
    found = await call_everything(locked.grpc_address, (("authorization", f"Bearer {KEY}"),))
    assert found.pop("Nothing") == "UNIMPLEMENTED"
    assert set(found.values()) == {"OK"}


async def test_without_a_key_all_is_open(server):
    found = await call_everything(server.grpc_address, ())
    assert found.pop("Nothing") == "UNIMPLEMENTED"
    assert set(found.values()) == {"OK"}


def test_keys_are_compared_in_constant_time(monkeypatch):
    seen = []
    monkeypatch.setattr("serving.access.hmac.compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    assert key_matches("Bearer k", "k")
    assert not key_matches(None, "k")
    assert not key_matches("Bearer é", "k")
    assert len(seen) == 3


async def test_s6_neither_keys_nor_prompts_are_logged(locked, caplog):
    caplog.set_level(logging.WARNING, "httpx")  # the client's own
    caplog.set_level(logging.INFO)
    async with httpx.AsyncClient(base_url=locked.url, timeout=WAIT_S) as http:
        for key in (KEY, "guess"):
            await http.post("/v1/completions?key=guess", json=BODY, headers={"authorization": f"Bearer {key}"})
    assert "/v1/completions" in caplog.text
    for secret in (KEY, "guess", "secret prompt"):
        assert secret not in caplog.text
    assert KEY not in repr(locked.front.config)


async def test_s3_default_listeners_are_on_loopback(start):
    before = listening()
    async with start() as server:
        opened = listening() - before
        assert {port for _, port in opened} == {server.gateway.http.port, server.gateway.grpc.port}
        assert {host for host, _ in opened} == {"127.0.0.1"}
    assert listening() == before


def test_other_addresses_need_a_key_and_a_flag():
    for settings in ({}, {"allow_remote": True}, {"api_key": KEY}):
        with pytest.raises(ValueError, match="allow_remote"):
            ServeConfig(host="0.0.0.0", **settings)
    assert ServeConfig(host="0.0.0.0", allow_remote=True, api_key=KEY)


async def test_tls_on_both(start, tmp_path):
    cert, key = self_signed(tmp_path)
    async with start(tls_cert=str(cert), tls_key=str(key)) as server:
        async with httpx.AsyncClient(base_url=server.url, verify=str(cert)) as http:
            assert server.url.startswith("https://")
            assert (await http.get("/health")).status_code == 200
        trusted = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(server.grpc_address, trusted) as channel:
            models = await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
            assert models.models[0].name == "fake"
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            assert await status_of(rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())) == "UNAVAILABLE"
