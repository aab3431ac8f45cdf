"""Blocks by themselves: whoever holds them, what is found again, and what goes first."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.engine.block_pool import BlockPool, Content
from trinity.engine.prefix_keys import extend, root


def known(pool, *keys, version=1):
    """Blocks that are full and held, in order."""
    blocks = [pool.take() for _ in keys]
    for block, key in zip(blocks, keys, strict=True):
        pool.know(block, Content(key, version, version))
    return blocks


def find(pool, *keys):
    return [pool.find(key, 1, 1) for key in keys]


def test_what_was_let_go_first_goes_first_and_what_is_not_worth_keeping_before_all():
    pool = BlockPool(5)
    a, b, c, d, _ = known(pool, b"a", b"b", b"c", b"d", b"e")
    for block, keep in ((b, True), (a, True), (c, False), (d, False)):
        pool.let_go(block, keep)
    gone = []
    for _ in range(4):
        pool.take()
        gone.append([key for key in (b"a", b"b", b"c", b"d") if pool.find(key, 1, 1) is None])
    assert [len(each) for each in gone] == [1, 2, 3, 4]
    assert gone[:3] == [[b"d"], [b"c", b"d"], [b"b", b"c", b"d"]]
    assert find(pool, b"e") != [None], "nobody takes what is held"


def test_found_again_it_is_nobody_elses_to_take():
    pool = BlockPool(2)
    a, b = known(pool, b"a", b"b")
    pool.let_go(a)
    pool.let_go(b)
    pool.hold(pool.find(b"a", 1, 1))
    assert pool.take() == b
    assert pool.num_available == 0
    pool.check([a, b])


def test_versions_lie_side_by_side_and_the_youngest_that_may_be_used_is_found():
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for block, (oldest, newest) in zip(blocks, ((1, 1), (1, 3), (3, 3), (4, 4)), strict=True):
        pool.know(block, Content(b"a", oldest, newest))
    ages = [(3, 3), (1, 1), (0, 2), (1, 3), (2, 4), (5, 9), (2, 2)]
    assert [pool.find(b"a", *age) for age in ages] == [
        blocks[i] if i is not None else None for i in (2, 0, 0, 2, 3, None, None)
    ]
    pool.drop(lambda oldest, newest: oldest <= 3 <= newest)
    assert [pool.find(b"a", *age) for age in ((3, 3), (1, 4))] == [None, blocks[3]]
    pool.check(blocks)


def test_the_latest_of_the_same_content_is_the_one():
    pool = BlockPool(3)
    (first,) = known(pool, b"a")
    pool.let_go(first)
    (second,) = known(pool, b"a")
    assert pool.find(b"a", 1, 1) == second
    assert pool.num_idle == 0, "the other one is free"
    pool.forget_key(b"a")
    assert pool.find(b"a", 1, 1) is None
    pool.check([second])


@settings(max_examples=150, deadline=None)
@given(
    num=st.integers(1, 6),
    trace=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 2)), max_size=60),
)
def test_any_trace(num, trace):
    """Blocks are never lost, never found with another content, never taken from a holder."""
    pool, held, contents = BlockPool(num), [], {}
    for what, which, version in trace:
        key, block = bytes([which]), held[which % len(held)] if held else None
        if what == 0 and pool.num_available:
            held.append(pool.take())
            contents.pop(held[-1], None)
        elif what == 1 and block is not None:
            held.remove(block)
            pool.let_go(block, keep=bool(version))
        elif what == 2 and block is not None and block not in contents:
            pool.know(block, Content(key, version, version))
            contents[block] = key, version
        elif what == 3 and (found := pool.find(key, version, version)) is not None:
            assert contents[found] == (key, version)
            pool.hold(found)
            held.append(found)
        elif what == 4:
            pool.drop(lambda oldest, newest, version=version: oldest == version)
        elif what == 5:
            pool.forget_key(key)
        pool.check(held)
        assert pool.num_available == num - len(set(held))
    for block in held:
        pool.let_go(block)
    pool.check([])
    assert pool.num_available == num


tokens = st.lists(st.integers(0, 2), max_size=12)


@settings(max_examples=150, deadline=None)
@given(a=tokens, b=tokens, cut=st.integers(0, 12), size=st.integers(1, 4))
def test_keys_are_equal_just_where_all_before_is(a, b, cut, size):
    def keys(root_key, ids, num):
        found = []
        extend(found, root_key, ids, size, min(num, len(ids) // size))
        extend(found, root_key, ids, size, len(ids) // size)  # goes on where it was
        return found

    one, two = root("m", "a"), root("m", "b")
    for i, (x, y) in enumerate(zip(keys(one, a, cut), keys(one, b, 0), strict=False)):
        assert (x == y) == (a[: (i + 1) * size] == b[: (i + 1) * size])
    assert not set(keys(one, a, 0)) & set(keys(two, a, 0))
    assert len({*keys(one, a, cut)}) == len(a) // size


def test_roots_of_other_parts_are_others():
    parts = [
        ("a", None),
        ("a", ""),
        ("a", "None"),
        ("a,b", None),
        ("a", "b"),
        ("ab", None),
        ('a", "b', None),
        ("\ud800", None),
    ]
    assert len({root(*each) for each in parts}) == len(parts)
