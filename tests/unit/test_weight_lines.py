"""The line of weights that a version belongs to, as engines over a run that trains hear of it: never a wrong one, whatever
happens between two looks."""

from types import SimpleNamespace

import pytest

from actors.pool import RayLedger
from actors.sync.live_weights import LiveWeights
from trinity.errors import Unavailable
from trinity.pool.ledger import Decision


class Service:
    """A placement service that remembers the last decision."""

    def __init__(self):
        self.decision, self.is_away = None, False

    def ask(self, what, *arguments, timeout_s=None):
        if self.is_away:
            raise Unavailable("away")
        if what == "decided":
            return self.decision
        version, notes = arguments[0], arguments[-1]
        self.decision = Decision(version, notes)
        return None

    def identity(self):
        return "pool"


def looking(service):
    weights = object.__new__(LiveWeights)
    weights.pool, weights._lines = SimpleNamespace(service=service, decided=lambda: service.ask("decided")), {}
    return weights


def read(weights, version, meanwhile=lambda: None):
    """The line that a version is said to be of, which was read while something else happened."""
    before = weights._line_now(version)
    meanwhile()
    weights._note_line(version, before)
    return weights.line(version)


@pytest.fixture
def service():
    return Service()


def test_steps_of_one_job_are_of_one_line_and_those_after_going_back_of_another(service):
    job, weights = RayLedger(service, 1.0), looking(service)
    job.begin(3, {})
    first = read(weights, 3)
    job.decide(4, 0, {})
    assert read(weights, 4) == first is not None
    again = RayLedger(service, 1.0)
    again.begin(3, {})
    again.decide(4, 0, {})
    assert read(weights, 4) not in (first, None)
    assert weights.line(3) == first
    assert weights.line(5) is None


def test_a_job_that_another_process_goes_on_with_keeps_its_line(service):
    job, weights = RayLedger(service, 1.0), looking(service)
    job.begin(3, {})
    first = read(weights, 3)
    RayLedger(service, 1.0).decide(4, 0, {"mine": 1})
    assert read(weights, 4) == first
    assert service.decision.notes["mine"] == 1


def test_what_is_not_sure_has_no_line(service):
    job, weights = RayLedger(service, 1.0), looking(service)
    assert read(weights, 3) is None, "nothing is decided"
    job.begin(3, {})
    assert read(weights, 4) is None, "the job is not there yet"
    assert read(weights, 3, lambda: RayLedger(service, 1.0).begin(3, {})) is None, "it has begun again meanwhile"
    service.is_away = True
    assert read(weights, 3) is None
    service.is_away, service.decision = False, Decision(9, {})
    assert read(weights, 3) is None, "an older release decided it"


def test_a_job_of_before_is_asked_for_its_line_once(service):
    service.decision = Decision(3, {})
    job, asked, whole = RayLedger(service, 1.0), [], service.ask

    def ask(what, *arguments, **more):
        asked.append(what)
        return whole(what, *arguments, **more)

    service.ask = ask
    job.decide(4, 0, {})
    job.decide(5, 0, {})
    assert asked == ["decided", "decide", "decide"]
    assert read(looking(service), 5) is None
