"""Giants over gRPC: a message of megabytes holds millions of others, and none of it is read where the streams are.

The measure is what this machine needs to parse the same message once, as in test_giants.py.
"""

import time

import grpc
import pytest

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.serve.standstill import FEWEST_S, least_standstill

EMPTY = pb.ChatMessage(role=pb.ROLE_USER)


def generate(**sampling):
    return pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**sampling))


def chat(*messages):
    return {"chat": pb.Chat(messages=messages)}


def ask(**fields):
    return pb.GenerateRequest(chat=pb.Chat(messages=[EMPTY], **fields))


GIANTS = {  # -> rpc, what makes the request, what is said of it
    "messages": (
        "Generate",
        lambda: pb.GenerateRequest(**chat(*[EMPTY] * 500_000)),
        "messages has 500000 entries, at most 1024",
    ),
    "the last message wrong": (
        "Generate",
        lambda: pb.GenerateRequest(**chat(*[EMPTY] * 500_000, pb.ChatMessage(role=9))),
        "messages has 500001 entries",
    ),
    "messages to be counted": (
        "Tokenize",
        lambda: pb.TokenizeRequest(**chat(*[EMPTY] * 500_000)),
        "messages has 500000 entries",
    ),
    "ids": (
        "Generate",
        lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2_000_000)),
        "2000000 prompt tokens",
    ),
    "ids to be read": ("Detokenize", lambda: pb.DetokenizeRequest(token_ids=[5] * 400_000), ""),
    "ids of too long a text": (
        "Detokenize",
        lambda: pb.DetokenizeRequest(token_ids=[0] * 1_900_000),
        "over 4,000,000 bytes",
    ),
    "tools": ("Generate", lambda: ask(tools=[pb.Tool()] * 500_000), "tools has 500000 entries, at most 256"),
    "calls": (
        "Generate",
        lambda: pb.GenerateRequest(**chat(*[pb.ChatMessage(role=3, tool_calls=[pb.ToolCall(name="f")] * 400)] * 900)),
        "tool_calls has 360000 entries, at most 1024",
    ),
    "a schema": (
        "Generate",
        lambda: ask(tools=[pb.Tool(name="f", parameters_json=f'{{"a":[{"[]," * 600_000}1]}}')]),
        "parameters_json has 1,800,009 characters",
    ),
    "documents": (
        "Tokenize",
        lambda: pb.TokenizeRequest(chat=ask(documents_json=["{}"] * 400_000).chat),
        "documents_json has",
    ),
    "a document": ("Generate", lambda: ask(documents_json=["x" * 1_900_000]), "arguments has 1,900,000 characters"),
    "stop strings": ("Generate", lambda: generate(stop=[""] * 1_000_000), "stop has 1000000 entries, at most 1024"),
    "stop ids": ("Generate", lambda: generate(stop_token_ids=[1] * 2_000_000), "stop_token_ids has 2000000 entries"),
    "biases": (
        "Generate",
        lambda: generate(logit_bias=dict.fromkeys(range(150_000), 1.0)),
        "logit_bias has 150000 entries",
    ),
    "a stop string": ("Generate", lambda: generate(stop=["x" * 2_000_000]), "a stop string has 2000000 characters"),
}


@pytest.mark.parametrize("name", GIANTS)
async def test_a_giant_message_stalls_nobody(server, name):
    verb, make, says = GIANTS[name]
    request = make()
    raw = request.SerializeToString()
    began_s = time.process_time()
    type(request).FromString(raw)
    once_s = max(time.process_time() - began_s, FEWEST_S)
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        await rpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
        path, is_stream = f"/trinity.v1.Inference/{verb}", verb == "Generate"
        call = channel.unary_stream(path) if is_stream else channel.unary_unary(path)

        async def ask():
            try:
                await (call(raw).read() if is_stream else call(raw))
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details()
            return grpc.StatusCode.OK, ""

        most = 3 if verb == "Detokenize" else 1  # its ids are to come back from where they were read
        (code, said), stall_s = await least_standstill(ask, most * once_s)
    assert code is (grpc.StatusCode.INVALID_ARGUMENT if says else grpc.StatusCode.OK), said
    assert says in said
    assert stall_s < most * once_s, f"{stall_s:.3f} s, {stall_s / once_s:.1f} times reading it"


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_message_is_as_large_as_what_it_unpacks_to(server, compression):
    raw = pb.GenerateRequest(text="a" * (16 << 20)).SerializeToString()
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(server.grpc_address, options, compression) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"[Dd]ecompressed message larger than max") as refused:
            await channel.unary_stream("/trinity.v1.Inference/Generate")(raw).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        small = pb.TokenizeRequest(text="a" * 1000)
        assert (await rpc.InferenceStub(channel).Tokenize(small)).token_ids
