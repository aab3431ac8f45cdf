"""The cache's bookkeeping alone: whatever is read at a slot is what belongs there, under any trace and in any shortage.

In place of keys and values a slot holds the text up to its token, so that what a token looks back at can be compared.
"""

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.engine_fakes import fake_config
from trinity.config import EngineConfig
from trinity.engine.block_pool import Content
from trinity.engine.block_table import Tips
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_layout import plan_layout, window_blocks
from trinity.engine.prefix_keys import extend

MOST, ROWS = 30, 3
TEXTS = [(0,) * MOST, (1,) * MOST, (0,) * 7 + (1,) * (MOST - 7), (0,) * 19 + (2,) * (MOST - 19), tuple(range(MOST))]


class Texts:
    """Rows of texts that grow in a cache, and what its slots hold."""

    def __init__(self, window, block_size, slack):
        whole = -(-MOST // block_size)
        blocks = whole + min(whole, window_blocks(window, block_size)) + slack
        room = {
            "max_model_len": MOST,
            "max_num_seqs": ROWS,
            "kv_cache_bytes": blocks * 64 * block_size,
            "max_draft_tokens": 0,
        }
        layout = plan_layout(fake_config(window), EngineConfig(block_size=block_size, **room), 4)
        self.cache, self.size = KVCache(layout, ROWS), block_size
        self.slots = {kind: {} for kind in self.cache.tables}
        self.rows: dict[int, list] = {}  # row: [text, tokens computed, keys, tips]

    def begin(self, text, length, tips):
        keys: list[bytes] = []
        extend(keys, b"", text, self.size, length // self.size)
        hit = self.cache.match(keys[: (length - 1) // self.size], 1, 1)
        if len(self.rows) == ROWS or not self.cache.fits(length, hit):
            return
        tips = Tips((len(keys),), tuple(sorted(set(tips))))
        self.rows[self.cache.open_row(hit)] = [text[:length], hit.num_blocks * self.size, keys, tips]

    def compute(self, counts):
        """One pass: a chunk of each row, what is past is read before anything is written, single tokens after."""
        chunks = []
        for row, (text, start, *_) in sorted(self.rows.items()):
            end = min(len(text), start + counts[row])
            if start < end and row in self.rows:
                while not self.cache.grow(row, end):
                    last = max(other for other in self.rows if other > row or other == row)
                    if last == row:
                        break
                    self.end(last)
                else:
                    chunks.append((row, start, end))
        chunks = [chunk for chunk in chunks if chunk[0] in self.rows]
        are_kept = [self.keep(*chunk) for chunk in chunks]
        for row, start, end in chunks:
            if end - start > 1:
                self.read(row, start, start)
        for row, start, end in chunks:
            self.write(row, start, end)
        for row, start, end in chunks:
            if end - start == 1:
                self.read(row, start, end)
        for row, start, end in chunks:
            self.computed(row, start, end)
        self.check()
        assert all(is_there() for some in are_kept for is_there in some)

    def keep(self, row, start, end):
        """Ask for the windows that end in the chunk; -> functions that say, after the pass, whether what it computes of each is
        there, of those for which there was room."""
        _, _, keys, tips = self.rows[row]
        found = []
        for kind, table in self.cache.tables.items():
            for tip in sorted(each for each in chain(*tips) if end - start > 1 and start < each * self.size <= end):
                place_C = np.arange(max(start // self.size, tip - (table.reach or 0)), tip)
                lacks, room = sum(table.block_NC[row, place_C] < 0), table.pool.num_available
                is_behind = start % self.size and start // self.size < table.first_N[row]  # written over by its own row
                table.keep(row, (start, end), Tips((tip,)))
                if lacks <= room and not is_behind:
                    found.append(lambda kind=kind, place_C=place_C: self.has(kind, keys, place_C))
        return found

    def has(self, kind, keys, place_C):
        return all(self.cache.has(kind, keys[place], 1, 1) for place in place_C)

    def read(self, row, at, end):
        """What the token `at` sees of the positions before `end`."""
        for kind, table in self.cache.tables.items():
            first = 0 if kind.window is None else max(0, at - kind.window + 1)
            for position, slot in zip(range(first, end), table.slots(row, np.arange(first, end)), strict=True):
                assert self.slots[kind][int(slot)] == self.rows[row][0][: position + 1]

    def write(self, row, start, end):
        position_T = np.arange(start, end)
        for kind, table in self.cache.tables.items():
            for at, slot in zip(*table.written(np.full(end - start, row), position_T), strict=True):
                self.slots[kind][int(slot)] = self.rows[row][0][: position_T[at] + 1]

    def computed(self, row, start, end):
        _, _, keys, tips = self.rows[row]
        self.rows[row][1] = end
        places = range(start // self.size, end // self.size)
        self.cache.know(row, (start, end), [Content(keys[place], 1, 1) for place in places], tips)
        if places:
            self.cache.trim(row, end, tips)

    def end(self, row):
        self.cache.close_row(row)
        del self.rows[row]

    def check(self):
        self.cache.check(sorted(self.rows))
        for table in self.cache.tables.values():
            held = [len(table.held(row)) for row in self.rows]
            assert all(num <= 2 * table.blocks_per_seq for num in held)


actions = st.one_of(
    st.tuples(
        st.just("begin"), st.sampled_from(TEXTS), st.integers(2, MOST), st.lists(st.integers(1, MOST), max_size=3)
    ),
    st.tuples(
        st.just("begin"), st.sampled_from(TEXTS), st.integers(2, MOST), st.lists(st.integers(1, MOST), max_size=3)
    ),
    st.tuples(st.just("compute"), st.lists(st.sampled_from([1, 1, 2, 5, 30]), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("compute"), st.lists(st.sampled_from([1, 1, 2, 5, 30]), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("end"), st.integers(0, ROWS - 1)),
)


@settings(max_examples=250, deadline=None)
@given(
    trace=st.lists(actions, max_size=60),
    window=st.integers(1, 12),
    block_size=st.integers(1, 5),
    slack=st.integers(0, 20),
)
def test_what_is_read_is_what_was_written_for_it(trace, window, block_size, slack):
    texts = Texts(window, block_size, slack)
    for name, *rest in trace:
        if name != "end" or rest[0] in texts.rows:
            getattr(texts, name)(*rest)
        texts.check()
    for row in list(texts.rows):
        texts.end(row)
    assert texts.cache.num_free_blocks == texts.cache.num_total_blocks
    texts.cache.drop(lambda oldest, newest: True)
    assert texts.cache.num_idle_blocks == 0
