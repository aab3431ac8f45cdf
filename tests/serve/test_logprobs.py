"""Scores of prompts over HTTP: echo with logprobs, prompt_logprobs, max_tokens 0; whole and streamed."""

import json
from functools import partial

import httpx
import openai
import pytest
from fake import FakeEngine, fake_tokenizer

from serving.http.logprobs import PART, Echo, Offsets, alternatives, prompt_entries
from tests.waiting import WAIT_S
from trinity.engine.request import TokenLogprobs
from trinity.text.detokenizer import token_text

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
TEXTS = ["the lazy dog", "emoji \U0001f98a and \u00e9t\u00e9", "<|im_start|>user", "x", "\u00e9" * 40]


def body(prompt, **more):
    return {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234, "echo": True, **more}


async def asked(http, body, path=COMPLETE):
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(text):
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


def joined(chunks):
    """One choice out of a stream's chunks."""
    lists = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return text, {name: [x for part in lists if part for x in part[name]] for name in lists[-1]}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_each_token_of_prompt_and_answer_has_its_entry(http, text, as_ids, max_tokens):
    ids = fake_tokenizer().encode(text, add_special=True)
    answer = await asked(http, body(ids if as_ids else text, max_tokens=max_tokens))
    choice, usage = answer["choices"][0], answer["usage"]
    lists, num = choice["logprobs"], len(ids) + max_tokens
    assert {name: len(found) for name, found in lists.items()} == dict.fromkeys(lists, num)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), max_tokens)
    assert lists["token_logprobs"] == [None, *(-p / 2 for p in range(1, len(ids))), *[-0.5] * max_tokens]
    assert lists["top_logprobs"][0] is None
    for name, value, top in list(zip(*(lists[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True))[
        1:
    ]:
        assert top[name] >= value, "the token itself is among them"
    assert choice["text"].startswith(fake_tokenizer().decode(ids) if as_ids else text)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("as_ids", [False, True])
async def test_offsets_are_where_the_tokens_are_in_the_text(http, text, as_ids):
    """As many characters as are whole before a token; the answer repeats the prompt's tokens, specials unseen."""
    ids = fake_tokenizer().encode(text, add_special=True)
    choice = (await asked(http, body(ids if as_ids else text, max_tokens=4)))["choices"][0]
    hidden = 0 if as_ids else len("<|begin_of_text|>")

    def whole(ids, skip_special):
        return len(fake_tokenizer().decode_bytes(ids, skip_special).decode("utf-8", "ignore"))

    prompt = [max(0, whole(ids[:at], False) - hidden) for at in range(len(ids))]
    start = whole(ids, False) - hidden
    assert choice["text"][:start] == (fake_tokenizer().decode(ids) if as_ids else text)
    answer = [start + whole((ids * 4)[:at], True) for at in range(4)]
    assert choice["logprobs"]["text_offset"] == [*prompt, *answer]


@pytest.mark.parametrize("num", [PART - 1, PART, PART + 1, 3 * PART])
@pytest.mark.parametrize("more", [{}, {"max_tokens": 0}, {"prompt_logprobs": 2}, {"logprobs": 0}, {"n": 2}])
async def test_streams_say_the_same(start, num, more):
    async with start(FakeEngine(max_model_len=1024)) as server, httpx.AsyncClient(base_url=server.url) as http:
        asks = body([7 + i % 90 for i in range(num)], max_tokens=4) | more
        whole = await asked(http, asks)
        answer = await http.post(COMPLETE, json=asks | {"stream": True})
        for choice in whole["choices"]:
            chunks = [c for c in streamed(answer.text) if c["choices"][0]["index"] == choice["index"]]
            text, lists = joined(chunks)
            assert (text, lists) == (choice["text"], choice["logprobs"])
            scores = [x for c in chunks for x in c["choices"][0].get("prompt_logprobs", ())]
            assert scores == choice.get("prompt_logprobs", [])
            assert max(len(c["choices"][0]["logprobs"]["tokens"]) for c in chunks) <= PART
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_without_echo_nothing_is_said_of_the_prompt(http, server):
    for more in ({"echo": False}, {"logprobs": None}):
        asks = body("the lazy dog") | more
        choice = (await asked(http, asks))["choices"][0]
        assert len((choice["logprobs"] or {"tokens": [0]})["tokens"]) == 1
        assert "prompt_logprobs" not in choice
        assert server.engine.seen[-1].prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs_have_the_shape_of_vllm(http, server, stream):
    ids = fake_tokenizer().encode("the lazy dog", add_special=True)
    asks = {"prompt": ids, "max_tokens": 0, "prompt_logprobs": 2, "stream": stream}
    answer = await http.post(COMPLETE, json=asks)
    choice = (streamed(answer.text)[0] if stream else answer.json())["choices"][0]
    name = lambda i: token_text(fake_tokenizer(), i)  # noqa: E731
    want = [None]
    for p, token in enumerate(ids[1:], 1):
        entry = {i: {"logprob": -1.0 - i, "rank": 1 + i, "decoded_token": name(i)} for i in (0, 1)}
        entry[token] = {"logprob": -p / 2, "rank": 2, "decoded_token": name(token)}
        want.append({str(i): value for i, value in entry.items()})
    assert choice["prompt_logprobs"] == want
    assert (choice["text"], choice["logprobs"]) == ("", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_conversations_have_them_once(http, server, stream):
    asks = {"messages": [{"role": "user", "content": "jumps"}], "max_tokens": 2, "prompt_logprobs": 1, "n": 2}
    answer = await http.post(CHAT, json=asks | {"stream": stream})
    parts = streamed(answer.text) if stream else [answer.json()]
    scores = [entry for part in parts for entry in part.get("prompt_logprobs", ())]
    prompt = (await asked(http, {"messages": asks["messages"]}, "/tokenize"))["tokens"]
    assert [entry and str(token) in entry for token, entry in zip(prompt, scores, strict=True)] == [
        None,
        *[True] * (len(prompt) - 1),
    ]
    plain = await asked(http, {key: value for key, value in asks.items() if key != "prompt_logprobs"}, CHAT)
    assert "prompt_logprobs" not in plain


async def test_the_openai_client_reads_them(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        answer = await client.completions.create(**body("the lazy dog", model="fake"))
        assert answer.choices[0].logprobs.token_logprobs[:3] == [None, -0.5, -1.0]
        stream = await client.completions.create(**body("the lazy dog", model="fake", max_tokens=0), stream=True)
        assert [chunk.choices[0].text async for chunk in stream] == ["the lazy dog", ""]


async def test_nothing_generated_is_an_answer(http):
    for more, text in (({}, "the lazy dog"), ({"echo": False}, "")):
        answer = await asked(http, body("the lazy dog", max_tokens=0, logprobs=None) | more)
        assert answer["choices"][0]["text"] == text
        assert answer["usage"]["completion_tokens"] == 0
    chat = {"messages": [{"role": "user", "content": "jumps"}]}
    for name in ("max_tokens", "max_completion_tokens"):
        assert (await asked(http, chat | {name: 0}, CHAT))["usage"]["completion_tokens"] == 0


async def test_answers_about_long_prompts_count_before_they_are_made(start):
    async with (
        start(FakeEngine(max_model_len=4096), max_answer_bytes=1 << 20) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        asks = body([5] * 2000, logprobs=20)
        answer = await http.post(COMPLETE, json=asks)
        assert answer.status_code == 400
        assert "serve.max_answer_bytes is 1,048,576" in answer.json()["error"]["message"]
        for less in ({"logprobs": 2}, {"stream": True}, {"echo": False}):
            assert (await http.post(COMPLETE, json=asks | less)).status_code == 200


def test_tokens_of_one_text_are_one_key_with_the_larger_value():
    tokenizer = fake_tokenizer()
    one, other = (i for i, found in enumerate(tokenizer.token_bytes) if found in (b"\x98", b"\x99"))
    assert token_text(tokenizer, one) == token_text(tokenizer, other) == "\ufffd"
    for own in (one, other):
        position = TokenLogprobs(own, -0.1 if own == one else -3.0, ((one, -0.1), (other, -3.0)), rank=1)
        assert alternatives(partial(token_text, tokenizer), position, 2) == {"\ufffd": -0.1}
        assert len(prompt_entries(tokenizer, [None, position], 2)[1]) == 2, "by id they are two"


def test_an_echo_of_other_tokens_is_theirs():
    """What a tokenizer normalises, or a server cuts off, is not in the text that offsets count in."""
    tokenizer = fake_tokenizer()
    ids = tokenizer.encode("lazy dog")
    assert Echo.of(tokenizer, "the lazy dog", ids) == Echo("lazy dog")
    bos = tokenizer.encode("lazy dog", add_special=True)
    echo = Echo.of(tokenizer, "lazy dog", bos)
    assert echo == Echo("lazy dog", -len("<|begin_of_text|>"))
    offsets = Offsets(tokenizer, echo.start, len(echo.text))
    assert [offsets.next(i) for i in bos][:2] == [0, 0]


async def test_what_a_remote_tokenizer_asks_for(http):
    """As lm-eval's RemoteTokenizer does, to the letter."""
    info = (await http.get("/tokenizer_info")).json()
    tokenizer = fake_tokenizer()
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    assert names.items() <= info.items()
    assert info["chat_template"] == tokenizer.chat_template
    for name in names:
        ids = (await asked(http, {"prompt": info[name], "add_special_tokens": False}, "/tokenize"))["tokens"]
        assert len(ids) == 1
    ids = (await asked(http, {"prompt": "quick \U0001f98a", "add_special_tokens": False}, "/tokenize"))["tokens"]
    assert await asked(http, {"tokens": ids}, "/detokenize") == {"prompt": "quick \U0001f98a"}


async def test_models_have_what_clients_read(http):
    card = (await http.get("/v1/models")).json()["data"][0]
    assert {
        "id": "fake",
        "object": "model",
        "root": "fake",
        "parent": None,
        "max_model_len": 128,
    }.items() <= card.items()
    assert card["created"] > 1_700_000_000
