"""Tokens of every kind on the page at /: hostile ones, parts of characters, reasoning, calls, and thousands of them."""

import asyncio
import copy
import json

from browser import needs_chromium
from chat_page import STORY, say, set_field, show, tokens
from fake import fake_tokenizer
from telling import TellingEngine

HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp;\u202e<|im_start|>"


@needs_chromium
async def test_text_of_a_model_stays_text_and_nobody_else_is_asked(start, browser, pool):
    async with start(TellingEngine(HOSTILE), operator=pool) as server:
        await asyncio.to_thread(show, browser, server.url)
        await asyncio.to_thread(say, browser, HOSTILE)
        shown = await asyncio.to_thread(tokens, browser)
        assert "".join(shown) == HOSTILE + "<|im_end|>"
        assert HOSTILE in await asyncio.to_thread(browser.value, "document.querySelector('.user p').textContent")
        await asyncio.to_thread(browser.click, f"document.querySelectorAll('.t')[{shown.index(chr(0x202E))}]")
        assert await asyncio.to_thread(browser.text, "token-text") == "⟨202E⟩"
        assert "--serve.routed_experts true" in await asyncio.to_thread(browser.text, "no-experts")
        assert (
            await asyncio.to_thread(browser.value, "document.images.length + document.querySelectorAll('b').length")
            == 1
        )
        assert browser.complaints() == []
        urls = {url for url in browser.requested() if not url.startswith(("data:", "about:"))}
        assert urls == {f"{server.url}/", f"{server.url}/page/data", f"{server.url}/v1/chat/completions"}


@needs_chromium
async def test_parts_of_characters_ends_of_lines_and_special_tokens_can_be_told_apart(chatting, telling):
    await asyncio.to_thread(say, chatting)
    shown = await asyncio.to_thread(tokens, chatting)
    table = fake_tokenizer().token_bytes
    at = shown.index("😀")
    assert shown[at - 3 : at] == ["", "", ""]
    assert b"".join(table[i] for i in telling.script[at - 3 : at + 1]) == "😀".encode()
    about = "[one.classList.contains('bare'), one.classList.contains('special'), one.offsetWidth > 0]"
    kinds = await asyncio.to_thread(chatting.value, f"[...document.querySelectorAll('.t')].map((one) => {about})")
    assert [bare for bare, _, _ in kinds] == [text in ("", "\u200b") for text in shown]
    assert [special for _, special, _ in kinds] == [i in fake_tokenizer().special_ids for i in telling.script]
    assert [text for text, (_, _, is_wide) in zip(shown, kinds, strict=True) if not is_wide] == [], (
        "each can be pointed at"
    )


@needs_chromium
async def test_a_model_without_a_template_continues_the_text(start, telling, browser):
    async with start(telling, routed_experts=True) as server:
        server.front.tokenizer = copy.copy(fake_tokenizer())
        server.front.tokenizer.chat_template = None
        await asyncio.to_thread(show, browser, server.url)
        assert "no chat template" in await asyncio.to_thread(browser.text, "how")
        await asyncio.to_thread(say, browser, "Once upon")
        assert "".join(await asyncio.to_thread(tokens, browser)) == STORY + "<|im_end|>"
        await asyncio.to_thread(browser.click, "document.querySelectorAll('.t')[3]")
        assert await asyncio.to_thread(browser.text, "token-id") == str(telling.script[3])
        assert await asyncio.to_thread(browser.value, "document.querySelectorAll('#experts tr').length") == 3
        await asyncio.to_thread(say, browser, " and then")
        assert fake_tokenizer().decode(telling.prompts[1], skip_special=True) == f"Once upon{STORY} and then"
        assert browser.complaints() == []


# A server's stream with reasoning and a call, in place of what fetch would bring. `%s` are chunks, as JSON.
STREAM = """(() => {
  const fetched = window.fetch;
  window.asked = [];
  window.fetch = async (path, options) => {
    if (!path.startsWith("v1/")) return fetched(path, options);
    window.asked.push(JSON.parse(options.body));
    return new Response(%s.map((one) => `data: ${JSON.stringify(one)}\\n\\n`).join("") + "data: [DONE]\\n\\n");
  };
})()"""


def chunk(delta, token=None, **more):
    told = token and {"content": [{"token": token, "bytes": list(token.encode()), "logprob": -0.1, "top_logprobs": []}]}
    return {"choices": [{"index": 0, "delta": delta, "logprobs": told, "weights_version": 3, **more}]}


def both(text):
    return {"reasoning": text, "reasoning_content": text}


@needs_chromium
async def test_reasoning_and_calls_are_parts_of_their_own(chatting, tmp_path):
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({}, "<think>"),
        chunk(both("Rain"), "Rain"),
        chunk(both("?"), "?"),
        chunk({}, "</think>"),
        chunk({"content": "I look."}, "I look."),
        chunk({"tool_calls": [call]}, "<tool_call>"),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]}, '{"city": '),
        chunk(
            {"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]}, '"Rome"}', finish_reason="tool_calls"
        ),
    ]
    await asyncio.to_thread(chatting.value, STREAM % json.dumps(chunks))
    assert await asyncio.to_thread(say, chatting) == "8 tokens; ended by a call"
    await asyncio.to_thread(chatting.screenshot, tmp_path / "parts.png")
    shown = "['.reasoning', '.tokens > .text', '.call pre', '.call summary']"
    texts = f"{shown}.map((one) => document.querySelector(one).textContent)"
    assert await asyncio.to_thread(chatting.value, texts) == [
        *("Reasoning<think>Rain?</think>", "I look.", '{"city": "Rome"}', "Calls get_weather")
    ]
    await asyncio.to_thread(say, chatting, "And?")
    sent = await asyncio.to_thread(chatting.value, "window.asked[1].messages[1]")
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    assert sent == {"role": "assistant", "content": "I look.", "reasoning": "Rain?", "tool_calls": calls}
    await asyncio.to_thread(chatting.value, "document.querySelector('.reasoning').open = false")
    await asyncio.to_thread(chatting.value, "document.querySelector('.tokens').focus()")
    await asyncio.to_thread(chatting.press, "ArrowRight")
    assert await asyncio.to_thread(chatting.value, "document.querySelector('.reasoning').open") is True


@needs_chromium
async def test_thousands_of_tokens_stay_quick(start, browser):
    engine = TellingEngine("the quick brown fox jumps over the lazy dog; 0123456789 " * 150)
    async with start(engine, routed_experts=True) as server:
        await asyncio.to_thread(show, browser, server.url)
        await asyncio.to_thread(set_field, browser, "max_tokens", "100000")
        await asyncio.to_thread(say, browser)
        assert len(await asyncio.to_thread(tokens, browser)) == len(engine.script) > 5000
        choose = """(() => {
          const start = performance.now(), spans = document.querySelectorAll(".t");
          for (let i = 0; i < 10; i++) spans[500 * i].click();
          document.body.offsetHeight;
          return performance.now() - start;
        })()"""
        assert await asyncio.to_thread(browser.value, choose) < 3000
        assert browser.complaints() == []


@needs_chromium
async def test_what_this_server_says_of_reasoning_and_calls_is_shown(start, browser):
    """The same over the server's own stream, whose tokens lie where its parser puts their text."""
    engine = TellingEngine("<think>\nthe lazy dog</think>\n\nthe quick brown fox")
    async with start(engine, reasoning_format="think") as server:
        await asyncio.to_thread(show, browser, server.url)
        assert "ended by its own end" in await asyncio.to_thread(say, browser)
        assert await asyncio.to_thread(browser.value, "document.querySelectorAll('.t').length") == len(engine.script)
        parts = "['.reasoning .text', '.tokens > .text'].map((one) => document.querySelector(one).textContent)"
        thought, said = await asyncio.to_thread(browser.value, parts)
        assert thought.startswith("<think>\nthe lazy dog")
        assert "the quick brown fox" in said
        assert "lazy" not in said
        await asyncio.to_thread(say, browser, "And?")
        assert "the lazy dog" not in await asyncio.to_thread(
            browser.value, "document.querySelector('.tokens > .text').textContent"
        )
        assert browser.complaints() == []
