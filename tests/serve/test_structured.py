"""Structured output through every door, over a random model: valid answers, the same bounds, bombs that cost nobody else."""

import asyncio
import json
import re
from contextlib import asynccontextmanager

import grpc
import httpx
import jsonschema
import openai
import pytest
from fake import fake_tokenizer

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.unit.grammar_cases import SCHEMAS, Owner, checkpoint, random_llm
from tests.waiting import WAIT_S
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.request import SamplingParams
from trinity.errors import InvalidRequest

BOMB = {"regex": r"(\w{1,1000}){1,1000}"}
COMMON = {"max_tokens": 600, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run"), fake_tokenizer())


@asynccontextmanager
async def served(start, folder):
    engine = AsyncEngine(random_llm(folder).engine)
    try:
        async with start(engine, request_timeout_s=WAIT_S) as server:
            yield server
    finally:
        engine.close()


@pytest.fixture
async def server(start, folder):
    async with served(start, folder) as found:
        yield found


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        yield client


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=WAIT_S) as found:
        yield found


def quotes():
    return {str(i): 8 for i, token in enumerate(fake_tokenizer().token_bytes) if token in (b'"', b"}", b"]")}


async def test_openai_parses_a_class(client):
    """`chat.completions.parse` sends the class's schema and reads the answer back."""
    answer = await client.beta.chat.completions.parse(
        model="fake",
        messages=[{"role": "user", "content": "who"}],
        response_format=Owner,
        logit_bias=quotes(),
        **COMMON,
    )
    [choice] = answer.choices
    assert isinstance(choice.message.parsed, Owner)
    assert choice.finish_reason == "stop"


async def test_openai_streams_an_object(client):
    stream = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "any"}],
        response_format={"type": "json_object"},
        logit_bias=quotes(),
        stream=True,
        **COMMON,
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [({"regex": "[a-c]{3}"}, "[a-c]{3}"), ({"choice": ["yes", "no"]}, "yes|no"), ({"grammar": 'start: "x" /[0-9]/'}, "x[0-9]")],
)  # fmt: skip
async def test_our_own_field(http, structured, pattern):
    for path, more in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        answer = await http.post(path, json={**COMMON, **more, "n": 3, "structured_outputs": structured})
        for choice in answer.json()["choices"]:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert re.fullmatch(pattern, text)
            assert choice["finish_reason"] == "stop"


MESSAGES = [{"role": "user", "content": "a"}]
NAMED = {"name": "n", "schema": {"type": "integer"}}


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "type is 'xml'; it can be text, json_object, json_schema"),
        ({"response_format": 5}, "response_format", "it can be text"),
        ({"response_format": {"type": "text", "a": 1}}, "response_format", "'a' is unknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "an object with a name and a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format", "name is 'None'"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "name": "a b"}}}, "response_format", "'a b'"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "name": "a" * 65}}}, "response_format", "1 to"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": 1}}}, "response_format", "is '1'"),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "x": 1}}}, "response_format", "has 'x'"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format", "two things"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "2 constraints"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "'regexp' is unknown"),
        ({"structured_outputs": BOMB}, "structured_outputs", "too many expressions"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "no text can follow it"),
        ({"structured_outputs": {"json": {"enum": ["x" * 70_000]}}}, "structured_outputs", "at most 65,536"),
        ({"guided_regex": "a"}, "guided_regex", "structured_outputs: {'regex': ...} now"),
        ({"guided_json": {}}, "guided_json", "structured_outputs: {'json': ...} now"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused(http, body, param, why, stream):
    answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": stream, **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], why in error["message"]) == (param, True), error


async def test_the_neutral_format_is_no_constraint(http):
    body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}
    for form in (None, {"type": "text"}):
        answer = await http.post("/v1/completions", json={**body, "response_format": form})
        assert answer.json()["usage"]["completion_tokens"] == 3


async def test_a_large_body_says_the_same(http):
    """It is read in another process, and comes back shorter."""
    schema = SCHEMAS["numbers"]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"prompt": "a", "metadata": {"x": "y" * (1 << 17)}, "response_format": form, **COMMON}
    answer = (await http.post("/v1/completions", json=body)).json()
    jsonschema.validate(json.loads(answer["choices"][0]["text"]), schema)


async def test_grpc_takes_every_kind(server):
    kinds = {
        "json_schema": (json.dumps(SCHEMAS["numbers"]), lambda text: jsonschema.validate(json.loads(text), SCHEMAS["numbers"])),
        "regex": ("[a-c]{3}", lambda text: re.fullmatch("[a-c]{3}", text) or pytest.fail(text)),
        "choice": (pb.Choice(texts=["yes", "no"]), lambda text: text in ("yes", "no") or pytest.fail(text)),
        "grammar": ('start: "x" /[0-9]/', lambda text: re.fullmatch("x[0-9]", text) or pytest.fail(text)),
        "json_object": (True, lambda text: json.loads(text)),
    }  # fmt: skip
    assert kinds.keys() == {field.name for field in pb.StructuredOutput.DESCRIPTOR.oneofs_by_name["constraint"].fields}
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        for kind, (value, check) in kinds.items():
            text = await generated(rpc.InferenceStub(channel), pb.StructuredOutput(**{kind: value}))
            check(text)
        compact = pb.StructuredOutput(json_schema='{"type":"array"}', disable_any_whitespace=True)
        assert not re.search(r"\s", re.sub(r'"[^"]*"', "", await generated(rpc.InferenceStub(channel), compact)))


async def generated(stub, structured):
    bias = {int(key): value for key, value in quotes().items()}
    sampling = pb.SamplingParams(structured_outputs=structured, logit_bias=bias, **COMMON)
    responses = [each async for each in stub.Generate(pb.GenerateRequest(text="a", sampling=sampling))]
    assert responses[-1].final.finish_reason == pb.FINISH_REASON_STOP
    return "".join(each.delta.text for each in responses)


async def test_every_door_refuses_in_the_same_words(server, http, folder):
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generated(rpc.InferenceStub(channel), pb.StructuredOutput(**BOMB))
        with pytest.raises(grpc.aio.AioRpcError) as empty:
            await generated(rpc.InferenceStub(channel), pb.StructuredOutput())
    assert caught.value.code() == empty.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    answer = await http.post("/v1/completions", json={"prompt": "a", "structured_outputs": BOMB})
    with pytest.raises(InvalidRequest) as offline:
        random_llm(folder).generate("a", SamplingParams(structured_outputs=BOMB))
    assert caught.value.details() == answer.json()["error"]["message"] == offline.value.message


async def test_bombs_beside_a_stream(server, http):
    """Twenty different ones are refused while a stream runs, which then is as it is alone."""
    plain = {"prompt": "the lazy dog", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    alone = (await http.post("/v1/completions", json=plain)).json()["choices"]

    async def bomb(i):
        regex = rf"(\w{{1,1000}}){{1,{900 + i}}}"
        return (
            await http.post("/v1/completions", json={"prompt": "a", "structured_outputs": {"regex": regex}})
        ).status_code

    beside, *codes = await asyncio.gather(http.post("/v1/completions", json=plain), *map(bomb, range(20)))
    assert codes == [400] * 20
    assert beside.json()["choices"] == alone
    assert server.front.admission.active == 0
