"""Turns of clients: none waits for another's whole queue, and each gets tokens by its weight."""

import math
import random
from collections import Counter

import pytest

from tests.unit.engine_fakes import fake_config, fake_engine
from trinity.config import ANYBODY, Client
from trinity.engine.fair_queue import PriorityQueue
from trinity.engine.request import SamplingParams, Sequence

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ONE, OTHER = Client("one"), Client("other")


def sequence(client=ANYBODY, name=""):
    return Sequence(name, (1, 2), GREEDY, None, client)


def test_what_is_urgent_comes_first_and_in_its_order():
    queue, found = PriorityQueue(), []
    for number, priority in enumerate([5, 0, 5, -1, 0, 7, -1]):
        params = GREEDY.model_copy(update={"priority": priority})
        queue.append(Sequence(str(number), (1,), params, None))
    assert queue.last().request_id == "5"
    while queue:
        found.append(queue.take().request_id)
        if found == ["3", "6", "1"]:
            queue.append(again := Sequence("late", (1,), GREEDY.model_copy(update={"priority": -3}), None))
            assert queue.take() is again
    assert found == ["3", "6", "1", "4", "0", "2", "5"]


def test_those_whose_deadline_is_near_are_found_without_a_look_at_the_rest():
    queue, rng, looked, waiting = PriorityQueue(), random.Random(1), [], set()
    for number in range(500):
        params = GREEDY.model_copy(update={"priority": rng.randrange(3)})
        until_s = rng.choice([math.inf, 5000.0 * rng.random(), 900.0])
        own = Sequence(str(number), (1,) * rng.randint(1, 70), params, None, until_s=until_s)
        rng.choice([queue.append, queue.resume, queue.put_back])(own)
        waiting.add(own)
        if rng.random() < 0.3:
            queue.remove(gone := rng.choice(sorted(waiting, key=id)))
            waiting.remove(gone)
    found = set(queue.soon(lambda num_tokens, until_s: looked.append(until_s) or until_s < num_tokens))
    assert {each for each in waiting if each.until_s < len(each.token_ids)} <= found <= waiting
    assert all(each.until_s < 2 * len(each.token_ids) for each in found)
    assert len(looked) <= len(found) + 7, "one of each kind of length"


def test_tokens_count_whatever_their_priority_was():
    queue = PriorityQueue()
    for client, priority in ((ONE, -1), (ONE, 0), (OTHER, 0)):
        queue.append(Sequence("", (1,), GREEDY.model_copy(update={"priority": priority}), None, client))
    queue.charge(queue.take(), 100)
    assert names(queue) == ["one", "other"]
    assert queue.take().client == OTHER


def served(queue, num, cost=lambda sequence: 10):
    """The next `num`, each computed at once."""
    found = []
    for _ in range(num):
        found.append(queue.take())
        queue.charge(found[-1], cost(found[-1]))
    return found


def names(sequences):
    return [each.client.name for each in sequences]


def filled(*clients, each=20):
    queue = PriorityQueue()
    for client in clients:
        for _ in range(each):
            queue.append(sequence(client))
    return queue


@pytest.mark.parametrize("seed", range(5))
def test_with_one_client_first_come_first_served(seed):
    rng, queue, list_ = random.Random(seed), PriorityQueue(), []
    for _ in range(300):
        if rng.random() < 0.6 or not list_:
            list_.append(sequence())
            queue.append(list_[-1])
        elif rng.random() < 0.3:
            gone = list_.pop(rng.randrange(len(list_)))
            queue.remove(gone)
        else:
            taken = queue.take()
            queue.charge(taken, rng.randrange(100))
            assert taken is list_.pop(0)
            if rng.random() < 0.3:
                queue.put_back(taken)
                list_.insert(0, taken)
        assert list(queue) == list_
        assert len(queue) == len(list_)


def test_who_comes_late_does_not_wait_for_those_who_came_before():
    queue = filled(ONE, each=100)
    served(queue, 30)
    queue.append(sequence(OTHER))
    assert "other" in names(served(queue, 2))


def test_tokens_are_shared_by_weight_whatever_a_request_costs():
    light, heavy = Client("light", 1.0), Client("heavy", 3.0)
    costs = {"light": 7, "heavy": 40}
    tokens = Counter()
    for each in served(filled(light, heavy, each=500), 500, lambda each: costs[each.client.name]):
        tokens[each.client.name] += costs[each.client.name]
    assert 2.8 < tokens["heavy"] / tokens["light"] < 3.2


def test_nobody_saves_turns_up():
    """Neither while another's requests wait, nor while they all run."""
    for num_waiting in (50, 0):
        queue = filled(ONE, each=50 + num_waiting)
        for each in served(queue, 50):
            queue.charge(each, 1000)
        for client in (OTHER, ONE):
            for _ in range(50):
                queue.append(sequence(client))
        assert abs(Counter(names(served(queue, 40)))["other"] - 20) <= 1


def test_what_was_preempted_comes_before_all_others():
    queue = filled(ONE, OTHER, each=3)
    taken = served(queue, 4)
    for each in reversed(taken):
        queue.put_back(each)
    assert served(queue, 4) == taken
    assert len(queue) == 2
    queue.put_back(taken[0])
    queue.remove(taken[0])
    assert taken[0] not in list(queue)


def test_an_engine_that_is_flooded_answers_another_client_soon():
    engine, ended = fake_engine(fake_config(), max_num_seqs=4), []
    for at in range(40):
        engine.add(f"one-{at}", [1, 2, 3], GREEDY, ONE)
    engine.step()
    engine.add("other", [3, 2, 1], GREEDY, OTHER)
    while engine.has_work:
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
        engine.check()
    assert len(ended) == 41
    assert ended.index("other") < 12, "after those that ran when it came, and some of the next"
