"""The page at / to try a model, in a headless Chromium, over an engine that tells something else of each token.

Screenshots, light and dark, wide and narrow, are left in the test's folder: `pytest --basetemp=FOLDER` keeps them.
"""

import asyncio
import base64
import io
import math
import re

import httpx
import numpy as np
import pytest
from browser import needs_chromium
from chat_page import STORY, end, say, set_field, show, tokens
from fake import fake_tokenizer
from telling import TellingEngine

from tests.waiting import WAIT_S, eventually
from trinity.engine.defaults import SamplingDefaults
from trinity.engine.request import SamplingParams

KEY = "clients-key"


# --- without a browser ---


async def test_the_data_say_what_the_model_is_to_who_has_the_key(start):
    defaults = SamplingDefaults(SamplingParams(temperature=0.15, top_k=50))
    engine = TellingEngine(defaults=defaults)
    async with (
        start(engine, api_key=KEY, routed_experts=True) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        assert (await http.get("/page/data")).status_code == 401
        found = (await http.get("/page/data", headers={"authorization": f"Bearer {KEY}"})).json()
    assert (found["model"], found["weights_version"], found["moe_layers"]) == ("fake", 7, [2, 3, 4])
    assert (found["has_chat_template"], found["has_routed_experts"], found["has_pool"]) == (True, True, False)
    assert found["defaults"] == {"temperature": 0.15, "top_k": 50}
    assert set(found["special_ids"]) == fake_tokenizer().special_ids


# --- in a browser ---


@needs_chromium
async def test_an_answer_is_streamed_and_a_conversation_goes_on(chatting, telling):
    telling.num_free = 4
    await asyncio.to_thread(chatting.press, "Who are you?", "Enter")
    await asyncio.to_thread(chatting.until, "document.querySelectorAll('.t').length === 4")
    assert await asyncio.to_thread(chatting.text, "state") == "answering"
    telling.go.set()
    sentence = await asyncio.to_thread(end, chatting)
    assert sentence.startswith(
        f"{len(telling.script)} tokens, after a prompt of {len(telling.prompts[0])}; ended by its own end"
    )
    assert "".join(await asyncio.to_thread(tokens, chatting)) == STORY + "<|im_end|>"
    await asyncio.to_thread(say, chatting, "And now?")
    want = [("user", "Who are you?"), ("assistant", STORY), ("user", "And now?")]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in want) + "<|im_start|>assistant\n"
    assert fake_tokenizer().decode(telling.prompts[1]).endswith(text)
    assert chatting.complaints() == []


@needs_chromium
async def test_what_is_said_of_a_token_is_what_the_api_says(chatting, telling):
    await asyncio.to_thread(say, chatting)
    body = {
        **{"messages": [{"role": "user", "content": "Hello"}], "logprobs": True, "top_logprobs": 5},
        **{"return_token_ids": True, "return_routed_experts": True, "max_tokens": 512},
    }
    async with httpx.AsyncClient(base_url=chatting.server.url, timeout=WAIT_S) as http:
        said = (await http.post("/v1/chat/completions", json=body)).json()
    await asyncio.to_thread(compare, chatting, said)


def compare(page, said):
    (choice,) = said["choices"]
    experts_TLK = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    num = len(choice["token_ids"])
    for i in [*range(num // 2 - 3, num // 2 + 3), num - 1]:
        page.click(f"document.querySelectorAll('.t')[{i}]")
        page.until(f"document.getElementById('token-place').innerText === '{i + 1} of {num}'")
        found = choice["logprobs"]["content"][i]
        assert page.text("token-id") == str(choice["token_ids"][i])
        assert page.text("token-bytes") == bytes(found["bytes"]).hex(" ")
        assert page.text("token-logprob") == f"log {found['logprob']:.4f}"
        assert percent(page.text("token-likely")) == pytest.approx(100 * math.exp(found["logprob"]), rel=5e-3)
        assert page.text("token-version") == str(7 if i < num // 2 else 8)
        others = page.value("[...document.querySelectorAll('#alternatives .number')].map((cell) => cell.innerText)")
        assert list(map(percent, others)) == pytest.approx(
            [100 * math.exp(one["logprob"]) for one in found["top_logprobs"]], rel=5e-3
        )
        drawn = page.value("document.querySelectorAll('#alternatives .drawn').length")
        assert drawn == (found["token"] in [one["token"] for one in found["top_logprobs"]])
        position = said["usage"]["prompt_tokens"] + i
        shown = page.value(
            "[...document.querySelectorAll('#experts tr')].map((row) => row.innerText.split('\\t').map(Number))"
        )
        want = (
            []
            if i + 1 == num
            else [[layer, *row] for layer, row in zip((2, 3, 4), experts_TLK[position].tolist(), strict=True)]
        )
        assert shown == want
    assert "the last token" in page.text("no-experts")
    assert page.complaints() == []


def percent(text):
    return float(text.removesuffix(" %"))


@needs_chromium
async def test_tokens_are_chosen_by_keyboard_and_heard(chatting, telling):
    await asyncio.to_thread(say, chatting)
    await asyncio.to_thread(walk, chatting, len(telling.script))


def walk(page, num):
    place, is_at = "document.getElementById('token-place').innerText", []
    page.value("document.querySelector('.tokens').focus()")
    for keys in (["ArrowRight"] * 3, ["ArrowLeft"], ["End"], ["ArrowRight"], ["Home"], ["ArrowDown"] * 2, ["ArrowUp"]):
        page.press(*keys)
        is_at.append(int(page.value(place).split(" ")[0]))
    assert is_at[:5] == [3, 2, num, num, 1]
    line = page.value("[...document.querySelectorAll('.line')].map((one) => one.children.length)")
    assert is_at[5:] == [1 + line[0] + line[1], 1 + line[0]]
    assert page.value("document.getElementById('spoken').textContent").startswith("↵, ")
    box = page.value("document.querySelector('.chosen').getBoundingClientRect().width")
    assert box > 0
    link = page.value("document.querySelector('a.expert').href")
    assert re.fullmatch(r".*/dashboard#expert=2\.\d+", link)
    page.press("Escape")
    assert page.text("chosen") is None
    assert page.value("document.querySelectorAll('.t.chosen').length") == 0


@needs_chromium
async def test_stop_frees_the_engine_and_keeps_what_came(chatting, telling):
    telling.num_free = 6
    await asyncio.to_thread(chatting.press, "Hello", "Enter")
    await asyncio.to_thread(chatting.until, "document.querySelectorAll('.t').length === 6")
    assert telling.held
    await asyncio.to_thread(chatting.click, "document.getElementById('stop')")
    assert await asyncio.to_thread(end, chatting) == "Stopped after 6 tokens"
    await eventually(lambda: not telling.held)
    await asyncio.to_thread(chatting.click, "document.querySelector('.t')")
    assert "not finished" in await asyncio.to_thread(chatting.text, "no-experts")
    telling.go.set()
    await asyncio.to_thread(say, chatting, "Go on")
    assert "the q" in fake_tokenizer().decode(telling.prompts[1])
    assert chatting.complaints() == []


@needs_chromium
async def test_regenerate_clear_and_copy(chatting, telling):
    await asyncio.to_thread(say, chatting)
    await asyncio.to_thread(again, chatting)
    assert telling.prompts[0] == telling.prompts[1]
    assert len(telling.prompts) == 2


def again(page):
    page.value("document.querySelector('.answer').id = 'old'")
    page.click("document.getElementById('again')")
    page.until("!document.getElementById('old')")
    end(page)
    assert page.value("document.querySelectorAll('.turn').length") == 2
    page.value(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => { window.copied = text; }}})"
    )
    page.click("document.querySelector('.answer button')")
    page.until("document.querySelector('.answer button').innerText === 'Copied'")
    assert page.value("window.copied") == STORY
    page.value("navigator.clipboard.writeText = async () => { throw new Error('denied'); }")
    page.click("document.querySelector('.answer button')")
    page.until("document.querySelector('.answer button').innerText.startsWith('Selected')")
    assert "caffè 😀\u200b over" in page.value("getSelection().toString()")
    page.click("document.getElementById('clear')")
    assert page.value("document.querySelectorAll('.turn').length") == 0
    assert page.text("empty") is not None


@needs_chromium
async def test_fields_are_sent_as_they_are_filled_in(chatting, telling):
    await asyncio.to_thread(fill, chatting)
    seen = telling.seen[0]
    assert (seen.temperature, seen.top_p, seen.top_k, seen.min_p) == (0.5, 0.9, 40, 0.05)
    assert (seen.repetition_penalty, seen.seed, seen.stop, seen.logprobs) == (1.1, 123456789, ("\n\n", "END"), 2)
    assert "<|im_start|>system\nBe kind<|im_end|>" in fake_tokenizer().decode(telling.prompts[0])
    assert len(await asyncio.to_thread(tokens, chatting)) == 9
    assert {"temperature", "top_k"}.isdisjoint(telling.seen[1].model_fields_set)


def fill(page):
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 123456789}
    for name, value in {**given, "max_tokens": 9, "num_alternatives": 2}.items():
        set_field(page, name, str(value))
    page.value("document.getElementById('system').value = 'Be kind'")
    page.value("document.getElementById('stops').value = '\\\\n\\\\n\\nEND\\n'")
    assert "ended by the limit of tokens" in say(page)
    for name in given:
        set_field(page, name, "")
    say(page)


@needs_chromium
async def test_the_server_says_what_is_wrong(chatting, telling):
    await asyncio.to_thread(set_field, chatting, "temperature", "999")
    assert await asyncio.to_thread(say, chatting) == "temperature: Input should be less than or equal to 100"
    await asyncio.to_thread(set_field, chatting, "temperature", "")
    await asyncio.to_thread(set_field, chatting, "seed", "1.5")
    assert "Seed" in await asyncio.to_thread(say, chatting)
    await asyncio.to_thread(set_field, chatting, "seed", "")
    telling.fail_after = 5
    assert await asyncio.to_thread(say, chatting) == "a shard is gone"
    assert len(await asyncio.to_thread(tokens, chatting)) == 5
    assert await asyncio.to_thread(chatting.text, "state") == "ready"
    await chatting.server.gateway.stop()
    assert await asyncio.to_thread(say, chatting) == "The server does not answer"


@needs_chromium
async def test_the_page_asks_for_the_key_and_keeps_it_in_its_tab(start, telling, browser, tmp_path):
    async with start(telling, api_key=KEY) as server:
        await asyncio.to_thread(unlock, browser, server.url, tmp_path)
        await asyncio.to_thread(say, browser)
    assert len(telling.prompts) == 1


def unlock(browser, url, folder):
    browser.open("about:blank")
    browser.open(f"{url}/")
    browser.until("document.getElementById('unlock')?.checkVisibility()")
    assert browser.text("main") is None
    for key in ("guess", KEY):
        browser.until("document.activeElement.id === 'key'")
        browser.press(key, "Enter")
        shown = "main" if key == KEY else "why"
        browser.until(f"document.getElementById('{shown}').checkVisibility()")
        if key != KEY:
            browser.until("document.getElementById('why').innerText.startsWith('This key was refused')")
            browser.screenshot(folder / "why.png")
    kept = browser.value("[sessionStorage.length, localStorage.length, document.cookie, location.search]")
    assert kept == [1, 0, "", ""]
    assert KEY not in browser.value("document.documentElement.outerHTML")
    browser.value("document.getElementById('forget').click()")
    browser.until("document.getElementById('unlock').checkVisibility()")
    assert browser.value("sessionStorage.length") == 0
    browser.until("document.activeElement.id === 'key'")
    browser.press(KEY, "Enter")
    browser.until("document.getElementById('main').checkVisibility()")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["wide", "narrow"])
async def test_the_page_fits_its_window(start, pool, telling, browser, tmp_path, width, dark):
    async with start(telling, operator=pool, routed_experts=True) as server:
        await asyncio.to_thread(show, browser, server.url, dark=dark, width=width, height=800)
        await asyncio.to_thread(say, browser)
        await asyncio.to_thread(browser.screenshot, tmp_path / "answer.png")
        await asyncio.to_thread(browser.click, "document.querySelectorAll('.t')[5]")
        await asyncio.to_thread(browser.screenshot, tmp_path / "token.png")
        size = await asyncio.to_thread(
            browser.value, "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert (size[0], size[1]) == (width, 800)
        seen = "document.getElementById('token-likely').getBoundingClientRect()"
        assert await asyncio.to_thread(browser.value, f"{seen}.bottom <= innerHeight && {seen}.top > 0")
        await asyncio.to_thread(browser.value, "document.getElementById('settings').open = true")
        await asyncio.to_thread(browser.screenshot, tmp_path / "settings.png")
        assert await asyncio.to_thread(browser.value, "document.documentElement.scrollWidth") == width
