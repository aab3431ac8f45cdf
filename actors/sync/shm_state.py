"""Versions out of the folders in which a pool's processes keep their committed state (shm_folders.py), from any node."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.dataplane.ray_transport import pack, unpack
from actors.names import ask, on_node
from trinity.errors import DeadlineExceeded, TrinityError, Unavailable, VersionGone
from trinity.state.reader import Reader, read
from trinity.state.versioned_store import Version
from trinity.utils.trying import tried

T = TypeVar("T")
log = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_retries=1)
def read_there(path: str, number: int, suffix: str) -> Any:
    """A version out of a folder on another node, packed; the tensors whose names end like that."""
    found = read(Path(path), number, lambda name: name.endswith(suffix))
    return {name: pack(tensor) for name, tensor in found.tensors.items()}, dict(found.notes)


def fetched(node: str, path: str, number: int, suffix: str, timeout_s: float) -> Version:
    """A version out of a folder on that node. Raises VersionGone, or Unavailable where the node is gone."""
    if node == ray.get_runtime_context().get_node_id():
        return read(Path(path), number, lambda name: name.endswith(suffix))
    tensors, notes = ask(on_node(read_there, node).remote(path, number, suffix), timeout_s, f"node {node[:8]}")
    return Version(number, {name: unpack(each) for name, each in tensors.items()}, notes)


def from_any(places: Iterable[tuple[str, str]], version: int, take: Callable[[str, str], T]) -> T:
    """The result of `take(node, folder)` at the first place that has the version. Raises VersionGone where none does."""
    for node, folder in places:
        found = tried(partial(take, node, folder), VersionGone, Unavailable, DeadlineExceeded)
        if not isinstance(found, TrinityError):
            return found
        log.warning("the backbone of version %d is not on node %s: %s", version, node[:8], found)
    raise VersionGone(f"the backbone of version {version} is kept nowhere any more")


class Lender:
    """Versions out of folders, for one process that asks again and again. For any threads."""

    def __init__(self) -> None:
        self._readers: dict[str, Reader] = {}

    @contextmanager
    def lent(self, node: str, path: str, number: int, suffix: str, timeout_s: float) -> Iterator[Version]:
        """Lend it as `fetched` does; here without a copy. Raises VersionGone also at its end, if the version went
        meanwhile: what was made of it is void then."""
        if node != ray.get_runtime_context().get_node_id():
            yield fetched(node, path, number, suffix, timeout_s)
            return
        reader = self._readers.setdefault(path, Reader(Path(path)))
        with reader.lent(number, lambda name: name.endswith(suffix)) as found:
            yield found
