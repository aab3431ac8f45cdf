"""A transport that loses requests and replies on purpose, to show that nothing above it minds."""

import random
from contextlib import suppress
from typing import Any

from trinity.dispatch.transport import Done, Reply, Transport
from trinity.errors import TrinityError, Unavailable


class FaultyTransport:
    """Passes on to `inner`; with the given odds a request is never sent, or its reply is dropped after it was applied.

    `sent` and `lost` count what happened. The odds and the `rng` make a run repeatable.
    """

    def __init__(self, inner: Transport, rng: random.Random, lose_request: float = 0.0, lose_reply: float = 0.0):
        self.inner, self.rng = inner, rng
        self.lose_request, self.lose_reply = lose_request, lose_reply
        self.sent = self.lost = 0

    def send(self, shard: str, verb: str, message: Any) -> Reply:
        self.sent += 1
        if self.rng.random() < self.lose_request:
            return self._lose(f"request {verb!r} to {shard} was lost")
        reply = self.inner.send(shard, verb, message)
        if self.rng.random() < self.lose_reply:
            with suppress(TrinityError):  # lost, too
                reply.result()
            return self._lose(f"the reply of {shard} to {verb!r} was lost")
        return reply

    def _lose(self, what: str) -> Reply:
        self.lost += 1
        return Done(error=Unavailable(what))
