"""Accounts of what is in a prefix cache, for gateways that send requests where their beginning is. Host code, no torch.

Decisions: keys are shortened to SHORT bytes, because a wrong guess costs time and never an answer. Accounts are numbered, and
say what changed since an earlier one; whoever asks for the first time, or comes too late, is told all. That has at most MOST
keys, the latest: what a cache of more blocks knows besides is not told. Of changes as many are kept as many seconds bring.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from itertools import islice
from threading import Lock
from typing import NamedTuple

import numpy as np

SHORT = 8
MOST, MOST_CHANGES = 1 << 16, 1 << 13
NO_ACCOUNT = -1  # before the first


class KeyChanges(NamedTuple):
    """Short keys, SHORT bytes each. `is_whole`: those that are there, instead of those that came; all others are gone. The next
    account begins at `number`."""

    number: int
    is_whole: bool
    there: bytes
    gone: bytes

    @property
    def came(self) -> list[int]:
        return numbers(self.there)

    @property
    def went(self) -> list[int]:
        return numbers(self.gone)


def short(key: bytes) -> int:
    """The number by which gateways know a key."""
    return int.from_bytes(key[:SHORT], "little")


def numbers(keys: bytes) -> list[int]:
    found: list[int] = np.frombuffer(keys, "<u8").tolist()
    return found


class KeyLog:
    """Keys that are there, and what came and went last. `note` and `since` may be called from different threads."""

    def __init__(self, most: int = MOST):
        self._lock = Lock()
        self._there: OrderedDict[bytes, None] = OrderedDict()
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=min(most, MOST_CHANGES))
        self._most, self._number = most, 0

    def note(self, key: bytes, is_there: bool) -> None:
        """A key has come, or gone."""
        key = key[:SHORT]
        with self._lock:
            self._there.pop(key, None)
            if is_there:
                self._there[key] = None
            self._changes.append((key, is_there))
            self._number += 1

    def since(self, number: int) -> KeyChanges:
        """Account of what has changed since the one of that number."""
        with self._lock:
            num = self._number - number
            if not 0 <= num <= len(self._changes):
                return KeyChanges(self._number, True, _joined(self._latest()), b"")
            last = dict(islice(self._changes, len(self._changes) - num, None))  # of each key what became of it
            there, gone = ([key for key, is_there in last.items() if is_there is wanted] for wanted in (True, False))
            return KeyChanges(self._number, False, _joined(there), _joined(gone))

    def _latest(self) -> list[bytes]:
        return list(islice(reversed(self._there), self._most))


def _joined(keys: Iterable[bytes]) -> bytes:
    return b"".join(keys)
