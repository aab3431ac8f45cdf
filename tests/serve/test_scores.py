"""Multiple choice over HTTP as lm-eval's `local-completions` plays it, request for request, against transformers offline.

The harness itself is run by tests/interop/test_lm_eval.py, where it is installed.
"""

from argparse import Namespace

import httpx
import pytest
from scored import CONTEXTS, ENDINGS, MIN_RIGHT, NAME, learned, offline, served

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc
from tests.waiting import WAIT_S
from trinity import LLM
from trinity.commands import eval as command
from trinity.engine.request import SamplingParams
from trinity.errors import ConfigError, ModelNotFound, Unavailable

ASKS = {"model": NAME, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def right(checkpoint):
    return offline(checkpoint)


async def encoded(http, text):
    answer = await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
    return answer.json()["tokens"]


async def pairs(http):
    """Ids of each context with each ending, cut where the context alone ends."""
    found = []
    for context in CONTEXTS:
        head = await encoded(http, context)
        for ending in ENDINGS:
            whole = await encoded(http, context + ending)
            assert whole[: len(head)] == head
            found.append((head, whole[len(head) :]))
    return found


def read(choice, num_context):
    """What the harness reads: the sum over the ending, and whether each of its values is the largest at its place."""
    values = choice["logprobs"]["token_logprobs"][num_context:-1]
    tops = choice["logprobs"]["top_logprobs"][num_context:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


@pytest.mark.parametrize("batch_size", [1, 8])
async def test_multiple_choice_over_http_is_what_it_is_offline(checkpoint, right, batch_size):
    got, wanted = [], []
    async with served(checkpoint) as gateway, httpx.AsyncClient(base_url=gateway.addresses[0], timeout=WAIT_S) as http:
        for start in range(0, len(asked := await pairs(http)), batch_size):
            batch = asked[start : start + batch_size]
            answer = await http.post("/v1/completions", json=ASKS | {"prompt": [c + e for c, e in batch]})
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            got += [read(choice, len(context)) for choice, (context, _) in zip(choices, batch, strict=True)]
            wanted += [right(*pair) for pair in batch]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in got} == {True, False}, "both kinds are there to be told apart"
    best = [max(range(8), key=lambda e, at=at: got[8 * at + e][0]) for at in range(8)]
    assert sum(at == e for at, e in enumerate(best)) >= MIN_RIGHT, "well above chance, which is one"


async def test_all_doors_give_the_same_numbers(checkpoint, right):
    """HTTP, gRPC and Python, and what was generated has the same value as the same token in a prompt."""
    import grpc

    llm = LLM(checkpoint, backend="torch", device="cpu")
    ids = llm.tokenizer.encode("the rose is pink. the coal is black")
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3, logprobs=3)
    here = llm.generate([ids], params)[0]
    async with served(checkpoint) as gateway:
        url, address = gateway.addresses
        async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as http:
            asks = {"prompt": ids, "max_tokens": 0, "prompt_logprobs": 3}
            over_http = (await http.post("/v1/completions", json=asks)).json()["choices"][0]["prompt_logprobs"]
        async with grpc.aio.insecure_channel(address) as channel:
            asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=0))
            asked.sampling.prompt_logprobs = 3
            events = [event async for event in rpc.InferenceStub(channel).Generate(asked)]
    over_grpc = [position for event in events for position in event.delta.prompt_logprobs]
    assert here.prompt_logprobs[0] is over_http[0] is None
    for at, position in enumerate(here.prompt_logprobs[1:], 1):
        entry = over_http[at][str(ids[at])]
        assert entry["rank"] == position.rank == over_grpc[at - 1].rank
        values = (position.logprob, entry["logprob"], over_grpc[at - 1].logprob)
        assert values == pytest.approx([right(ids[:at], [ids[at]])[0]] * 3, abs=1e-4)
    again = llm.generate([[*ids, *here.token_ids]], params)[0].prompt_logprobs[len(ids) :]
    assert [p.logprob for p in again] == pytest.approx([p.logprob for p in here.logprobs], abs=1e-4)


def test_a_checkpoint_to_evaluate_gets_a_server_for_as_long(checkpoint):
    asked = Namespace(model=None, chat=False)
    with command.server_of(str(checkpoint)) as url:
        model, found = command.asked_of(url, asked, None)
        assert (model, found["base_url"], found["model"]) == (
            "local-completions",
            f"{url}/v1/completions",
            checkpoint.name,
        )
        assert found["max_length"] == httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"]
        assert found["custom_prefix_token_id"] == 0, "which lm-eval itself would take for none"
        model, found = command.asked_of(url, Namespace(model=None, chat=True), "secret")
        assert (model, found["base_url"]) == ("local-chat-completions", f"{url}/v1/chat/completions")
        assert found["header"] == {"Authorization": "Bearer secret"}
        with pytest.raises(ModelNotFound, match=checkpoint.name):
            command.asked_of(url, Namespace(model="another", chat=False), None)
    with pytest.raises(Unavailable, match="trinity serve"):
        command.card_of(url, None, None)


def test_without_lm_eval_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'trinity-moe\[eval\]'"):
        command.run(Namespace(tasks="niah,arc_easy", rewards=None, prompts=None), [])
