"""Blocks of one kind of layer: who holds each, and what is in those that nobody holds. Host code, no torch.

A block is held by rows, or idle (nobody holds it, what is in it is known), or free. Idle ones are found again by the key of
what is in them, until a block is needed and no free one is left: then the first of the idle ones goes. Decisions: idle blocks
stand in the order in which they were let go, but those that are not worth keeping come before all others, the latest first: of
a long prompt that passes through, the beginning stays, which others may share. Of the same tokens by the same versions there is
one block, the latest that was computed; by other versions, others beside it.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """Content of a full block. `key` names its tokens and all before them (prefix_keys.py); `oldest` and `newest` are versions
    of the weights that computed all of these. `routes`: the experts of its tokens, where they were traced. `place`: the
    block's number in its sequence, which began at `begun_ns`."""

    key: bytes
    oldest: int
    newest: int
    routes: np.ndarray | None = None
    place: int = 0
    begun_ns: int = 0


class BlockPool:
    """Owns the numbers 0 to num_blocks - 1. `kept` hears of what is worth keeping, and whether its sequence lets it go;
    `watch` which keys come and go."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.kept: Callable[[int, Content, bool], None] | None = None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the next to go first
        self._holders = [0] * num_blocks
        self._contents: dict[int, Content] = {}
        self._blocks: dict[bytes, list[int]] = {}  # by the key of their contents
        self.watch: Callable[[bytes, bool], None] = lambda key, is_there: None

    @property
    def num_available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def num_holders(self, block: int) -> int:
        return self._holders[block]

    def take(self) -> int:
        """-> a block of which nothing is known any more; it has one holder."""
        if not self._free:
            self.forget(next(iter(self._idle)))
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """It has one holder more."""
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1

    def let_go(self, block: int, keep: bool = True) -> None:
        """It has one holder less. `keep`: it is worth it; otherwise it is the next to go."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if (content := self._contents.get(block)) is None:
            self._free.append(block)
            return
        self._idle[block] = None
        if not keep:
            self._idle.move_to_end(block, last=False)
        elif self.kept is not None:
            self.kept(block, content, True)

    def know(self, block: int, content: Content, keep: bool = True) -> None:
        """It is held, and full: this is in it from now on. `keep`: as in `let_go`."""
        for other in self._blocks.get(content.key, ()):
            known = self._contents[other]
            if (known.oldest, known.newest) == (content.oldest, content.newest):
                self.forget(other)
                break
        self.forget(block)
        self._contents[block] = content
        self._blocks.setdefault(content.key, []).append(block)
        if keep and self.kept is not None:
            self.kept(block, content, False)
        self.watch(content.key, True)

    def forget(self, block: int) -> None:
        """Let what is in it be found no more. Harmless where nothing is known of it."""
        if (content := self._contents.pop(block, None)) is None:
            return
        alike = self._blocks[content.key]
        alike.remove(block)
        if not alike:
            del self._blocks[content.key]
            self.watch(content.key, False)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def forget_key(self, key: bytes) -> None:
        """Let what is there of these tokens be found no more."""
        for block in tuple(self._blocks.get(key, ())):
            self.forget(block)

    def find(self, key: bytes, oldest: int, newest: int) -> int | None:
        """A block with these tokens, computed by versions from `oldest` to `newest` alone; of several the youngest."""
        fits = [
            block
            for block in self._blocks.get(key, ())
            if self._contents[block].oldest >= oldest and self._contents[block].newest <= newest
        ]
        return max(fits, key=lambda block: self._contents[block].oldest) if fits else None

    def content(self, block: int) -> Content:
        return self._contents[block]

    def has(self, block: int, content: Content) -> bool:
        """Is that still in it?"""
        return self._contents.get(block) is content

    def drop(self, is_wrong: Callable[[int, int], bool]) -> None:
        """Forget what versions (oldest, newest) computed that are wrong."""
        for block, content in list(self._contents.items()):
            if is_wrong(content.oldest, content.newest):
                self.forget(block)

    def check(self, held: Iterable[int]) -> None:
        """Assert that each block is free, or idle, or held just by those in `held`, and found just by what is in it."""
        holders = Counter(held)
        assert all(self._holders[block] == holders[block] for block in range(self.num_blocks)), "a holder is miscounted"
        assert sorted([*self._free, *self._idle, *holders]) == list(range(self.num_blocks)), "a block is lost"
        assert not self._contents.keys() & set(self._free), "something is known of a free block"
        assert self._contents.keys() >= self._idle.keys(), "nothing is known of an idle block"
        found = {block: key for key, blocks in self._blocks.items() for block in blocks}
        assert found == {block: content.key for block, content in self._contents.items()}, "a block is not found"
