"""Engines that are lost in the middle of answers, of which a gateway knows only that some engine answers."""

import random
from contextlib import aclosing

from trinity.errors import EngineLost


class MortalEngine:
    """A real engine, lost for each request after so many Deltas as `script` says next of it; when that is at its end, no more.
    `begun` is what was sent to it each time."""

    def __init__(self, engine, script=()):
        self._engine, self.script, self.begun = engine, list(script), []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    async def generate(
        self, request_id, prompt_ids, params=None, deadline_s=None, client=None, adapter=None, begun=None
    ):
        self.begun.append(begun)
        left = self.script.pop(0) if self.script else None
        asked = (request_id, prompt_ids, params, deadline_s, client, adapter)
        async with aclosing(self._engine.generate(*asked, begun=begun)) as deltas:
            async for delta in deltas:
                if left == 0:
                    raise EngineLost("killed by its script")
                left = None if left is None else left - 1
                yield delta


def losses(seed):
    """Deltas until each of six losses, one of which comes before any."""
    return random.Random(seed).sample([0, 1, 2, 3, 5, 8], 6)
