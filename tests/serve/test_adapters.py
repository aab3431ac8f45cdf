"""Adapters beside the served model: loaded and unloaded while it serves, listed, asked for by name at every door, counted."""

from contextlib import aclosing

import grpc
import httpx
import pytest
from fake import FakeEngine
from operated import bearer, metrics_of

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.waiting import WAIT_S, eventually
from trinity.config import AdapterRef, AdapterSet
from trinity.errors import EngineLost

pytestmark = pytest.mark.usefixtures("quick")
MESSAGES = [{"role": "user", "content": "the fox"}]
DOORS = {
    "/v1/completions": {"prompt": "the fox", "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"input": "the fox", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
}


@pytest.fixture
async def http(operated):
    async with httpx.AsyncClient(base_url=operated.url, timeout=WAIT_S) as client:
        await eventually(lambda: operated.front.placement._seen)
        yield client


async def load(http, name="poet", path="/adapters/poet", key=None, **more):
    body = {"lora_name": name, "lora_path": path, **more}
    return await http.post("/v1/load_lora_adapter", json=body, headers=bearer(key))


async def unload(http, name="poet"):
    return await http.post("/v1/unload_lora_adapter", json={"lora_name": name, "lora_int_id": 1})


async def test_an_adapter_is_a_model_from_its_loading_to_its_unloading(http, operated):
    assert (await load(http)).text == "Success: LoRA adapter 'poet' added successfully."
    listed = (await http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in listed] == [("fake", None), ("fake:poet", "fake")]
    assert (await http.get("/v1/models/fake:poet")).json() == listed[1]
    async with grpc.aio.insecure_channel(operated.grpc_address) as channel:
        models = (await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)).models
        assert [(model.name, model.parent) for model in models] == [("fake", ""), ("fake:poet", "fake")]
    assert (await unload(http)).text == "Success: LoRA adapter 'poet' removed successfully."
    gone = await http.post("/v1/completions", json={"model": "fake:poet", **DOORS["/v1/completions"]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
    assert (await unload(http)).status_code == 404
    assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["fake"]


async def test_what_one_gateway_loads_another_serves(http, operated, start, pool):
    """They ask the placement service, not each other."""
    async with start(operator=pool) as other, httpx.AsyncClient(base_url=other.url, timeout=WAIT_S) as there:
        await load(http)
        await eventually(lambda: other.front.placement.adapters)
        assert (await there.post("/v1/completions", json={"model": "poet", "prompt": "the fox"})).status_code == 200
        await unload(there)
        await eventually(lambda: not operated.front.placement.adapters)


@pytest.mark.parametrize("path", DOORS)
async def test_every_door_takes_its_name(http, operated, path):
    await load(http)
    for name, adapter in ((None, False), ("fake", False), ("fake:poet", True), ("poet", True)):
        own = {} if name is None else {"model": name}
        if path == "/v1/messages" and name is None:
            continue
        answer = (await http.post(path, json={**own, **DOORS[path]})).json()
        assert answer["model"] == ("fake:poet" if adapter else "fake")
        assert operated.engine.adapters[-1] == (AdapterRef("poet", 4, "/adapters/poet") if adapter else None)
    for name in ("fake:", "fake:painter", "painter", "poet:fake", ":poet", "fake:fake:poet"):
        assert (await http.post(path, json={"model": name, **DOORS[path]})).status_code == 404


async def test_grpc_takes_its_name_and_streams_do(http, operated):
    await load(http)
    async with grpc.aio.insecure_channel(operated.grpc_address) as channel:
        stub, asked = rpc.InferenceStub(channel), pb.GenerateRequest(text="the fox", model="fake:poet")
        assert [r async for r in stub.Generate(asked, timeout=WAIT_S)]
        asked.model = "fake:painter"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(asked, timeout=WAIT_S).read()
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    body = {"model": "poet", "stream": True, **DOORS["/v1/completions"]}
    async with http.stream("POST", "/v1/completions", json=body) as stream:
        chunks = [line async for line in stream.aiter_lines() if line.startswith('data: {"')]
    assert all('"model":"fake:poet"' in chunk for chunk in chunks)
    assert [ref and ref.name for ref in operated.engine.adapters] == ["poet", "poet"]


class Mortal(FakeEngine):
    """Its first stream is lost after a token."""

    async def generate(self, *asked, **begun):
        async with aclosing(super().generate(*asked, **begun)) as deltas:
            async for delta in deltas:
                yield delta
                if len(self.adapters) == 1:
                    raise EngineLost("killed")


async def test_an_answer_that_goes_on_with_another_engine_keeps_its_adapter(start, pool):
    engine, ref = Mortal(), AdapterRef("poet", 4, "/adapters/poet")
    pool._with_adapters(ref)
    async with start(engine, operator=pool) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        await eventually(lambda: server.front.placement.adapters)
        answer = (await http.post("/v1/completions", json={"model": "poet", **DOORS["/v1/completions"]})).json()
    assert answer["usage"]["completion_tokens"] == 2
    assert engine.adapters == [ref, ref]


async def test_what_runs_with_an_adapter_is_counted(http, operated):
    await load(http)
    for name in ("poet", "fake"):
        await http.post("/v1/completions", json={"model": name, **DOORS["/v1/completions"]})
    found = await metrics_of(operated)
    assert found["trinity_adapter_sequences_total", "poet", "length"] == 1
    assert found["trinity_adapter_generated_tokens_total", "poet"] == 2
    assert found["trinity_adapter_requests", "poet"] == 0
    assert found["trinity_sequences_total", "length"] == 2
    assert found["vllm:lora_requests_info", "64", "", ""] > 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"name": "a:b"}, "'a:b' is no adapter's name"),
        ({"name": "a/b"}, "'a/b' is no adapter's name"),
        ({"name": ""}, "lora_name"),
        ({"name": "fake"}, "'fake' is the base's name"),
        ({"path": "poet"}, "give an absolute path, or ORG/NAME"),
        ({"path": "../poet"}, "give an absolute path, or ORG/NAME"),
        ({"path": "/missing"}, "checkpoint folder /missing does not exist"),
        ({"load_inplace": True}, "an adapter is unloaded before another has its name"),
        ({"rank": 4}, "unknown field 'rank'"),
    ],
)
async def test_what_cannot_be_loaded_is_named_and_nothing_is(http, body, words):
    answer = await load(http, **body)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True), answer.text
    assert len((await http.get("/v1/models")).json()["data"]) == 1


async def test_another_gateways_adapters_are_heard_of_and_old_news_are_not(http, operated, pool):
    refs = (AdapterRef("poet", 1, "/a"), AdapterRef("clerk", 2, "/b"))
    pool._with_adapters(*refs)
    await eventually(lambda: operated.front.placement.adapters == refs)
    operated.front.placement._know(AdapterSet(0, ()))
    assert operated.front.placement.adapters == refs


async def test_only_operators_load(start, pool):
    async with (
        start(operator=pool, api_key="a", admin_key="b") as server,
        httpx.AsyncClient(base_url=server.url) as http,
    ):
        assert [(await load(http, key=key)).status_code for key in (None, "a", "b")] == [401, 401, 200]
    async with start() as server, httpx.AsyncClient(base_url=server.url) as http:
        answer = await load(http)
        assert (answer.status_code, "has no pool" in answer.text) == (404, True)
    pool.down = True
    async with start(operator=pool) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        body = {**DOORS["/v1/completions"], "model": "poet"}
        assert (await http.post("/v1/completions", json=body)).status_code == 503, "nobody knows which there are"
        assert (await http.post("/v1/completions", json=DOORS["/v1/completions"])).status_code == 200
        assert len((await http.get("/v1/models")).json()["data"]) == 1
