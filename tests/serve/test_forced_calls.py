"""Calls that have to be made, of a random model: its grammar sees to them, through both doors."""

import json

import grpc
import httpx
import jsonschema
import pytest
from fake import fake_tokenizer

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.unit.grammar_cases import checkpoint, random_llm
from tests.waiting import WAIT_S
from trinity.engine.async_engine import AsyncEngine

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
LIGHT = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
TOOLS = {"weather": WEATHER, "light": LIGHT}
BODY = {
    "messages": [{"role": "user", "content": "do something"}],
    "tools": [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in TOOLS.items()],
    "max_tokens": 400,
    "seed": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run"), fake_tokenizer())


@pytest.fixture
async def server(start, folder):
    engine = AsyncEngine(random_llm(folder).engine)
    async with start(engine, request_timeout_s=WAIT_S) as found:
        yield found
    engine.close()


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        yield client


def checked(calls):
    for call in calls:
        jsonschema.validate(json.loads(call["arguments"]), TOOLS[call["name"]])
    return [call["name"] for call in calls]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "light"}}])
@pytest.mark.parametrize("parallel", [True, False])
async def test_over_http(http, choice, parallel):
    body = {**BODY, "tool_choice": choice, "parallel_tool_calls": parallel, "n": 3}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    for each in answer.json()["choices"]:
        calls = [call["function"] for call in each["message"]["tool_calls"]]
        called = checked(calls[:-1] if each["finish_reason"] == "length" else calls)
        assert called == ["light"] if isinstance(choice, dict) else parallel or len(called) == 1
        assert each["finish_reason"] in ("length", "stop" if isinstance(choice, dict) else "tool_calls")
        assert each["message"]["content"] in (None, "")


async def test_over_grpc(server):
    tools = [pb.Tool(name=name, parameters_json=json.dumps(schema)) for name, schema in TOOLS.items()]
    said = [pb.ChatMessage(role=pb.ROLE_USER, content="do something")]
    chat = pb.Chat(messages=said, tools=tools, tool_choice="required", parallel_tool_calls=False)
    sampling = pb.SamplingParams(max_tokens=400, seed=5)
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        stream = rpc.InferenceStub(channel).Generate(pb.GenerateRequest(chat=chat, sampling=sampling))
        events = [event async for event in stream]
    pieces = [piece for event in events for piece in event.delta.tool_calls]
    call = {"name": "".join(p.name for p in pieces), "arguments": "".join(p.arguments for p in pieces)}
    assert len(checked([call])) == 1
    assert events[-1].final.finish_reason == pb.FINISH_REASON_TOOL_CALLS


SAID = {
    "type": "object",
    "properties": {"answer": {"enum": [1, 2]}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("likely", ["{", "<tool_call>"])
async def test_calls_or_an_answer_in_json(http, strict, likely):
    """As agents with a type of output send it."""
    tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in BODY["tools"]]
    shape = {"type": "json_schema", "json_schema": {"name": "said", "schema": SAID}}
    more = {"response_format": shape, "parallel_tool_calls": False, "tools": tools}
    more |= {"logit_bias": {str(fake_tokenizer().id_of(likely)): 100.0}}
    answer = await http.post("/v1/chat/completions", json=BODY | more)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    assert ("tool_calls" in message) == (likely == "<tool_call>")
    if likely == "{":
        jsonschema.validate(json.loads(message["content"]), SAID)
    elif strict:
        assert len(checked([call["function"] for call in message["tool_calls"]])) == 1


async def test_a_call_and_a_format_are_two_things(http):
    more = {"tool_choice": "required", "response_format": {"type": "json_object"}}
    answer = await http.post("/v1/chat/completions", json=BODY | more)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tool_choice"


async def test_a_format_without_a_grammar_is_said(start, folder):
    engine = AsyncEngine(random_llm(folder).engine)
    async with (
        start(engine, request_timeout_s=WAIT_S, tool_format="glm") as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        answer = await http.post("/v1/chat/completions", json=BODY | {"tool_choice": "required"})
    engine.close()
    assert answer.status_code == 400
    assert "written in glm" in answer.json()["error"]["message"]
