"""Versions of a run's weights that answers are pinned to, kept while no engine holds them.

Decisions: an engine's lease ends with it, and another one needs the same version to go on. So the gateway has a lease of its
own from an answer's first token to its end, and for the life of a server whose weights are pinned. Leases are told, never
waited for: an engine that finds its version gone says so. Versions go by their names (trinity/utils/lines.py).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self
from uuid import uuid4

from trinity.errors import TrinityError
from trinity.utils.trying import tried

log = logging.getLogger("trinity.serving")
LEASE_S = 30.0
STARTING = "server/starting"  # holds the version of a server that has no gateway yet
Tell = Callable[..., None]


class Kept:
    """A version that an answer keeps until the end of the block, once it has one."""

    __slots__ = ("_pins", "_version")

    def __init__(self, pins: "Pins"):
        self._pins = pins
        self._version: int | None = None

    def __enter__(self) -> Self:
        return self

    def hold(self, version: int) -> None:
        self._version = version
        self._pins.hold(version)

    def __exit__(self, *ended: object) -> None:
        if self._version is not None:
            self._pins.release(self._version)


class Pins:
    """Leases with a run's placement service, which `tell` reaches. None: the weights are a checkpoint's, and stay."""

    def __init__(self, tell: Tell | None = None):
        self._tell, self._me = tell, uuid4().hex[:12]
        self._held = Counter[int]()
        self._thread = ThreadPoolExecutor(1, "trinity-pins")  # the service may be slow to be found
        self._renewing: asyncio.Task[None] | None = None

    def start(self, version: int | None = None) -> None:
        """Begin to renew, in the event loop that serves; `version`: the server's for good."""
        if self._tell is not None:
            self._renewing = asyncio.create_task(self._renew())
            if version is not None:
                self.hold(version)
                self._ask("unpin", STARTING)

    def stop(self) -> None:
        """Give all back. Repeatable."""
        if self._renewing is not None:
            self._renewing.cancel()
        for version in self._held:
            self._ask("unpin", self._holder(version))
        self._tell = None
        self._thread.shutdown(wait=False)

    def kept(self) -> "Kept":
        return Kept(self)

    # -- inside

    def hold(self, version: int) -> None:
        self._held[version] += 1
        if self._held[version] == 1:
            self._pin(version)

    def release(self, version: int) -> None:
        self._held[version] -= 1
        if self._held[version] == 0:
            del self._held[version]
            self._ask("unpin", self._holder(version))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            for version in self._held:
                self._pin(version)

    def _pin(self, version: int) -> None:
        self._ask("pin", version, self._holder(version), LEASE_S)

    def _holder(self, version: int) -> str:
        return f"server-{self._me}/{version}"

    def _ask(self, *asked: str | int | float) -> None:
        if self._tell is not None:
            self._thread.submit(self._told, self._tell, *asked)

    def _told(self, tell: Tell, *asked: str | int | float) -> None:
        error = tried(partial(tell, *asked), TrinityError)
        if error is not None:
            log.warning("%s of version %s: %s", *asked[:2], error)
