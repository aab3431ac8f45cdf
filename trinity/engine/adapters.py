"""Adapters of an engine's requests: their parts beside the backbone, kept as long as there is room for them.

Decision: a request says which adapter it is for and where that is, so that an engine which starts again, or is a new one, knows
what to do without being told before; what it reads is checked to be what the request means.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from trinity.config import MOST_ADAPTERS, AdapterRef
from trinity.errors import AdapterLost, CheckpointError
from trinity.utils.trying import tried

if TYPE_CHECKING:
    from trinity.models.common.adapted import BackboneAdapter

log = logging.getLogger(__name__)


class AdapterStore:
    """At most MOST_ADAPTERS, of which the one that was asked for least recently goes first; a request keeps its own. For any
    threads."""

    def __init__(self, read: "Callable[[AdapterRef], BackboneAdapter]"):
        self._read, self._guard = read, threading.Lock()
        self._found: OrderedDict[int, BackboneAdapter] = OrderedDict()

    def known(self, ref: AdapterRef) -> "BackboneAdapter | None":
        """The adapter, if it is here. Waits for nobody."""
        return self._found.get(ref.content)

    def get(self, ref: AdapterRef) -> "BackboneAdapter":
        """The adapter, read where it is not here. Raises AdapterLost where it cannot be."""
        with self._guard:
            if ref.content not in self._found:
                found = tried(partial(self._read, ref), CheckpointError)
                if isinstance(found, CheckpointError):
                    log.error("adapter %r cannot be read: %s", ref.name, found)
                    raise AdapterLost(f"adapter {ref.name!r} cannot be read any more; the server's log says why")
                self._found[ref.content] = found
            self._found.move_to_end(ref.content)
            while len(self._found) > MOST_ADAPTERS:
                self._found.popitem(last=False)
            return self._found[ref.content]
