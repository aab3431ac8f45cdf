"""Names of versions, and engines over a run that trains: what they read is never taken for the same step of another line,
whatever happens between two looks."""

from types import SimpleNamespace

import pytest

from actors.sync import live_weights
from actors.sync.live_weights import LiveWeights
from trinity.dispatch.dispatcher import Dispatcher
from trinity.errors import StepConflict, Unavailable, VersionGone
from trinity.placement.table import PlacementTable
from trinity.utils.lines import line_of, named, oldest_of, step_of


def test_a_name_is_of_a_line_and_a_step_and_later_lines_are_greater():
    assert (line_of(named(7, 5)), step_of(named(7, 5))) == (7, 5)
    assert (named(0, 12), line_of(12), step_of(12)) == (12, 0, 12)
    assert (named(7, -1), line_of(-1), step_of(-1)) == (-1, 0, -1)
    assert named(7, 1 << 29) < named(8, 0) < named(8, 1)
    assert named(1 << 32, 1 << 29) < 1 << 63, "it fits into a frame"
    assert [oldest_of(named(7, 5), age) for age in (0, 2, 9, None)] == [named(7, step) for step in (5, 3, 0, 0)]


class Service:
    """A placement service that knows the line of what shards load now."""

    def __init__(self):
        self.line, self.is_away = 4, False

    def next_line(self):
        if self.is_away:
            raise Unavailable("away")
        return self.line


@pytest.fixture
def weights():
    found = object.__new__(LiveWeights)
    found.pool, found._candidates, found._identity = SimpleNamespace(service=Service()), list, "pool"
    return found


@pytest.fixture
def load(weights, monkeypatch):
    """-> load(version, meanwhile): what its dispatcher asks for then."""
    experts = Dispatcher(PlacementTable.spread((1,), 4, ["a"]), None, timeout_s=1.0)

    def loaded(version, meanwhile=lambda: None):
        monkeypatch.setattr(live_weights.shm_state, "from_any", lambda places, step, take: meanwhile())
        weights._load(SimpleNamespace(experts=experts), version)
        return experts.version

    return loaded


def test_a_backbone_is_of_the_line_that_the_run_was_at_before_and_after_it_was_read(weights, load):
    service = weights.pool.service
    assert load(named(4, 9)) == named(4, 9)
    for old in (3, 5):
        with pytest.raises(VersionGone, match="the run has gone back since version 9"):
            load(named(old, 9))
    with pytest.raises(VersionGone):
        load(named(4, 9), lambda: setattr(service, "line", 5))
    service.is_away = True
    with pytest.raises(StepConflict, match="is not known"):
        load(named(5, 9))


def test_equal_steps_of_two_lines_have_other_names_for_what_is_cached(weights):
    assert weights.line(named(4, 9)) == weights.line(named(4, 2)) == "pool/4"
    assert weights.line(named(5, 9)) == "pool/5"
