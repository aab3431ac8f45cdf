"""The store: versions keep their values, a reopened store has what was committed, and a kill leaves one version or the next."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.unit.store_writer import LIKE, write_for_ever
from trinity.errors import ConfigError, StepConflict, VersionGone
from trinity.state.reader import Reader, read
from trinity.state.versioned_store import HEAD, LOCK, Store, Version

SHAPES = {"a": (3, 4), "b": (7,), "none": (0, 5)}


def filled(store, number, value, shapes=SHAPES):
    tensors = {name: store.empty_like(torch.empty(shape)).fill_(value) for name, shape in shapes.items()}
    return Version(number, tensors, {"value": value})


def values(version):
    return {name: tensor.clone() for name, tensor in version.tensors.items()}


def assert_same(found, wanted):
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, wanted[name]), f"{name} of version {found.number}"


def named_files(store):
    """What the folder should hold: the head, the lock, versions, their memory, and what is free to be written again."""
    versions = {f"v-{number:06d}.json" for number in store.versions}
    return store.memory.files | versions | {LOCK} | ({HEAD} if store.committed >= 0 else set())


class Trace(RuleBasedStateMachine):
    """Whatever is done to a store in a folder, a plain dict of copies says what it must hold."""

    folder, numbers = None, itertools.count()  # the test says where

    def __init__(self):
        super().__init__()
        self.path = self.folder / str(next(self.numbers))
        self.store, self.value = Store(self.path), 0
        self.reader = Reader(self.path)
        self.model: dict[int, dict[str, torch.Tensor]] = {}
        self.committed, self.held = -1, []

    def _value(self):
        self.value += 1
        return float(self.value)

    def _put(self, version):
        self.store.put(version)
        self.model[version.number] = values(version)

    @precondition(lambda self: self.committed < 0)
    @rule(number=st.integers(0, 5))
    def begin(self, number):
        self._put(filled(self.store, number, self._value()))
        self.store.commit(number)
        self.committed = number

    @precondition(lambda self: self.committed >= 0)
    @rule()
    def stage(self):
        self._put(filled(self.store, self.committed + 1, self._value()))

    @precondition(lambda self: self.committed >= 0)
    @rule(num=st.integers(1, 9))
    def restack(self, num):
        """Other contents of the present version: one tensor of another size, the others shared with it as it was."""
        now = self.store.current
        new = self.store.empty_like(now.tensors["a"], num).fill_(self._value())
        self._put(Version(now.number, {**now.tensors, "a": new}, now.notes))

    @precondition(lambda self: self.committed >= 0)
    @rule()
    def abandon(self):
        """A version that was begun and given up."""
        filled(self.store, self.committed + 1, self._value())
        self.discard_staged()

    @rule()
    def discard_staged(self):
        self.store.discard_staged()
        self.model = {n: kept for n, kept in self.model.items() if n <= self.committed}

    @precondition(lambda self: self.committed + 1 in self.model)
    @rule()
    def commit(self):
        self.committed += 1
        self.store.commit(self.committed)

    @rule(data=st.data())
    def hold(self, data):
        if self.store.numbers:
            number = data.draw(st.sampled_from(self.store.numbers))
            self.store.hold(number)
            self.held.append(number)

    @precondition(lambda self: self.held)
    @rule()
    def release(self):
        self.store.release(self.held.pop())

    @precondition(lambda self: self.committed >= 0)
    @rule(keep=st.sets(st.integers(0, 8)), weights_only=st.booleans())
    def retire(self, keep, weights_only):
        self.store.retire(keep, (lambda name: name != "b") if weights_only else None)
        stay = {self.committed, *keep, *self.held}
        self.model = {n: kept for n, kept in self.model.items() if n in stay}
        for number in self.model.keys() & keep - {self.committed, *self.held} if weights_only else ():
            self.model[number].pop("b", None)

    @precondition(lambda self: self.committed >= 0)
    @rule(data=st.data())
    def roll_back(self, data):
        self.committed = data.draw(st.sampled_from(self.store.numbers))
        self.store.roll_back(self.committed)
        self.model = {n: kept for n, kept in self.model.items() if n <= self.committed}
        self.held = [n for n in self.held if n in self.model]

    @rule()
    def trim(self):
        self.store.trim()

    @rule()
    def clear(self):
        self.store.clear()
        self.model, self.committed, self.held = {}, -1, []

    @rule()
    def kill(self):
        """Its process is gone, and what it was about to make; the next one takes the folder up."""
        filled(self.store, 0, self._value())
        (self.path / ".0badc0de").write_text("{")  # in the middle of replacing a file
        self.store, self.held = Store(self.path), []
        if self.committed < 0:
            self.model = {}

    @invariant()
    def versions_are_as_they_were_put(self):
        assert self.store.committed == self.committed
        assert self.store.versions.keys() == self.model.keys()
        for number, wanted in self.model.items():
            assert_same(self.store.versions[number], wanted)
        staged = self.store.staged
        assert (None if staged is None else staged.number) == (
            self.committed + 1 if self.committed + 1 in self.model else None
        )

    @invariant()
    def others_read_the_same(self):
        for number, wanted in self.model.items():
            if self.committed >= 0:
                assert_same(read(self.path, number), wanted)
                with self.reader.lent(number) as found:
                    assert_same(found, wanted)

    @invariant()
    def no_file_is_left_that_nobody_names(self):
        assert {path.name for path in self.path.iterdir()} == named_files(self.store)


def test_any_trace_keeps_all_versions_to_the_bit(tmp_path):
    class Here(Trace):
        folder = tmp_path

    quick = settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Here, settings=quick)


def test_memory_is_used_again_so_that_steps_need_no_more(tmp_path):
    store = Store(tmp_path / "s")
    store.put(filled(store, 0, 0.0))
    store.commit(0)
    sizes = []
    for number in range(1, 8):
        store.retire()
        store.put(filled(store, number, float(number)))
        store.commit(number)
        sizes.append(store.num_bytes)
    assert set(sizes[1:]) == {sizes[1]}


def test_a_version_that_does_not_follow_is_refused_and_one_that_has_gone_is_named(tmp_path):
    store = Store(tmp_path / "s")
    store.put(filled(store, 3, 1.0))
    store.commit(3)
    with pytest.raises(StepConflict, match="does not follow"):
        store.put(filled(store, 5, 1.0))
    for missing in (lambda: store.get(2), lambda: store.commit(4), lambda: store.hold(9), lambda: store.roll_back(2)):
        with pytest.raises(VersionGone):
            missing()
    with pytest.raises(VersionGone):
        read(tmp_path / "s", 4)
    with pytest.raises(VersionGone):
        read(tmp_path / "nothing")


def test_layouts_and_types_survive(tmp_path):
    store = Store(tmp_path / "s")
    source = {"t": torch.randn(2, 5, 3).mT, "half": torch.randn(4).bfloat16(), "one": torch.tensor([7])}
    tensors = {name: store.empty_like(tensor).copy_(tensor) for name, tensor in source.items()}
    store.put(Version(0, tensors, {"deep": {"x": [1, None]}}))
    store.commit(0)
    for found in (Store(tmp_path / "s").current, read(tmp_path / "s")):
        assert_same(found, source)
        assert {n: t.stride() for n, t in found.tensors.items()} == {n: t.stride() for n, t in tensors.items()}
        assert found.notes == {"deep": {"x": [1, None]}}


def test_no_room_is_a_setting_to_change_and_not_a_shard_that_is_away(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trinity.state.files.os.posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"28 bytes.*--shm-size"):
        store.empty_like(torch.empty(7))
    assert not list((tmp_path / "s").glob("t-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_keep_no_descriptors(tmp_path):
    store = Store(tmp_path / "s")
    before = len(list(Path("/proc/self/fd").iterdir()))
    store.put(filled(store, 0, 1.0, {f"t{n}": (3,) for n in range(50)}))
    store.commit(0)
    again, copied = Store(tmp_path / "s"), read(tmp_path / "s")
    assert len(again.current.tensors) == len(copied.tensors) == 50
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the second store's lock


# -- other processes


@pytest.fixture(scope="module")
def processes():
    """Torch is imported once, for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([write_for_ever.__module__])
    return context


def writer(processes, folder):
    """-> the process, and what says when it has taken the folder up."""
    ready, told = processes.Pipe(duplex=False)
    child = processes.Process(target=write_for_ever, args=(folder, told), daemon=True)
    child.start()
    return child, ready


def started(processes, folder):
    child, ready = writer(processes, folder)
    ready.recv()
    return child


def ended(child):
    child.kill()
    child.join()


def assert_whole(version):
    assert version.notes["number"] == version.number
    for name, tensor in version.tensors.items():
        assert (tensor == version.number).all(), f"{name} of version {version.number} is torn"


def test_a_reader_never_sees_half_of_a_version(tmp_path, processes):
    child, newest, until_s = started(processes, tmp_path / "s"), 0, time.monotonic() + 1.0
    reader, copies = Reader(tmp_path / "s"), {name: torch.empty_like(tensor) for name, tensor in LIKE.items()}
    num_lent = 0
    for is_by_number in itertools.cycle((False, True)):
        if time.monotonic() > until_s and newest > 5:
            break
        with suppress(VersionGone):  # it may commit faster than we copy
            found = read(tmp_path / "s", newest if is_by_number else None)
            assert_whole(found)
            newest = max(newest, found.number)
        with suppress(VersionGone):
            with reader.lent(newest if is_by_number else None) as found:
                for name, tensor in found.tensors.items():
                    copies[name].copy_(tensor)
            assert_whole(replace(found, tensors={name: copies[name] for name in found.tensors}))
            num_lent += 1
    assert num_lent > 5
    ended(child)


def test_memory_that_was_given_back_is_not_kept_by_a_reader(tmp_path):
    store, reader = Store(tmp_path / "s"), Reader(tmp_path / "s")
    store.put(filled(store, 0, 1.0))
    store.commit(0)
    with reader.lent(0) as found:
        assert len(found.tensors) == len(SHAPES)
    store.clear()
    store.trim()
    store.put(filled(store, 1, 2.0, {"a": (2, 2)}))
    store.commit(1)
    del found
    with reader.lent(None) as found:
        assert_same(found, {"a": torch.full((2, 2), 2.0)})
        assert mapped_files(tmp_path) == store.memory.files


def mapped_files(folder):
    """Maps of this process; what was unlinked ends in "(deleted)"."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    return {line.partition(str(folder))[2].removeprefix("/s/") for line in lines}


def test_a_kill_at_any_moment_leaves_a_version_or_the_next(tmp_path, processes):
    chance, folder, last = random.Random(1), tmp_path / "s", 0
    for _ in range(15):
        child = started(processes, folder)
        time.sleep(chance.uniform(0.0, 0.1))
        ended(child)
        store = Store(folder)
        assert store.committed >= last
        assert store.numbers[-1] == store.committed
        for version in store.versions.values():
            assert_whole(version)
        assert store.current.tensors.keys() == LIKE.keys()
        assert {path.name for path in folder.iterdir()} == named_files(store)
        last = store.committed
        del store  # and with it the lock
    assert last > 0


def test_a_successor_waits_until_the_process_before_is_dead(tmp_path, processes):
    """One that was taken for dead may still be about to write."""
    first = started(processes, tmp_path / "s")
    os.kill(first.pid, signal.SIGSTOP)
    second, ready = writer(processes, tmp_path / "s")
    assert not ready.poll(0.5)
    ended(first)
    assert ready.recv() >= 0
    ended(second)
