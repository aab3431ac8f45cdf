"""Giants over gRPC: a message of megabytes holds millions of fields, and costs little more than its own parsing.

The measure is what this machine needs to parse and build the same message once, as in test_giants.py.
"""

import time

import grpc
import pytest

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.serve.test_giants import standstill

MOST_READS, FEWEST_S = 20, 0.005
EMPTY = pb.ChatMessage(role=pb.ROLE_USER)


def generate(**sampling):
    return pb.GenerateRequest(text="a", sampling=pb.SamplingParams(**sampling))


def chat(*messages):
    return {"chat": pb.Chat(messages=messages)}


GIANTS = {  # -> rpc, request, what is said of it
    "messages": ("Generate", pb.GenerateRequest(**chat(*[EMPTY] * 500_000)), "500000 messages in a chat, at most 1024"),
    "the last message wrong": (
        "Generate",
        pb.GenerateRequest(**chat(*[EMPTY] * 500_000, pb.ChatMessage(role=9))),
        "500001 messages in a chat",
    ),
    "messages to be counted": ("Tokenize", pb.TokenizeRequest(**chat(*[EMPTY] * 500_000)), "500000 messages"),
    "ids": ("Generate", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2_000_000)), "2000000 prompt tokens"),
    "ids to be read": ("Detokenize", pb.DetokenizeRequest(token_ids=[5] * 400_000), ""),
    "stop strings": ("Generate", generate(stop=[""] * 1_000_000), "stop has 1000000 entries, at most 1024"),
    "stop ids": ("Generate", generate(stop_token_ids=[1] * 2_000_000), "stop_token_ids has 2000000 entries"),
    "biases": ("Generate", generate(logit_bias=dict.fromkeys(range(150_000), 1.0)), "logit_bias has 150000 entries"),
    "a stop string": ("Generate", generate(stop=["x" * 2_000_000]), "a stop string has 2000000 characters"),
}


@pytest.mark.parametrize("name", GIANTS)
async def test_a_giant_message_stalls_nobody(server, name):
    verb, request, says = GIANTS[name]
    began_s = time.process_time()
    type(request).FromString(request.SerializeToString())
    once_s = max(time.process_time() - began_s, FEWEST_S)
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub, code, said = rpc.InferenceStub(channel), grpc.StatusCode.OK, ""
        await stub.ListModels(pb.ListModelsRequest())
        async with standstill() as longest:
            try:
                answer = getattr(stub, verb)(request)
                await (answer.read() if verb == "Generate" else answer)
            except grpc.aio.AioRpcError as error:
                code, said = error.code(), error.details()
    assert code is (grpc.StatusCode.INVALID_ARGUMENT if says else grpc.StatusCode.OK), said
    assert says in said
    assert longest[0] < MOST_READS * once_s, f"{longest[0]:.3f} s, {longest[0] / once_s:.0f} times reading it"
