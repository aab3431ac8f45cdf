"""The segment of the KV tier: what is found, what goes first, and what a writer leaves that is killed at any of its writes.

Blocks have 64 bytes of one kind and 32 of another.
"""

import fcntl
import os
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.engine import kv_segment
from trinity.engine.kv_segment import SLOT_BYTES, Known, KVSegment
from trinity.errors import ConfigError

SIZES, LINE = (64, 32), 7
PAGES = 3 * kv_segment.PAGESIZE


def segment_of(folder, num=8):
    return KVSegment(folder, SIZES, PAGES + num * (sum(SIZES) + 2 * SLOT_BYTES))


def key_of(name):
    return sha256(str(name).encode()).digest()


def block_of(name, size=64):
    return np.frombuffer((key_of(name) * 2)[:size], np.uint8)


def put(segment, name, stamp=1, version=1, kind=0):
    with segment.locked() as is_mine:
        assert is_mine
        return segment.kinds[kind].write(
            Known(key_of(name), LINE, version, version), stamp, block_of(name, SIZES[kind])
        )


def get(segment, name, kind=0, line=LINE):
    """-> versions of what is there whole."""
    slots, found = segment.kinds[kind], []
    slots.refresh()
    for newest, _, slot in slots.find(key_of(name), line):
        block = np.empty(SIZES[kind], np.uint8)
        known = slots.read(slot, block)
        if known is not None and known.key == key_of(name):  # others may have written meanwhile
            assert known.newest == newest
            assert np.array_equal(block, block_of(name, SIZES[kind]))
            found.append(newest)
    return sorted(found)


def test_what_one_process_writes_another_finds(tmp_path):
    one, other = segment_of(tmp_path), segment_of(tmp_path)
    put(one, "a")
    put(one, "a", version=2)
    put(one, "b", kind=1)
    assert (get(other, "a"), get(other, "b", 1)) == ([1, 2], [1])
    assert (get(other, "a", 1), get(other, "b"), get(other, "a", line=8)) == ([], [], [])
    assert other.used_bytes == 2 * 64 + 32
    one.close()
    assert get(segment_of(tmp_path), "a") == [1, 2]


def test_the_least_stamp_goes_first_and_what_is_in_use_stays(tmp_path):
    one, other = segment_of(tmp_path, 4), segment_of(tmp_path, 4)
    for stamp, name in enumerate("abcd", 10):
        put(one, name, stamp)
    get(other, "a")
    [(*_, slot)] = other.kinds[0].find(key_of("a"), LINE)
    other.kinds[0].touch([slot], [50])
    assert put(other, "e", 20)
    assert [get(one, name) for name in "abcde"] == [[1], [], [1], [1], [1]]
    assert not put(one, "f", 5), "it would be the next to go"
    assert [get(one, name) for name in "acdef"] == [[1]] * 4 + [[]]
    assert (one.kinds[0].num_evicted, other.kinds[0].num_evicted) == (0, 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(1, 40), st.booleans()), max_size=25))
def test_any_order_of_writes_and_drops_by_two(tmp_path_factory, trace):
    """Like a dict of the highest stamps; each sees what the other did."""
    folder = tmp_path_factory.mktemp("tier")
    both, model = [segment_of(folder, 5), segment_of(folder, 5)], dict[int, int]()
    for who, name, stamp, is_drop in trace:
        segment = both[who]
        with segment.locked():
            slots = [slot for *_, slot in segment.kinds[0].find(key_of(name), LINE)]
            if is_drop or slots:
                segment.kinds[0].drop(slots)
        model.pop(name, None)
        if not is_drop:
            least = min(model.values(), default=0) if len(model) == 5 else 0
            if put(segment, name, stamp):
                if len(model) == 5:
                    model.pop(next(each for each in model if model[each] == least and not get(segment, each)))
                model[name] = stamp
            else:
                assert stamp < least
        for each in both:
            assert {name for name in range(10) if get(each, name)} == set(model)


FORKED = """
import os, signal, sys
from pathlib import Path
from tests.unit import test_kv_segment as t
from trinity.engine import kv_segment

folder = Path(sys.argv[1])

def write_until(steps):
    def tracer(frame, event, arg):
        nonlocal steps
        if frame.f_code.co_filename != kv_segment.__file__:
            return None
        steps -= event == "line"
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return tracer

    segment = t.segment_of(folder, 2)
    sys.settrace(tracer)
    for stamp, name in enumerate("xyz", 20):
        t.put(segment, name, stamp)
    os._exit(0)

steps, ended = 1, None
while ended != 0:
    mine = t.segment_of(folder, 2)
    assert t.put(mine, "a", 1) and t.get(mine, "a")
    child = os.fork() or write_until(steps)
    ended, steps = os.waitpid(child, 0)[1], steps + 1
    assert ended in (0, signal.SIGKILL)
    there = [name for name in "axyz" if t.get(mine, name)]
    assert there in (list("a"), list("ax"), list("x"), list("xy"), list("y"), list("yz")), there
    assert t.put(mine, "b", 100) and t.get(mine, "b"), "nobody is kept from writing"
    with mine.locked():
        mine.kinds[0].drop(range(2))
    mine.close()
print(steps)
"""


def test_a_writer_killed_at_any_line_leaves_whole_blocks_and_no_lock(tmp_path):
    """By SIGKILL, in a process of its own, at each line of three writes into two slots."""
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


HAMMERED = """
import os, random, signal, sys
from pathlib import Path
import numpy as np
from tests.unit import test_kv_segment as t

def write_on():
    segment, rng, parent = t.segment_of(Path(sys.argv[1]), 3), random.Random(os.getpid()), os.getppid()
    while os.getppid() == parent:
        name, stamp = rng.randrange(6), rng.randrange(1, 9)
        with segment.locked() as is_mine:
            if is_mine and rng.random() < 0.1:
                segment.kinds[0].drop([rng.randrange(3)])
            elif is_mine:
                segment.kinds[0].write(t.Known(t.key_of(name), t.LINE, 1, 1), stamp, t.block_of(name))

children = [os.fork() or write_on() for _ in range(2)]
mine, num = t.segment_of(Path(sys.argv[1]), 3), 0
while num < 500:
    num += sum(len(t.get(mine, name)) for name in range(6))
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(t.put(mine, "a", 99), mine.kinds[0].num_damaged)
"""


def test_who_reads_while_two_write_gets_whole_blocks(tmp_path):
    """Of few keys and slots, as fast as they can; `get` looks at every byte. Nothing is taken for damaged either."""
    command = [sys.executable, "-c", HAMMERED, str(tmp_path)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr[-2000:]


def test_a_writer_that_stops_for_ever_keeps_nobody_waiting(tmp_path):
    stopped, other = segment_of(tmp_path), segment_of(tmp_path)
    put(stopped, "a")
    with stopped.locked() as first, other.locked() as second:
        assert (first, second) == (True, False)
        assert get(other, "a") == [1]
        assert get(segment_of(tmp_path), "a") == [1], "who comes anew neither"


def test_a_torn_block_is_no_block_and_its_slot_is_used_again(tmp_path, monkeypatch):
    segment, other = segment_of(tmp_path, 1), segment_of(tmp_path, 1)
    put(segment, "a")
    whole = os.pwrite

    def die(fd, data, at):
        whole(fd, bytes(data)[:30], at)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", die)
    with pytest.raises(KeyboardInterrupt):
        put(segment, "b", 2)
    monkeypatch.undo()
    assert (get(other, "a"), get(other, "b")) == ([], [])
    assert put(other, "c", 1)
    assert get(segment, "c") == [1]


def test_memory_that_is_used_up_fails_a_write_and_nothing_else(tmp_path, monkeypatch):
    segment = segment_of(tmp_path, 2)
    put(segment, "a")

    def full(fd, data, at):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert not put(segment, "b", 2)
    monkeypatch.undo()
    assert (get(segment, "a"), get(segment, "b")) == ([1], [])
    assert put(segment, "b", 2)


@pytest.mark.parametrize("where", ["block", "key", "version", "number"])
def test_damaged_memory_is_not_read_and_is_dropped(tmp_path, where):
    segment = segment_of(tmp_path, 2)
    put(segment, "a")
    slots = segment.kinds[0]
    [(*_, slot)] = slots.find(key_of("a"), LINE)
    if where == "block":
        os.pwrite(segment._fd, b"\xff" * 3, slots._at(slot) + 9)
    elif where == "key":
        slots._key_N[slot, 3] ^= 1
    elif where == "version":
        slots._newest_N[slot] = 2
    else:
        slots._number_N[slot] += 2
        slots._check_N[slot] += 1
    block = np.empty(64, np.uint8)
    assert slots.read(slot, block) is None
    assert slots.num_damaged == 1
    with segment.locked():
        assert not slots.num_used


def test_a_file_that_is_no_segment_is_made_one_and_one_half_made_made_anew(tmp_path):
    path = tmp_path / f"kv-{segment_of(tmp_path).name}"
    whole = path.read_bytes()
    for content in (b"", b"junk" * 5000, bytes(len(whole)), whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert put(segment_of(tmp_path), "a")
        assert get(segment_of(tmp_path), "a") == [1]


@pytest.mark.parametrize("what", ["link", "folder", "pipe", "readable", "shared"])
def test_what_is_somebody_elses_is_refused(tmp_path, what):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / f"kv-{segment_of(tmp_path).name}"
    if what == "link":
        path.symlink_to(tmp_path / "theirs")
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.touch(0o600)
        path.chmod(0o644) if what == "readable" else os.link(path, tmp_path / "other")
    with pytest.raises(ConfigError, match="memory_dir"):
        segment_of(tmp_path / "mine")
    assert not (tmp_path / "theirs").exists()


def test_sizes_that_cannot_be_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="raise it to at least"):
        KVSegment(tmp_path, SIZES, 100)
    with pytest.raises(ConfigError, match="shm-size"):
        KVSegment(tmp_path, SIZES, 1 << 60)
    assert segment_of(tmp_path, 1).kinds[0].num == 1


def test_it_is_for_its_owner_and_no_child_has_it(tmp_path):
    segment = segment_of(tmp_path)
    [path] = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert fcntl.fcntl(segment._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
