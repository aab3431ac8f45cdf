"""Clients that misbehave, one function each: none may cost the server more than the time it takes to refuse it."""

import asyncio
import json
import random
from contextlib import suppress
from typing import NamedTuple

import grpc
import httpx

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc

COMPLETE = "/v1/completions"
STAY_S = 2.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, RST, CONTINUATION = 0x4, 0x1, 0x3, 0x9
BROKEN = (OSError, EOFError, TimeoutError, httpx.HTTPError, grpc.aio.AioRpcError, asyncio.IncompleteReadError)


class Target(NamedTuple):
    url: str
    grpc_address: str

    @property
    def http_port(self) -> tuple[str, int]:
        return httpx.URL(self.url).host, httpx.URL(self.url).port

    @property
    def grpc_port(self) -> tuple[str, int]:
        host, _, port = self.grpc_address.rpartition(":")
        return host, int(port)


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


async def say(address, data, stay_s=0.0):
    """Connect, send that, stay for a while, leave."""
    _, writer = await asyncio.open_connection(*address)
    try:
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(stay_s)
    finally:
        writer.close()


async def post(target, body, path=COMPLETE, **headers):
    async with httpx.AsyncClient(base_url=target.url, timeout=60) as http:
        return await http.post(path, content=body, headers={"content-type": "application/json", **headers})


async def leaves_in_mid_stream(target, rng):
    body = {"prompt": "a text that goes on", "max_tokens": 64, "stream": True, "ignore_eos": True}
    async with (
        httpx.AsyncClient(base_url=target.url, timeout=60) as http,
        http.stream("POST", COMPLETE, json=body) as answer,
    ):
        async for _ in answer.aiter_lines():
            if rng.random() < 0.3:
                return


async def cancels_over_grpc(target, rng):
    async with grpc.aio.insecure_channel(target.grpc_address) as channel:
        asked = pb.GenerateRequest(text="a text", sampling=pb.SamplingParams(max_tokens=64, ignore_eos=True))
        call = rpc.InferenceStub(channel).Generate(asked)
        await call.read()
        call.cancel()


async def sends_a_giant(target, rng):
    kind = rng.choice(["ids", "objects", "texts"])
    prompt = {"ids": [1] * 300_000 + ["x"], "objects": [{}] * 300_000, "texts": ["a"] * 100_000}[kind]
    await post(target, json.dumps({"prompt": prompt}))


async def asks_for_too_much(target, rng):
    await post(target, json.dumps({"prompt": [[5]] * 64, "n": 16, "max_tokens": 1 << 20, "logprobs": 5}))


async def sends_no_json(target, rng):
    await post(target, rng.randbytes(rng.randrange(1, 70_000)))


async def asks_what_is_not_there(target, rng):
    await post(target, "{}", path=rng.choice(["/v1/nothing", "/../etc/passwd", "/v1/models/" + "a" * 3000]))


async def sends_two_lengths(target, rng):
    head = f"POST {COMPLETE} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
    await say(target.http_port, head.encode() + b"0\r\n\r\n")


async def says_nothing(target, rng):
    await say(rng.choice([target.http_port, target.grpc_port]), b"", STAY_S)


async def says_a_little(target, rng):
    await say(target.http_port, f"POST {COMPLETE} HTTP/1.1\r\nhost: x".encode(), STAY_S)


async def says_only_a_preface(target, rng):
    await say(target.grpc_port, PREFACE, STAY_S)


async def resets_at_once(target, rng):
    """HTTP/2 rapid reset."""
    head = bytes([0x83, 0x86, 0x84, 0x01, 0x01]) + b"x"  # POST, http, /, an authority
    streams = (frame(HEADERS, 0x4, n, head) + frame(RST, 0, n, (8).to_bytes(4, "big")) for n in range(1, 1001, 2))
    await say(target.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + b"".join(streams))


async def never_ends_its_head(target, rng):
    """A CONTINUATION flood."""
    flood = frame(HEADERS, 0, 1, b"\x83") + frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 2000) * 20
    await say(target.grpc_port, PREFACE + frame(SETTINGS, 0, 0) + flood)


async def sends_noise(target, rng):
    await say(rng.choice([target.http_port, target.grpc_port]), rng.randbytes(rng.randrange(1, 5000)))


UNRULY = (
    leaves_in_mid_stream, cancels_over_grpc, sends_a_giant, asks_for_too_much, sends_no_json, asks_what_is_not_there,
    sends_two_lengths, says_nothing, says_a_little, says_only_a_preface, resets_at_once, never_ends_its_head, sends_noise,
)  # fmt: skip


async def misbehave(target: Target, rng: random.Random, counts) -> None:
    """One of them, once. What the server does about it is its affair, so long as it does something."""
    client = rng.choice(UNRULY)
    counts[client.__name__] += 1
    with suppress(*BROKEN):
        async with asyncio.timeout(60):
            await client(target, rng)
