"""A gateway over a fake engine, on loopback ports of its own; `fake` is importable by Ray's workers too."""

import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import httpx
import pytest
from browser import Browser
from chat_page import STORY, show
from fake import FakeEngine, fake_tokenizer
from operated import FakeOperator
from telling import TellingEngine

from serving.engine import NUMERICS, LocalClient
from serving.frontend import Frontend
from serving.gateway import Gateway
from tests.waiting import WAIT_S
from trinity.config import ServeConfig


class Running:
    """A started gateway with its engine, and clients' addresses."""

    def __init__(self, gateway, engine):
        self.gateway, self.engine, self.front = gateway, engine, gateway.front
        self.url, self.grpc_address = gateway.addresses


@asynccontextmanager
async def running(engine=None, operator=None, source=None, numerics=NUMERICS, **serve):
    engine = engine or FakeEngine()
    config = ServeConfig(**{"http_port": 0, "grpc_port": 0, "drain_timeout_s": 5, **serve})
    client = LocalClient(engine, fake_tokenizer(), "fake", numerics)
    connect = None if operator is None else lambda: operator
    gateway = Gateway(Frontend(client, client.tokenizer, await client.info(), config, connect, source))
    await gateway.start()
    try:
        yield Running(gateway, engine)
    finally:
        await gateway.stop()


@pytest.fixture
async def server():
    async with running() as found:
        yield found


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def start():
    """`async with start(engine, api_key=...) as server` for a gateway with settings of its own."""
    return running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One Chromium for the tests of a file."""
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def telling():
    return TellingEngine(STORY)


@pytest.fixture
async def chatting(start, pool, telling, browser):
    """The page of a server without keys, ready to be written into."""
    async with start(telling, operator=pool, routed_experts=True) as server:
        browser.server = server
        await asyncio.to_thread(show, browser, server.url)
        yield browser
        await asyncio.to_thread(browser.value, "document.getElementById('stop').click()")


@pytest.fixture
def quick(monkeypatch):
    """Snapshots of the pool come often."""
    monkeypatch.setattr("serving.pool_operator.PERIOD_S", 0.1)


@pytest.fixture
def pool():
    return FakeOperator()


@pytest.fixture
async def operated(start, pool):
    async with start(operator=pool) as server:
        yield server
