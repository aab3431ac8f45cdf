"""Which engine a request is sent to, and how well a gateway knows what engines have cached."""

import random
from collections import Counter
from contextlib import ExitStack
from itertools import count

import pytest

from serving.frontend import EngineInfo
from serving.roles import Roles, newest
from serving.routing import FEW, LOAD_TOKENS, MOST_ABOVE_MEAN, Routing, Seat
from tests.unit.engine_fakes import fake_config, fake_engine, run_all
from trinity.config import Config, EngineConfig
from trinity.engine.key_log import MOST, NO_ACCOUNT, KeyChanges, KeyLog, short
from trinity.engine.prefix_keys import KeyBase
from trinity.engine.request import SamplingParams
from trinity.errors import ConfigError

BASE = KeyBase("a model", 4)
TEXT = list(range(1, 41))


def key(number):
    return number.to_bytes(32, "little")


@pytest.mark.parametrize("most", [3, 40, MOST])
def test_accounts_one_after_the_other_say_what_is_there(most):
    """Whoever asks often hears changes, whoever asks late all: as many as an account may have, the latest."""
    rng, log, there, told, number = random.Random(most), KeyLog(most), {}, set(), NO_ACCOUNT
    for _ in range(2000):
        known = rng.randrange(60)
        if rng.random() < 0.6 or known not in there:
            there.pop(known, None)
            there[known] = None
        else:
            del there[known]
        log.note(key(known), known in there)
        if rng.random() < 0.2:
            account = log.since(number)
            told = set(account.came) if account.is_whole else (told | set(account.came)) - set(account.went)
            number = account.number
            all_there = set(map(short, map(key, there)))
            assert told <= all_there if most < MOST else told == all_there
            if account.is_whole:
                assert told == {short(key(each)) for each in list(there)[-most:]}
    assert log.since(2000) == KeyChanges(2000, False, b"", b"")


def seated(num, **info):
    routing = Routing()
    for i in range(num):
        engine = EngineInfo("m", 100, 0, f"engine-{i}", started=i, keys=BASE, **info)
        routing.seats[engine.engine_id] = Seat(engine)
    return routing


def chain(routing, token_ids, salt=None):
    made = routing.chain(False, "anybody", salt, None)
    made.add(token_ids)
    return made


def send(routing, token_ids, **whose):
    """-> the name of the engine that it goes to, and the way to end it."""
    made = chain(routing, token_ids, **whose)
    seat = routing.choose(made, routing.seats.values())
    held = ExitStack()
    return seat.info.engine_id, held.enter_context(seat.holding(made)), held.close


def test_a_gateway_names_blocks_as_engines_do():
    """An engine's own account has the keys that a gateway gives its requests, whoever asked and however the text grew."""
    engine = fake_engine(fake_config(), block_size=4)
    params = SamplingParams(max_tokens=9, ignore_eos=True, cache_salt="pepper")
    engine.add("a", TEXT[:21], params)
    said = [token for delta in run_all(engine)["a"] for token in delta.token_ids]
    routing = Routing()
    routing.seats["a"] = Seat(EngineInfo("m", 64, 0, "a", keys=engine.prefixes.base))
    made = chain(routing, TEXT[:21], "pepper")
    for token in said:
        made.add([token])
    there = set(engine.prefixes.changes(NO_ACCOUNT).came)
    assert len(made.keys) == 30 // 4
    assert set(made.keys) >= there >= set(made.keys[:-1])
    assert not there & set(chain(routing, TEXT[:21]).keys), "another salt has other keys"
    seat = routing.seats["a"]
    seat.told(seat.info, engine.prefixes.changes(seat.number), seat.ask())
    assert seat.num_cached(chain(routing, [*TEXT[:21], *said, 7], "pepper")) == 28
    engine.reset_prefix_cache()
    seat.told(seat.info, engine.prefixes.changes(seat.number), seat.ask())
    assert seat.num_cached(chain(routing, [*TEXT[:21], *said, 7], "pepper")) == 0


def test_an_engine_without_a_cache_says_so():
    assert fake_engine(prefix_cache=False).prefixes.base is None
    routing = seated(2)
    for seat in routing.seats.values():
        seat.info = EngineInfo("m", 100, 0, seat.info.engine_id)
    engines = [send(routing, TEXT)[0] for _ in range(4)]
    assert Counter(engines) == {"engine-0": 2, "engine-1": 2}


def test_what_was_said_to_an_engine_goes_on_there():
    """Eight conversations of three turns over four engines: each stays where it began, and they are spread."""
    routing, homes = seated(4), {}
    said = {talk: [talk] * 30 for talk in range(8)}
    for _ in range(3):
        open_ = []
        for talk, text in said.items():
            engine, sent, end = send(routing, text)
            assert homes.setdefault(talk, engine) == engine
            open_.append((text, sent, end))
        for text, sent, end in open_:
            sent.said([99, 98, 97])
            text += [99, 98, 97, 1, 2, 3, 4, 5]
            end()
    assert set(Counter(homes.values()).values()) == {2}


def test_one_beginning_is_computed_where_it_is_until_that_costs_more_than_computing_it_again():
    """Not even before it is there: two engines that compute it are no quicker than one."""
    routing, system = seated(2), [5] * 2 * LOAD_TOKENS
    sent = []
    for i in range(9):
        sent.append(send(routing, [*system, i]))
        sent[-1][1].said([1])
    engines = [engine for engine, _, _ in sent]
    assert engines[:8] == engines[:1] * 8
    waiting = [send(routing, [6] * 1000)[0] for _ in range(3)]
    assert len(set(waiting)) == 1
    assert set(engines) == {"engine-0", "engine-1"}


def test_a_long_prompt_that_waits_counts_until_its_first_token():
    routing = seated(2)
    long = send(routing, list(range(1000)))
    others = [send(routing, [7] * 8) for _ in range(3)]
    assert {engine for engine, _, _ in others}.isdisjoint(long[:1])
    long[1].said([1])
    assert send(routing, [8] * 8)[0] == long[0]


def test_no_engine_is_sent_more_than_its_share():
    """However much of a prompt one engine has cached, from FEW requests an engine on."""
    rng, routing, system = random.Random(0), seated(4), [5] * 4000
    running = []
    for _ in range(600):
        if running and rng.random() < 0.3:
            running.pop(rng.randrange(len(running)))[1]()
            continue
        engine, _, end = send(routing, [*system, rng.randrange(9)])
        running.append((engine, end))
        load = Counter(engine for engine, _ in running)
        if len(running) >= FEW * 4:
            assert load[engine] <= MOST_ABOVE_MEAN * len(running) / 4
    assert len(running) > 100
    assert routing.seats[engine].load == load[engine]


def test_load_is_what_engines_say_and_what_was_sent_since():
    routing = seated(2)
    seat = routing.seats["engine-0"]
    ends = [send(routing, [i] * 8) for i in range(4)]
    assert (seat.load, routing.seats["engine-1"].load) == (2, 2)
    asked = seat.ask()
    said = EngineInfo("m", 100, 0, "engine-0", {"num_running": 3, "num_waiting": 4}, keys=BASE)
    more = send(routing, [9] * 8)
    seat.told(said, None, asked)  # 2 of the 7 were from here
    assert seat.load == 5 + 2 + (more[0] == "engine-0")
    assert [send(routing, [i] * 8)[0] for i in range(20, 23)] == ["engine-1"] * 3
    for _, _, end in (*ends, more):
        end()
    assert seat.load == 5


def test_a_guess_is_kept_until_an_account_that_was_asked_for_later():
    """An account says nothing of what was sent while it was on its way, nor of a prompt that is yet to be computed."""
    log, routing = KeyLog(), seated(1)
    [seat] = routing.seats.values()
    before = seat.ask()
    _, sent, end = send(routing, TEXT)
    seat.told(seat.info, log.since(seat.number), before)
    assert seat.num_cached(chain(routing, TEXT)) == 36
    seat.told(seat.info, log.since(seat.number), seat.ask())
    assert seat.num_cached(chain(routing, TEXT)) == 36, "it is yet to come"
    sent.said([1])
    end()
    seat.told(seat.info, log.since(seat.number), seat.ask())
    assert seat.num_cached(chain(routing, TEXT)) == 0, "the engine knows nothing of it"


def test_a_lost_engine_is_sent_nothing_until_it_answers():
    routing = seated(2)
    seat = routing.seats["engine-0"]
    seat.is_there = False
    assert {send(routing, [i] * 8)[0] for i in range(6)} == {"engine-1"}
    routing.seats["engine-1"].is_there = False
    assert send(routing, TEXT)[0] in routing.seats, "one may be there all the same"
    seat.told(seat.info, None, seat.ask())
    assert send(routing, TEXT)[0] == "engine-0"


class Started:
    def __init__(self, name, started):
        self.engine_id, self.started = name, started


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("both",), {"a": "both", "b": "both", "c": "both"}),
        (("prefill", "decode"), {"b": "prefill", "c": "decode", "a": "decode"}),
        (("decode", "both", "prefill"), {"b": "decode", "c": "both", "a": "prefill"}),
    ],
)
def test_roles_are_in_the_order_of_starts(names, roles):
    engines = [Started("a", 9), Started("b", 3), Started("c", 9 if "prefill" in names[:1] else 5)]
    if names[0] == "prefill":
        engines[2] = Started("c", 4)
    assert dict(Roles(0, names).of(engines)) == roles
    assert dict(Roles(0, names).of(reversed(engines))) == roles


def test_a_lost_prefill_engine_is_replaced_by_the_next():
    engines = [Started(name, started) for started, name in zip(count(), "abc", strict=False)]
    roles = Roles(0, ("prefill", "decode"))
    assert dict(roles.of(engines[1:])) == {"b": "prefill", "c": "decode"}


def test_of_roles_the_latest_count():
    first = Roles(0, ("both",))
    later, beside = first.after(["prefill", "decode"]), first.after(["decode"])
    assert newest(first, later) == newest(later, None) == newest(later, first) == later
    assert newest(later, beside) == newest(beside, later), "two gateways at once: the same for all"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"role": "refill"}, "'both', 'prefill' or 'decode'"),
        ({"role": "prefill", "replicas": 2}, "needs another engine that answers"),
        ({"role": ["prefill", "prefill"], "replicas": 2}, "needs another engine that answers"),
        ({"role": "prefill,decode"}, "role names 2 engines and there are at most 1"),
        ({"role": []}, "role names no engine"),
        ({"role": "prefill,decode", "replicas": 2, "kv_tier_bytes": 0}, r"give it some with engine\.kv_tier_bytes"),
        ({"role": "prefill,decode", "replicas": 2, "prefix_cache": False}, r"leave engine\.prefix_cache on"),
    ],
)
def test_roles_that_cannot_be_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        EngineConfig(**{"kv_tier_bytes": 1, **settings})


def test_an_unknown_role_is_one_sentence():
    with pytest.raises(ConfigError) as caught:
        Config.load(model="tiny", engine={"role": "decode,refill", "replicas": 2})
    assert str(caught.value) == "engine.role.1: Input should be 'both', 'prefill' or 'decode' (got 'refill')"


def test_roles_are_one_or_a_list():
    assert EngineConfig(role="decode").role == ("decode",)
    two = {"replicas": 2, "kv_tier_bytes": 1}
    assert EngineConfig(role="prefill,decode", **two) == EngineConfig(role=["prefill", "decode"], **two)
    assert EngineConfig(role=["prefill", "decode"], max_replicas=4, kv_tier_bytes=1).role == ("prefill", "decode")
