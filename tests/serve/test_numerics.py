"""An answer says what it was computed in, by every door; where nobody can have it again, it says that, too."""

import grpc
import httpx
import pytest

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.waiting import WAIT_S
from trinity.config import EngineConfig, preset
from trinity.engine.numerics import Numerics

TINY = preset("tiny")
USER = [{"role": "user", "content": "the lazy dog"}]
DOORS = {
    "/v1/completions": {"prompt": "the lazy dog", "max_tokens": 6},
    "/v1/chat/completions": {"messages": USER, "max_tokens": 6},
    "/v1/responses": {"input": "the lazy dog", "max_output_tokens": 6},
    "/v1/messages": {"messages": USER, "max_tokens": 6},
}
SEEDED = {"seed": 3, "temperature": 0.7, "version_policy": "pinned"}  # what else would come again


def numerics(*formats, model=TINY, device="cpu", **settings):
    return Numerics.of(model, EngineConfig(**settings), device, formats)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Numerics(), "weights-12"),
        (numerics("float32"), "weights-12-float32"),
        (numerics("int8"), "weights-12-float32-experts.int8"),
        (numerics("float32", "int8"), "weights-12-float32-experts.float32+int8"),
        (numerics("nvfp4", kv_cache_dtype="int8"), "weights-12-float32-experts.nvfp4-cache.int8"),
        (numerics("float32", weight_dtype="int8"), "weights-12-float32-backbone.int8"),
        (numerics("float32", device="cuda"), "weights-12-float32-cuda"),
        (numerics("float32", model=TINY.model_copy(update={"batch_invariant": False})), "weights-12-float32-inexact"),
    ],
)
def test_a_fingerprint_names_all_that_changes_bits(found, words):
    assert found.fingerprint(12) == words
    assert found.told == ({"weights_formats": ["float32", "int8"], "reproducible": False} if "+" in words else {})


@pytest.mark.parametrize("formats", [("int8",), ("float32", "int8")])
async def test_every_door_says_which_formats_may_have_computed_an_answer(start, formats):
    own, is_mixed = numerics(*formats), len(formats) > 1
    fingerprint, told = f"weights-12-float32-experts.{'+'.join(formats)}", dict(own.told)
    async with start(numerics=own) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        for route, body in DOORS.items():
            more = SEEDED if route.endswith("completions") else {}
            answer = (await http.post(route, json={**body, **more})).raise_for_status().json()
            assert {name: answer[name] for name in told} == told, route
            assert ("reproducible" in answer) == is_mixed
            if more:
                assert answer["system_fingerprint"] == fingerprint
        stream = await http.post("/v1/completions", json={**DOORS["/v1/completions"], "stream": True})
        assert stream.text.count('"reproducible":false') == (stream.text.count("data: {") if is_mixed else 0)
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            sampling = pb.SamplingParams(max_tokens=6, seed=3)
            found = [
                r async for r in rpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="dog", sampling=sampling))
            ]
    final = found[-1].final
    assert final.system_fingerprint == fingerprint
    assert (list(final.weights_formats), final.is_not_reproducible) == (list(formats) if is_mixed else [], is_mixed)
