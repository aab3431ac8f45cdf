"""Prompts that one engine computes and another goes on from: on one node by its tier, between nodes over real sockets, and
whatever goes wrong on the way. Computed tokens are counted, never timed.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, aclosing, contextmanager

import numpy as np
import pytest

from actors.dataplane.peer import PeerConnection, PeerServer
from tests.unit.engine_fakes import FakeSource, fake_config, fake_engine, solo
from trinity.engine import async_engine, handoff
from trinity.engine.async_engine import AsyncEngine
from trinity.engine.handoff import Handoff, KVPlace, Prefilled
from trinity.engine.kv_exchange import MOST_ASKED_BYTES, Asked, Wanted
from trinity.engine.kv_tier import TierPlace
from trinity.engine.request import SamplingParams
from trinity.errors import EngineLost, InvalidRequest, Unavailable

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PINNED = GREEDY.model_copy(update={"version_policy": "pinned"})
PROMPT = tuple(range(5, 27))  # 22 tokens: five full blocks of 4 and two tokens
SECRET = b"s" * 32


class Node:
    """An engine, its node's tier, and a door for other nodes."""

    def __init__(self, folder, name=None, secret=SECRET, is_sealed=False, **fields):
        config = fake_config()
        self.engine = fake_engine(config, tier=TierPlace(folder, 1 << 20, lambda version: "line"), **fields)
        connect = lambda address, until_s: PeerConnection(address, SECRET, until_s)  # noqa: E731
        self.handoff = Handoff(name or str(folder), self.engine.prefixes.tier, connect)
        self.handoff.listen(PeerServer(self.handoff.answer, MOST_ASKED_BYTES, secret, "127.0.0.1", is_sealed))
        self.own = AsyncEngine(self.engine, self.handoff)

    def prefill(self, prompt=PROMPT, own=GREEDY):
        return asyncio.run(self.own.prefill("p", prompt, own))

    def ask(self, prefilled=None, prompt=PROMPT, own=GREEDY):
        """-> tokens, tokens computed, and the version."""
        before = self.own.stats().num_computed_tokens

        async def asked():
            async with aclosing(self.own.generate("r", prompt, own, 60.0, prefilled=prefilled)) as deltas:
                return [delta async for delta in deltas]

        deltas = asyncio.run(asked())
        tokens = tuple(token for delta in deltas for token in delta.token_ids)
        self.num_cached = deltas[-1].num_cached_tokens
        return tokens, self.own.stats().num_computed_tokens - before, deltas[-1].version


@contextmanager
def nodes(*made):
    with ExitStack() as undo:
        for each in made:
            undo.callback(each.own.close)
        yield made


ANSWER, COMPUTED_ALL, COMPUTED_REST = solo(fake_config(), PROMPT, GREEDY), 22 + 5, 2 + 5


def test_on_one_node_the_other_engine_only_computes_the_rest(tmp_path):
    with nodes(Node(tmp_path, "n"), Node(tmp_path, "n")) as (one, other):
        prefilled = one.prefill()
        assert prefilled == Prefilled(20, 0, one.handoff.place)
        assert other.ask(prefilled) == (ANSWER, COMPUTED_REST, 0)
        assert (one.own.stats().num_computed_tokens, one.own.stats().num_generated_tokens) == (22, 0)
        assert other.handoff.num_fetched == 0
        assert other.num_cached == 0, "somebody computed it for this request"
        longer = (*PROMPT, *PROMPT)
        again = one.prefill(longer)
        assert other.ask(again, longer)[1] == 44 - 40 + 5
        assert (other.num_cached, again.num_cached) == (20, 20)


@pytest.mark.parametrize("is_sealed", [False, True])
def test_between_nodes_what_is_missing_travels_and_nothing_else(tmp_path, is_sealed):
    """Of the layer that sees everything five blocks, of the window's the last one."""
    with nodes(Node(tmp_path / "a", is_sealed=is_sealed), Node(tmp_path / "b")) as (one, other):
        assert other.ask(one.prefill()) == (ANSWER, COMPUTED_REST, 0)
        assert other.handoff.num_fetched == 5 + 1
        longer = (*PROMPT, *range(9))
        prefilled = one.prefill(longer)
        assert prefilled.num_tokens == 28
        expected = solo(fake_config(), longer, GREEDY)
        assert other.ask(prefilled, longer) == (expected, 31 - 28 + 5, 0)
        assert other.handoff.num_fetched <= 5 + 1 + 2 + 1


def test_a_conversation_goes_on_where_it_was_answered_and_nothing_travels(tmp_path):
    """Though only the end of the prompt's window came over (vLLM's #56449: there the cache of who answers never grows)."""
    with nodes(Node(tmp_path / "a"), Node(tmp_path / "b")) as (one, other):
        prompt, (tokens, *_) = PROMPT, other.ask(one.prefill())
        for turn in range(3):
            known, prompt = len(prompt) + len(tokens) - 1, (*prompt, *tokens, turn)
            tokens, num_computed, _ = other.ask(None, prompt)
            assert num_computed == len(prompt) - known // 4 * 4 + 5
        assert other.handoff.num_fetched == 5 + 1


def test_large_prompts_travel_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(handoff, "BYTES_TOGETHER", 1)
    with nodes(Node(tmp_path / "a"), Node(tmp_path / "b")) as (one, other):
        assert other.ask(one.prefill()) == (ANSWER, COMPUTED_REST, 0)


def dead(one, prefilled):
    one.own.close()
    return prefilled


def elsewhere(one, prefilled):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        return Prefilled(20, 0, KVPlace("x", f"tcp:127.0.0.1:{nobody.getsockname()[1]}", prefilled.place.tier))


def otherwise_stored(one, prefilled):
    return Prefilled(20, 0, KVPlace("x", prefilled.place.address, "0" * 16))


def unheard_of(one, prefilled):
    return Prefilled(20, 0, KVPlace("x", "", prefilled.place.tier))


def strange(one, prefilled):
    return Prefilled(20, 0, KVPlace("x", "tcp:nowhere", prefilled.place.tier))


@pytest.mark.parametrize("broken", [dead, elsewhere, otherwise_stored, unheard_of, strange])
def test_who_cannot_be_asked_costs_computing_and_no_request(tmp_path, broken):
    with nodes(Node(tmp_path / "a"), Node(tmp_path / "b")) as (one, other):
        assert other.ask(broken(one, one.prefill())) == (ANSWER, COMPUTED_ALL, 0)


def test_another_pools_engine_is_not_believed(tmp_path):
    with nodes(Node(tmp_path / "a", secret=b"x" * 32), Node(tmp_path / "b")) as (one, other):
        assert other.ask(one.prefill()) == (ANSWER, COMPUTED_ALL, 0)


@pytest.mark.parametrize("lie", ["nothing", "short", "long", "other versions", "an error", "a hang"])
def test_answers_that_are_none_are_not_taken(tmp_path, monkeypatch, lie):
    monkeypatch.setattr(handoff, "FIRST_S", 0.3)
    held = threading.Event()

    def answer(request):
        right = b"".join(one.handoff.blocks.told(Asked.unpack(request)))
        if lie == "an error":
            raise InvalidRequest("no")
        if lie == "a hang":
            held.wait(60)
        if lie == "other versions":
            right = right[:1] + bytes([9] * 16) + right[17:]
        return [{"nothing": b"\0", "short": right[:-3], "long": right + bytes(9)}.get(lie, right)]

    with nodes(Node(tmp_path / "a"), Node(tmp_path / "b")) as (one, other):
        server = PeerServer(answer, MOST_ASKED_BYTES, SECRET, "127.0.0.1")
        prefilled = one.prefill()
        place = KVPlace("x", server.address, prefilled.place.tier)
        assert other.ask(Prefilled(20, 0, place)) == (ANSWER, COMPUTED_ALL, 0)
        held.set()
        server.close()


def test_a_pinned_prompt_keeps_its_version_until_somebody_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(async_engine, "HELD_S", 3600.0)
    source = FakeSource(fake_config())
    with nodes(Node(tmp_path, "n", source=source), Node(tmp_path, "n", source=FakeSource(fake_config()))) as (
        one,
        other,
    ):
        prefilled = one.prefill(own=PINNED)
        source.commit()
        assert source.held[1], "nobody else has it"
        assert other.ask(prefilled, own=PINNED)[1:] == (COMPUTED_REST, 1)
        one.engine._versions._handed_over[0] = 0.0, 1
        while source.held[1]:
            one.ask(prompt=(1, 2))


def test_a_pinned_request_goes_on_at_the_prompts_version(tmp_path):
    source = FakeSource(fake_config())
    with nodes(Node(tmp_path, "n", source=source)) as (one,):
        prefilled = one.prefill(own=PINNED)
        source.commit()
        assert one.ask(prefilled, own=PINNED)[1:] == (COMPUTED_REST, 1)
        assert one.ask(own=PINNED, prompt=(1, *PROMPT))[2] == 2


def test_who_waits_for_an_engine_that_ends_hears_of_it(tmp_path, monkeypatch):
    """It waited for ever: what the engine's thread was to do next was never done."""
    with nodes(Node(tmp_path)) as (one,):
        monkeypatch.setattr(one.engine.prefixes.tier, "save", lambda *blocks: 1 // 0)
        with pytest.raises(EngineLost, match="has stopped"):
            one.prefill()


def test_without_a_tier_no_prompt_is_handed_over():
    engine = AsyncEngine(fake_engine())
    prefilled = Prefilled(20, 0, KVPlace("x", "tcp:127.0.0.1:1", "0" * 16))
    with pytest.raises(Unavailable, match="kv_tier_bytes"):
        asyncio.run(engine.prefill("p", PROMPT, GREEDY))

    async def ask():
        return [delta async for delta in engine.generate("r", PROMPT, GREEDY, prefilled=prefilled)]

    assert tuple(token for delta in asyncio.run(ask()) for token in delta.token_ids) == ANSWER
    engine.close()


CHILD = """
import sys
from dataclasses import astuple
from pathlib import Path
from tests.unit.test_handoff import Node

node = Node(Path(sys.argv[1]))
prefilled = node.prefill()
print(prefilled.num_tokens, *astuple(prefilled.place), flush=True)
sys.stdin.read()
"""


def test_an_engine_of_another_process_and_its_death_in_the_middle(tmp_path, monkeypatch):
    """First it gives its blocks; then it is killed when the first piece of a larger answer has come."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        num, *place = child.stdout.readline().split()
        prefilled = Prefilled(int(num), 0, KVPlace(*place))
        with nodes(Node(tmp_path / "b"), Node(tmp_path / "c")) as (one, other):
            assert one.ask(prefilled) == (ANSWER, COMPUTED_REST, 0)
            monkeypatch.setattr(handoff, "BYTES_TOGETHER", 1)
            take = other.handoff.blocks.take

            def taken(*answer):
                os.kill(child.pid, signal.SIGKILL)
                return take(*answer)

            other.handoff.blocks.take = taken
            assert other.ask(prefilled) == (ANSWER, COMPUTED_ALL, 0)
            assert other.handoff.num_fetched == 1
            with nodes(Node(tmp_path / "a", "again")) as (again,):
                assert again.ask() == (ANSWER, COMPUTED_REST, 0), "what it had is there for who starts after it"


def test_questions_are_bounded_and_come_back_as_they_were(tmp_path):
    asked = Asked("a" * 16, 1 << 63, 2, 3, (Wanted(0, b"k" * 32), Wanted(1, b"l" * 32)))
    assert Asked.unpack(asked.pack()) == asked
    for bad in (b"", asked.pack()[:-1], asked._replace(wanted=()).pack(), asked.pack() + bytes(MOST_ASKED_BYTES)):
        with pytest.raises(InvalidRequest):
            Asked.unpack(bad)
    with nodes(Node(tmp_path)) as (one,):
        for wrong in (asked, asked._replace(segment=one.handoff.blocks.name, wanted=(Wanted(2, b"k" * 32),))):
            with pytest.raises(InvalidRequest):
                list(one.handoff.answer(wrong.pack()))
        right = asked._replace(segment=one.handoff.blocks.name)
        answer = np.frombuffer(b"".join(one.handoff.answer(right.pack())), np.uint8)
        assert one.handoff.blocks.take(right, answer, 1) == 0
