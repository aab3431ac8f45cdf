"""Adapters that a pool's engines serve beside its weights, by name: what a server lists, and shards are told at once.

Decisions: names are the pool's, so that every gateway has the same and one that starts again knows them; shards and engines go
by an adapter's content, and are told by who asks where it is, so that one that was away here has nothing to make up for. An
adapter is listed when every shard that answers has taken it up, and then it is on disk here, too.
"""

import threading
from functools import partial

from actors.control.shards import Shards
from trinity.config import MOST_ADAPTERS, AdapterRef, AdapterSet, check_adapter_name
from trinity.errors import InvalidRequest, ModelNotFound, Unavailable
from trinity.rpc.messages import Adapt, Forget, TakenAdapter
from trinity.utils.trying import tried


class Adapters:
    """Safe from any thread: one change at a time, and whoever reads never waits."""

    def __init__(self, shards: Shards):
        self._shards, self._files, self._changing = shards, shards.state.files, threading.Lock()
        self.now = self._files.adapters()

    def add(self, name: str, source: str) -> AdapterSet:
        """Have the shards take it up, and list it. Raises InvalidRequest for its name, CheckpointError for what is wrong with
        it, and then nothing has changed. Harmless when repeated."""
        with self._changing:
            self._check_name(name)
            taken = self._examined(source)
            for ref in self.now.refs:
                if ref.name == name:
                    return self._same(ref, taken)
            self._take_up(taken)
            return self._put([*self.now.refs, AdapterRef(name, taken.content, taken.source)])

    def remove(self, name: str) -> AdapterSet:
        """List it no more. Requests that run keep theirs. Raises ModelNotFound."""
        with self._changing:
            gone = [ref for ref in self.now.refs if ref.name == name]
            if not gone:
                raise ModelNotFound(f"no adapter is called {name[:150]!r}", param="lora_name")
            left = self._put([ref for ref in self.now.refs if ref.name != name])
            self._let_go(gone[0].content)
            return left

    def _check_name(self, name: str) -> None:
        wrong = tried(partial(check_adapter_name, name), ValueError)
        if isinstance(wrong, ValueError):
            raise InvalidRequest(str(wrong), param="lora_name")
        known = {ref.name for ref in self.now.refs}
        if name not in known and len(known) >= MOST_ADAPTERS:
            raise InvalidRequest(f"{len(known)} adapters are loaded, as many as there may be; unload one first")

    def _same(self, ref: AdapterRef, taken: TakenAdapter) -> AdapterSet:
        if ref.content == taken.content:
            return self.now
        self._let_go(taken.content)
        raise InvalidRequest(
            f"another adapter is called {ref.name!r} already; unload it first, or take another name", param="lora_name"
        )

    def _examined(self, source: str) -> TakenAdapter:
        """Take it up on the first shard that answers, which looks at all of it."""
        state = self._shards.state
        base = state.files.source() if not state.spec.trains else None
        message = Adapt(source, self._shards.deadline("adapt"), base=base.checkpoint if base else None)
        error = Unavailable("no shard answers right now; try again")
        for shard in state.table.shards:
            found = tried(partial(self._shards.ask, shard, "adapt", message), Unavailable)
            if isinstance(found, TakenAdapter):
                return found
            error = found
        raise error

    def _take_up(self, taken: TakenAdapter) -> None:
        message = Adapt(taken.source, self._shards.deadline("adapt"), taken.content)
        for error in self._shards.ask_all("adapt", message):
            if not isinstance(error, Unavailable):  # one that is away is told when rows come to it
                self._let_go(taken.content)
                raise error

    def _let_go(self, content: int) -> None:
        if content not in {ref.content for ref in self.now.refs}:
            self._shards.ask_all("forget", Forget(content))

    def _put(self, refs: list[AdapterRef]) -> AdapterSet:
        made = AdapterSet(self.now.number + 1, tuple(refs))
        self._files.set_adapters(made)
        self.now = made
        return made
