"""Large bodies are read in another process: they say the same there, and whatever becomes of it, the next one is read."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from protos.trinity.v1 import inference_pb2 as pb
from serving import bodies
from serving.grpc import messages
from serving.http import schema
from serving.http.bodies import unpack
from trinity.errors import InvalidRequest, PromptTooLong
from trinity.utils.boxes import Boxes

LONG = 1 << 20
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "\u00e9\u2028b"}]
GOOD = [
    (schema.CompletionRequest, {"prompt": "a\u0000\U0001f600 text", "echo": True, "user": "somebody"}),
    (schema.CompletionRequest, {"prompt": [1, 2, 3], "logprobs": 0, "n": 3, "seed": -(2**63)}),
    (schema.CompletionRequest, {"prompt": [[1], [2, 3]], "stream": True, "stream_options": {"include_usage": True}}),
    (schema.CompletionRequest, {"prompt": ["a", ""], "stop": "b", "temperature": 0, "top_k": -1, "min_p": None}),
    (
        schema.CompletionRequest,
        {"prompt": "a", "stop": ["b", "\u00e9"], "stop_token_ids": [5, 0], "logit_bias": {"5": -1.5}},
    ),
    (
        schema.CompletionRequest,
        {
            "prompt": "a",
            "top_p": 0.1,
            "temperature": 1.0,
            "n": 1,
            "repetition_penalty": 1.0000001,
            "version_policy": "pinned",
        },
    ),
    (
        schema.ChatRequest,
        {"messages": [{"role": "developer", "content": PARTS}, {"role": "user", "content": "a", "name": "x"}]},
    ),
    (
        schema.ChatRequest,
        {"messages": [{"role": "user", "content": []}], "logprobs": True, "top_logprobs": 3, "max_tokens": 9},
    ),
    (
        schema.CompletionRequest,
        {
            "prompt": "a",
            "bad_words": ["\u00e9"],
            "allowed_token_ids": [3],
            "best_of": 3,
            "min_tokens": 2,
            "max_tokens": 16,
        },
    ),
    (schema.TokenizeRequest, {"prompt": "a"}),
    (schema.TokenizeRequest, {"messages": [{"role": "assistant", "content": PARTS}], "add_special_tokens": False}),
    (schema.DetokenizeRequest, {"tokens": [0, 2**31 - 1], "model": "a"}),
]


def read_elsewhere(kind, body, most):
    return unpack(kind, bodies.read(kind.__name__, body, most))


@pytest.mark.parametrize(("kind", "tree"), GOOD)
def test_a_body_says_the_same_elsewhere(kind, tree):
    body = json.dumps(tree).encode()
    here, elsewhere = schema.parse(kind, body), read_elsewhere(kind, body, LONG)
    if kind is schema.DetokenizeRequest:
        elsewhere = elsewhere.model_copy(update={"tokens": list(elsewhere.tokens)})
    assert elsewhere == here.compact()
    if kind is schema.ChatRequest:
        assert [message.flat() for message in elsewhere.messages] == [message.flat() for message in here.messages]
    else:
        assert elsewhere == here or tree.get("messages")
    if kind in (schema.ChatRequest, schema.CompletionRequest):
        one, other = (each.params(5, None).model_copy(update={"seed": 5}) for each in (elsewhere, here))
        assert one == other
        assert elsewhere.sampling.model_fields_set == here.sampling.model_fields_set, "of defaults written out, too"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (schema.CompletionRequest, b"{"),
        (schema.CompletionRequest, b"[]"),
        (schema.CompletionRequest, b"[" * 100_000),
        (schema.CompletionRequest, b'{"prompt": "\xff"}'),
        (schema.CompletionRequest, b'{"prompt": "\\ud800"}'),
        (schema.CompletionRequest, b'{"prompt": []}'),
        (schema.CompletionRequest, b'{"prompt": [1, true]}'),
        (schema.CompletionRequest, b'{"prompt": "a", "temprature": 1}'),
        (schema.CompletionRequest, b'{"prompt": "a", "temperature": 1e999}'),
        (schema.ChatRequest, b'{"messages": []}'),
        (schema.ChatRequest, b'{"messages": [{"role": "user", "content": [{"type": "image"}]}], "tools": [1]}'),
        (schema.DetokenizeRequest, b'{"tokens": [-1]}'),
    ],
)
def test_a_refusal_says_the_same_elsewhere(kind, body):
    said = []
    for read in (lambda: schema.parse(kind, body).prompts(), lambda: read_elsewhere(kind, body, LONG)):
        with pytest.raises(InvalidRequest) as refused:
            read()
        said.append((refused.value.message, refused.value.param))
    assert said[0] == said[1]


def test_a_prompt_that_cannot_fit_does_not_come_back():
    body = json.dumps({"prompt": [[1] * 3, [1] * 100]}).encode()
    assert len(read_elsewhere(schema.CompletionRequest, body, 101).prompts()) == 2
    with pytest.raises(PromptTooLong, match="100 prompt tokens; this model takes 99 and one generated"):
        read_elsewhere(schema.CompletionRequest, body, 100)


GENERATE = "/trinity.v1.Inference/Generate"
SAMPLING = pb.SamplingParams(temperature=0, stop=["\u00e9"], stop_token_ids=[0], logit_bias={5: -1.5}, seed=-(2**63))
CHAT = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="\U0001f600"), pb.ChatMessage()])


@pytest.mark.parametrize(
    ("rpc", "message"),
    [
        ("Generate", pb.GenerateRequest(model="m", text="a\u0000\u00e9", sampling=SAMPLING)),
        ("Generate", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, 2**32 - 1]))),
        ("Generate", pb.GenerateRequest(chat=CHAT, sampling=pb.SamplingParams())),
        ("Generate", pb.GenerateRequest()),
        ("Tokenize", pb.TokenizeRequest(chat=CHAT)),
        ("Detokenize", pb.DetokenizeRequest(token_ids=range(1000))),
        ("ListModels", pb.ListModelsRequest()),
    ],
)
def test_a_message_says_the_same_elsewhere(rpc, message):
    path, raw, unknown = f"/trinity.v1.Inference/{rpc}", message.SerializeToString(), b"\xf8\x07\x01" * 1000
    reply = bodies.read(path, raw + unknown, LONG)
    assert messages.parse(path, reply, LONG) == messages.parse(path, raw, LONG) == message
    assert len(reply) == len(raw), "what nobody knows does not come back"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 100)), "100 prompt tokens; this model takes 99"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "the prompt is empty"),
        (pb.GenerateRequest(sampling=pb.SamplingParams(stop=[""] * 1025)), "stop has 1025 entries, at most 1024"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 1025)), "messages has 1025 entries"),
        (b"\xff" * 100, "no trinity.v1.GenerateRequest"),
    ],
)
def test_a_message_is_refused_alike_elsewhere(message, says):
    raw = message if isinstance(message, bytes) else message.SerializeToString()
    for read in (messages.parse, bodies.read):
        with pytest.raises(InvalidRequest, match=says):
            read(GENERATE, raw, 100)


@pytest.fixture
def one(monkeypatch):
    """A single process of its own; -> its pid."""
    boxes = Boxes(1, bodies._boxes().command, bodies._boxes().env)
    monkeypatch.setattr(bodies, "_boxes", lambda: boxes)
    read_elsewhere(schema.TokenizeRequest, b"{}", LONG)
    box = boxes._idle.get()
    boxes._idle.put(box)
    return box._process.pid


def test_a_process_that_was_ended_is_replaced(one):
    os.kill(one, signal.SIGKILL)
    with pytest.raises(InvalidRequest, match="takes longer than"):
        read_elsewhere(schema.TokenizeRequest, b"{}", LONG)
    assert read_elsewhere(schema.TokenizeRequest, b'{"prompt": "a"}', LONG).prompt == "a"


def test_it_has_neither_our_keys_nor_our_place_among_others(one, monkeypatch):
    words = Path(f"/proc/{one}/environ").read_bytes().split(b"\0")
    assert {word.partition(b"=")[0] for word in words if word} == {b"PYTHONPATH", b"OPENBLAS_NUM_THREADS"}
    assert os.getpriority(os.PRIO_PROCESS, one) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)


def test_many_at_once_get_each_their_own():
    def read(n):
        return read_elsewhere(schema.TokenizeRequest, json.dumps({"prompt": f"n{n}"}).encode(), LONG).prompt

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(200))) == [f"n{n}" for n in range(200)]


def test_what_would_take_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(bodies, "CPU_S", 0.5)
    monkeypatch.setattr(bodies, "_boxes", cache(bodies._boxes.__wrapped__))
    nested = b'{"prompt": ' + b'[{"a": [' * 200 + b"1" + b"]}]" * 200 + b"}"
    with pytest.raises(InvalidRequest):
        read_elsewhere(schema.CompletionRequest, nested, LONG)
    giant = b'{"prompt": [' + b"{}," * 20_000_000 + b"1]}"
    with pytest.raises(InvalidRequest, match=r"takes longer than 0.5 s to read|MiB of memory to be read"):
        read_elsewhere(schema.CompletionRequest, giant, LONG)
