"""Control protocol, exhaustively in the small: every order of messages, deaths and late answers within some bounds.

Shown for each setting, of all states that can be reached (protocol_world.py says what may happen):
- no answer that a caller gets is from another content than the one decided for its version, whoever computes it;
- no shard commits a version that is not decided, or of other numbers than an undisturbed run of the deciding attempts makes:
  each backward op counts exactly once;
- epochs only grow, a decided version stays on a shard that the table names, a trainer that takes over can go on from it;
- from every state a good end is reachable by steps that are no faults: the last step decided and committed everywhere, and
  every expert answering by the newest table. States are finitely many, so every run that is fair to each step which is
  possible again and again, and meets no more faults, comes to that end.
What is not: more shards, steps and faults than the bounds say; time (deadlines are a fault, "give up"); going back to a
checkpoint; pins; a message that arrives while a shard is in the middle of making a step.
"""

from dataclasses import replace
from unittest import mock

import pytest

from actors.control.ledger import Ledger
from tests.unit.protocol_explorer import explore
from tests.unit.protocol_parts import real_parts
from tests.unit.protocol_states import Setting
from tests.unit.protocol_world import Protocol
from trinity.experts.grad_accumulator import GradAccumulator
from trinity.experts.published import PublishedVersions
from trinity.experts.weight_versions import WeightVersions
from trinity.experts.weights import ExpertWeights
from trinity.placement.table import PlacementTable

ONE = Setting(num_faults=2)
TWO = Setting(("a", "b"), ((0,), (1,)))
MOVING = replace(TWO, moves=((1, "a"),), faults=("kill", "service"), late_is_fault=True)
SHARED = Setting(("a", "b"), ((0, 1), (1,)), late_is_fault=True)
CUT = Setting(("a", "b"), ((0, 1), (0, 1)), num_steps=1, num_faults=2, faults=("cut", "give up"), late_is_fault=True)
BARELY = replace(MOVING, num_faults=0, late_is_fault=False)
SMALL = {
    "one shard": ONE,
    "two shards": TWO,
    "moving": MOVING,
    "late while moving": BARELY,
    "shared": SHARED,
    "cut": CUT,
    "cut between the word that a step is staged and its decision": replace(CUT, num_faults=1, cuts_any_time=True),
}
LARGE = {
    "one shard, more faults": replace(ONE, num_faults=3),
    "one shard, whose messages outlive processes": replace(ONE, wires_end=False),
    "two shards, more faults": replace(TWO, num_faults=2, late_is_fault=True),
    "replaced while moving": replace(MOVING, faults=("replace", "kill")),
    "moves are given up": replace(MOVING, faults=("kill", "give up", "service")),
    "there and back": replace(MOVING, moves=((1, "a"), (1, "b"))),
    "cut in the second step": replace(CUT, num_steps=2),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    with real_parts(tmp_path_factory.mktemp("protocol")) as found:
        yield found


@pytest.mark.parametrize("setting", SMALL.values(), ids=SMALL)
def test_nothing_goes_wrong_and_everything_can_end_well(parts, setting):
    found = explore(Protocol(parts, setting))
    print(f"\n{found.num_states:,} states, {found.num_steps:,} steps")
    assert not found.violation, found.told


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("setting", LARGE.values(), ids=LARGE)
def test_nor_with_more_faults(parts, setting):
    found = explore(Protocol(parts, setting))
    print(f"\n{found.num_states:,} states, {found.num_steps:,} steps")
    assert not found.violation, found.told


# -- each rule is needed: without it something goes wrong

DECIDE, NEW_ATTEMPT, FIND = Ledger.decide, Ledger.new_attempt, PublishedVersions.find
RECOVER, TAKE, PRUNE = WeightVersions.recover_to, GradAccumulator.take, ExpertWeights.prune_to


def adopted(versions, committed, attempt, line):
    newest = max(versions.store.versions.values(), key=lambda version: version.number, default=None)
    RECOVER(versions, *(newest.number, newest.notes.get("attempt")) if newest else (committed, attempt), line)


def forgetful(weights, message):
    weights._epoch = 0
    return PRUNE(weights, message)


WITHOUT = {
    "decide asks for the attempt": (
        ONE,
        (Ledger, "decide", lambda ledger, step, _, notes: DECIDE(ledger, step, ledger._state.attempt, notes)),
    ),
    "begin asks for the version": (ONE, (Ledger, "new_attempt", lambda ledger, _: NEW_ATTEMPT(ledger, ledger.version))),
    "shards compare versions": (
        TWO,
        (PublishedVersions, "find", lambda found, _, layer: FIND(found, found.committed, layer)),
    ),
    "who starts asks what was decided": (ONE, (WeightVersions, "recover_to", adopted)),
    "epochs go on": (MOVING, (PlacementTable, "renewed", lambda table: replace(table, epoch=1))),
    "shards know the newest table they acted on": (
        replace(BARELY, moves=((1, "a"), (1, "b"))),
        (ExpertWeights, "prune_to", forgetful),
    ),
    "ops are applied once": (ONE, (GradAccumulator, "has", lambda gathered, _: False)),
    "a step is of the ops that were sent": (
        BARELY,
        (GradAccumulator, "take", lambda gathered, attempt, weights, _: TAKE(gathered, attempt, weights)),
    ),
}


@pytest.mark.parametrize(("setting", "patch"), WITHOUT.values(), ids=WITHOUT)
def test_without_a_rule_of_the_code_it_would(tmp_path, setting, patch):
    with real_parts(tmp_path, mock.patch.object(*patch)) as parts:
        found = explore(Protocol(parts, setting))
    print(f"\n{found.told}")
    assert found.violation
    assert found.trace


ASSUMED = {
    "callers hear of a version not before its table": (replace(MOVING, hears_both=False), "another version's content"),
    "who takes over looks again": (replace(TWO, looks_again=False), "cannot be gone on from"),
}
LIMITS = {
    "an old process that was cut off with a step staged, and a caller who reaches it": (
        replace(CUT, cuts_any_time=True, old_commits=True),
        "another version's content",
    ),
}


@pytest.mark.parametrize(("setting", "says"), (ASSUMED | LIMITS).values(), ids=ASSUMED | LIMITS)
def test_beyond_what_is_assumed_it_does(parts, setting, says):
    """ASSUMED is what callers and trainers do. The LIMIT is a known one: the step that was staged is another than the one that
    was decided after the cut."""
    found = explore(Protocol(parts, setting))
    print(f"\n{found.told}")
    assert says in found.violation
