"""ModelDoubleBuffer of versions: which are made, which are used again, and what happens beside a pass."""

import threading

import pytest

from trinity.engine.double_buffer import ModelDoubleBuffer
from trinity.errors import VersionGone


class Made:
    def __init__(self):
        self.version = None


class Source:
    """Fills models, as fast as `may_load` lets it; versions in `gone` are not there."""

    def __init__(self):
        self.num_made, self.loaded, self.gone = 0, [], set()
        self.may_load = threading.Event()
        self.may_load.set()

    def make(self):
        self.num_made += 1
        return Made()

    def load(self, model, version):
        model.version = None
        assert self.may_load.wait(10)
        if version in self.gone:
            raise VersionGone(f"version {version} is gone")
        model.version = version
        self.loaded.append(version)


@pytest.fixture
def source():
    return Source()


def test_passes_go_on_with_one_version_while_the_next_is_copied(source):
    models = ModelDoubleBuffer(source.make, source.load)
    first = models.get(1)
    source.may_load.clear()
    thread = threading.Thread(target=models.prepare, args=(2,))
    thread.start()
    assert models.get(1) is first
    assert first.version == 1
    source.may_load.set()
    thread.join()
    assert models.get(1) is first
    assert models.get(2).version == 2
    assert source.loaded == [1, 2]


def test_two_models_take_turns(source):
    models = ModelDoubleBuffer(source.make, source.load)
    models.get(0)
    for version in range(1, 20):
        models.prepare(version)
        assert models.get(version).version == version
    assert source.num_made == 2


def test_a_version_that_no_pass_asked_for_makes_room_for_the_next(source):
    models = ModelDoubleBuffer(source.make, source.load)
    used = models.get(0)
    for version in range(1, 20):
        models.prepare(version)
    assert used.version == 0
    assert models.get(0) is used
    assert models.get(19).version == 19
    assert source.num_made == 2


def test_what_is_ready_is_not_loaded_again(source):
    models = ModelDoubleBuffer(source.make, source.load)
    models.get(1)
    models.prepare(1)
    models.prepare(2)
    models.prepare(2)
    assert source.loaded == [1, 2]


def test_without_room_for_two_the_one_is_written_over(source):
    models = ModelDoubleBuffer(source.make, source.load, beside=False)
    first = models.get(1)
    models.prepare(2)
    assert first.version == 1
    assert models.get(2) is first
    assert (first.version, source.num_made) == (2, 1)


@pytest.mark.parametrize("beside", [True, False])
def test_a_held_version_stays_until_it_is_released(source, beside):
    models = ModelDoubleBuffer(source.make, source.load, beside)
    held = models.get(1)
    models.hold(1)
    for version in range(2, 6):
        models.prepare(version)
        assert models.get(version).version == version
        assert models.get(1, hold=True) is held
        assert held.version == 1
    models.release(1)
    models.prepare(6)
    assert models.get(6).version == 6
    assert source.num_made == (3 if beside else 2)


def test_one_that_is_ready_can_be_held_before_a_pass_used_it(source):
    models = ModelDoubleBuffer(source.make, source.load)
    models.get(1)
    models.prepare(2)
    models.hold(2)
    models.prepare(3)
    assert models.get(2, hold=True).version == 2
    assert models.get(3).version == 3
    assert source.loaded == [1, 2, 3]


def test_a_version_that_has_gone_leaves_the_one_in_use(source):
    models = ModelDoubleBuffer(source.make, source.load)
    used = models.get(1)
    source.gone.add(2)
    for ask in (models.prepare, models.get):
        with pytest.raises(VersionGone):
            ask(2)
        assert models.get(1) is used
        assert used.version == 1
    models.prepare(3)
    assert models.get(3).version == 3
    assert source.num_made == 2


def test_no_pass_ever_sees_a_model_that_is_being_filled(source):
    models, stop = ModelDoubleBuffer(source.make, source.load), threading.Event()
    ready = [0]

    def prepare():
        for version in range(1, 3000):
            models.prepare(version)
            ready[0] = version
        stop.set()

    models.get(0)
    thread = threading.Thread(target=prepare)
    thread.start()
    while not stop.is_set():
        version = ready[0]
        model = models.get(version)
        assert model.version == version
        assert model.version == version
    thread.join()
    assert source.num_made == 2


def test_no_more_are_made_than_are_needed_at_once(source):
    """Requests that pin versions come and go: what they leave is used again."""
    models = ModelDoubleBuffer(source.make, source.load)
    models.get(0)
    for version in range(1, 50):
        models.prepare(version)
        models.get(version)
        models.hold(version)
        if version > 2:
            models.release(version - 2)
    assert source.num_made == 4
