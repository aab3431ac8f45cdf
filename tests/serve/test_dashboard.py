"""The page at /dashboard: its data, and the page itself in a headless Chromium.

Screenshots, light and dark, small and large, are left in the test's folder: `pytest --basetemp=FOLDER` keeps them.
"""

import asyncio
import json
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
from browser import needs_chromium
from operated import FakeOperator, moved, snapshot_of

from serving.page import dashboard
from tests.waiting import WAIT_S, eventually

ADMIN = "operators-key"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def pool():
    return FakeOperator()


# --- without a browser ---


def test_the_data_are_the_snapshots():
    shown = snapshot_of(num_layers=3, num_experts=5, num_shards=2)
    body = json.loads(dashboard.encode(shown, 0.25))
    found = body["snapshot"]
    assert body["age_s"] == 0.25
    assert (found["epoch"], found["placed"], found["layers"]) == (4, ["shard-0", "shard-1"], [2, 3, 4])
    assert found["replicas"] == [[list(held) for held in row] for row in shown.table.replicas]
    np.testing.assert_allclose(found["load"], shown.load_LE, atol=0.051)
    assert [shard["rows_per_s"] for shard in found["shards"]] == [shard.rows_per_s for shard in shown.shards]
    assert [(shard["kernels"], shard["computes"]) for shard in found["shards"]] == [
        ("avx512_bf16", "avx512_bf16: float32 int8"),
        ("python", "python: float32 int8"),
    ]
    assert [change["phase"] for change in found["changes"]] == ["done", "rolled back"]
    assert json.loads(dashboard.encode(moved(shown), 0.0))["snapshot"]["epoch"] == 5


def test_numbers_that_are_none_do_not_break_the_data():
    shown = snapshot_of(num_layers=1, num_experts=2, num_shards=1)
    broken = replace(shown, load_LE=((float("nan"), float("inf")),), imbalance=float("nan"))
    found = json.loads(dashboard.encode(broken, 0.0))["snapshot"]
    assert (found["load"], found["imbalance"]) == ([[0.0, 0.0]], 0)


async def test_the_data_say_how_old_they_are(start, pool, monkeypatch):
    monkeypatch.setattr("serving.pool_operator.PERIOD_S", 0.05)
    began_s = time.monotonic()
    async with start(operator=pool) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        await eventually(lambda: pool.num_waits)
        assert (await http.get("/dashboard/data")).json()["age_s"] < time.monotonic() - began_s
        pool.down = True
        await asyncio.sleep(0.5)  # ten periods, or more
        answer = await http.get("/dashboard/data")
    assert answer.status_code == 200
    assert 0.4 < answer.json()["age_s"] < time.monotonic() - began_s
    assert answer.headers["cache-control"] == "no-store"


# --- in a browser ---


@pytest.fixture
async def page(start, pool, browser):
    """The page of a server without keys, once it shows something."""
    async with start(operator=pool) as server:
        await asyncio.to_thread(show, browser, server.url)
        yield browser


def show(browser, url, **how):
    browser.forget()
    browser.open(f"{url}/dashboard", **how)
    browser.until("document.getElementById('epoch')?.checkVisibility() && !!document.getElementById('epoch').innerText")


# A cell's colour, away from its number and its mark; x and y count cells.
PIXEL = """(() => {
  const canvas = document.getElementById("heat"), scale = canvas.width / canvas.clientWidth;
  const w = (canvas.clientWidth - 34) / %(E)d, h = (canvas.clientHeight - 24) / %(L)d;
  const at = [34 + %(e)d * w + 0.1 * w, 6 + %(l)d * h + 0.85 * h].map((value) => Math.floor(value * scale));
  return [...canvas.getContext("2d").getImageData(...at, 1, 1).data];
})()"""


def darkness(page, layer_at, expert, num_layers=6, num_experts=16):
    *rgb, alpha = page.value(PIXEL % {"l": layer_at, "e": expert, "L": num_layers, "E": num_experts})
    assert alpha == 255
    return 765 - sum(rgb)


@needs_chromium
async def test_the_page_follows_the_pool_without_a_reload(page, pool):
    await asyncio.to_thread(follow, page, pool)


def follow(page, pool):
    shown = pool.snapshot()
    page.value("window.loaded_once = true")
    assert page.text("state") == "live"
    assert (page.text("epoch"), page.text("imbalance")) == ("4", f"{shown.imbalance:.2f}")
    assert page.text("num-replicas") == f"{shown.table.num_replicas_LE.sum()}"
    assert [name in page.text("shards") for name in shown.table.shards] == [True] * 3
    computes = [line.split("\t")[-1] for line in page.text("shards").splitlines()]
    assert computes == ["int8 by avx512_bf16", "int8 by python", "int8 by python"], (
        "the last one's kernels know no int8"
    )
    assert page.text("changes").splitlines()[0].split("\t")[2:4] == ["balance", "done"]
    hottest = np.unravel_index(np.argmax(shown.load_LE), (6, 16))
    assert page.text("busiest").split("\t")[:2] == [str(shown.table.layers[hottest[0]]), str(hottest[1])]
    before = darkness(page, 0, 0)
    load = [list(row) for row in shown.load_LE]
    load[0][0] = 5 * float(np.max(shown.load_LE))
    away = replace(shown.shards[1], state="away", rows_per_s=0.0)
    after = replace(moved(shown), load_LE=tuple(map(tuple, load)), shards=(shown.shards[0], away, shown.shards[2]))
    pool.show(replace(after, imbalance=2.75))
    page.until("document.getElementById('epoch').innerText === '5'")
    assert page.text("imbalance") == "2.75"
    assert page.text("changes").splitlines()[0].split("\t")[2] == "scale"
    assert "away" in page.text("shards")
    assert page.text("not-ready") == "1 not ready"
    assert page.text("busiest").split("\t")[:2] == ["2", "0"]
    assert darkness(page, 0, 0) > before + 100  # the busiest of all now
    assert page.value("window.loaded_once") is True
    assert page.complaints() == []


@needs_chromium
async def test_the_page_asks_its_own_server_only(page):
    await asyncio.to_thread(page.until, "performance.getEntriesByType('resource').length > 2")
    origin = await asyncio.to_thread(page.value, "location.origin")
    urls = [url for url in page.requested() if not url.startswith("data:")]
    assert len(urls) > 2
    assert set(urls) == {f"{origin}/dashboard{what}" for what in ("", "/data", "/training")}


@needs_chromium
async def test_text_of_others_stays_text(page, pool):
    shown = pool.snapshot()
    shard = replace(shown.shards[0], name=HOSTILE, host=HOSTILE, state=HOSTILE)
    change = replace(shown.changes[0], reason=HOSTILE, phase=HOSTILE)
    table = replace(shown.table, epoch=5, shards=(HOSTILE, *shown.table.shards[1:]))
    pool.show(replace(shown, pool=HOSTILE, table=table, shards=(shard, *shown.shards[1:]), changes=(change,)))
    await asyncio.to_thread(page.until, "document.getElementById('epoch').innerText === '5'")
    for element in ("pool", "shards", "changes"):
        assert HOSTILE in await asyncio.to_thread(page.text, element)
    assert await asyncio.to_thread(page.value, "document.images.length") == 0
    assert page.complaints() == []


@needs_chromium
async def test_an_expert_is_told_of_by_pointer_and_by_keyboard(page, pool):
    await asyncio.to_thread(explore, page, pool.snapshot())


def explore(page, shown):
    x, y = page.value(
        "(() => { const b = document.getElementById('heat').getBoundingClientRect(); return [b.x, b.y]; })()"
    )
    page.point(x + 40, y + 11)
    page.until("document.getElementById('readout').innerText.startsWith('Layer 2, expert 0: ')")
    assert "1 replica on shard-0 (node 0000000000)" in page.text("readout")
    page.point(x + 40, y - 200)
    page.until("document.getElementById('readout').innerText.startsWith('Point at')")
    page.value("document.getElementById('heat').focus()")
    page.press("ArrowRight", "ArrowDown", "ArrowRight")
    page.until("document.getElementById('spoken').textContent.startsWith('Layer 3, expert 1: ')")
    lone = darkness(page, 0, 0), darkness(page, 0, 15)
    box = page.value(
        "(() => { const b = document.querySelector('#shards tr').getBoundingClientRect(); return [b.x, b.y]; })()"
    )
    page.point(box[0] + 20, box[1] + 8)  # the first shard's experts stand out, the last shard's fade
    page.until("document.querySelector('#shards tr:hover') !== null")
    data = page.value(PIXEL % {"l": 0, "e": 15, "L": 6, "E": 16})
    assert data[3] < 255
    assert darkness(page, 0, 0) == lone[0]


@needs_chromium
async def test_a_link_names_the_expert_to_look_at(start, pool, browser):
    async with start(operator=pool) as server:
        await asyncio.to_thread(browser.open, f"{server.url}/dashboard#expert=3.1")
        await asyncio.to_thread(
            browser.until, said := "document.getElementById('readout')?.innerText.startsWith('Layer 3, expert 1: ')"
        )
        await asyncio.to_thread(browser.value, "location.hash = '#expert=2.15'")
        await asyncio.to_thread(browser.until, said.replace("3, expert 1", "2, expert 15"))
        await asyncio.to_thread(browser.value, "location.hash = '#expert=99.1'")
        assert await asyncio.to_thread(browser.text, "readout") is not None
        assert browser.complaints() == []


@needs_chromium
async def test_colours_may_show_replicas(page, pool):
    hot = np.argwhere(pool.snapshot().table.num_replicas_LE == 2)[0]
    cold = np.argwhere(pool.snapshot().table.num_replicas_LE == 1)[0]
    await asyncio.to_thread(page.value, "document.querySelector('[value=replicas]').click()")
    seen = [await asyncio.to_thread(darkness, page, *map(int, cell)) for cell in (cold, hot)]
    assert seen[1] > seen[0] + 200
    assert await asyncio.to_thread(page.text, "high") == "2"


@needs_chromium
async def test_a_hidden_page_asks_nothing(page):
    await asyncio.to_thread(hide, page)


def hide(page):
    asked = "performance.getEntriesByType('resource').length"
    switch = """(Object.defineProperty(document, 'hidden', {value: %s, configurable: true}),
                 document.dispatchEvent(new Event('visibilitychange')), 0)"""
    page.until(f"{asked} > 1")
    page.value(switch % "true")
    before = page.value(f"new Promise((done) => setTimeout(() => done({asked}), 300))")
    assert page.value(f"new Promise((done) => setTimeout(() => done({asked}), 2500))") == before
    counted = """(() => {{ let num = 0; const fetch = window.fetch; window.fetch = (...all) => (num++, fetch(...all));
                   {switch}; window.fetch = fetch; return num; }})()"""
    assert page.value(counted.format(switch=switch % "false")) == 1, "it asks at once"
    page.until(f"{asked} > {before}")


@needs_chromium
async def test_old_numbers_are_shown_as_old(start, pool, browser, tmp_path):
    async with start(operator=pool) as server:
        await asyncio.to_thread(show, browser, server.url)
        pool.down = True
        await asyncio.to_thread(browser.until, "document.getElementById('state').dataset.state === 'stale'")
        await asyncio.to_thread(browser.screenshot, tmp_path / "stale.png")
        assert "not been heard of" in await asyncio.to_thread(browser.text, "alert")
        assert await asyncio.to_thread(browser.value, "document.getElementById('main').classList.contains('old')")
        pool.down = False
        await asyncio.to_thread(browser.until, "document.getElementById('state').dataset.state === 'live'")
        assert await asyncio.to_thread(browser.text, "alert") is None
    await asyncio.to_thread(browser.until, "document.getElementById('state').dataset.state === 'away'")
    assert "does not answer" in await asyncio.to_thread(browser.text, "alert")
    assert await asyncio.to_thread(browser.text, "epoch") == "4"


@needs_chromium
async def test_the_page_asks_for_the_key_and_keeps_it_in_its_tab(start, pool, browser, tmp_path):
    async with start(operator=pool, admin_key=ADMIN) as server:
        await asyncio.to_thread(unlock, browser, server.url, tmp_path)


def unlock(browser, url, folder):
    browser.open(f"{url}/dashboard")
    browser.until("document.getElementById('unlock')?.checkVisibility()")
    assert browser.text("main") is None
    for key in ("guess", ADMIN):
        browser.until("document.activeElement.id === 'key'")
        browser.press(key, "Enter")
        shown = "main" if key == ADMIN else "why"
        browser.until(f"document.getElementById('{shown}').checkVisibility()")
        if key != ADMIN:
            browser.until("document.getElementById('why').innerText.startsWith('This key was refused')")
        browser.screenshot(folder / f"{shown}.png")
    assert browser.text("epoch") == "4"
    assert browser.value("[sessionStorage.length, localStorage.length, document.cookie, location.search]") == [
        1,
        0,
        "",
        "",
    ]
    assert ADMIN not in browser.value("document.documentElement.outerHTML")
    browser.open(f"{url}/dashboard")
    browser.until("document.getElementById('main')?.checkVisibility()")
    browser.value("document.getElementById('forget').click()")
    browser.until("document.getElementById('unlock').checkVisibility()")
    assert browser.value("sessionStorage.length") == 0


@needs_chromium
async def test_a_server_without_a_pool_says_so_on_its_page(server, browser):
    await asyncio.to_thread(browser.open, f"{server.url}/dashboard")
    await asyncio.to_thread(browser.until, "document.getElementById('state')?.dataset.state === 'none'")
    assert "no pool" in await asyncio.to_thread(browser.text, "alert")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("shape", [(6, 16, 3), (58, 256, 32)], ids=["small", "large"])
async def test_the_page_fits_its_window_and_is_drawn_in_time(start, browser, tmp_path, shape, dark):
    pool = FakeOperator(snapshot_of(*shape))
    async with start(operator=pool) as server:
        await asyncio.to_thread(show, browser, server.url, dark=dark)
        pool.show(moved(moved(pool.snapshot(), shape[0] // 2, 5), 1, 3))
        await asyncio.to_thread(browser.until, "document.getElementById('epoch').innerText === '6'")
        await asyncio.to_thread(browser.screenshot, tmp_path / "page.png")
        wide, high = await asyncio.to_thread(browser.value, "[document.body.scrollWidth, document.body.scrollHeight]")
        assert wide <= 1280
        redraw = """(() => {
          const start = performance.now();
          document.querySelector('[value=share]').click();
          return performance.now() - start;
        })()"""
        drawn_ms = await asyncio.to_thread(browser.value, redraw)
        await asyncio.to_thread(browser.screenshot, tmp_path / "share.png")
    assert drawn_ms < 500
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert high < 2000
