"""The one seam of our own tasks: whoever completes prompts, an engine in this process or a server."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Wanted(NamedTuple):
    """Completions of prompts, texts or token ids, of up to `max_tokens` each, without what follows `stop`. The likeliest where
    `temperature` is 0, else drawn: the first with `seed`, the others counting on from it."""

    prompts: Sequence[str] | Sequence[Sequence[int]]
    max_tokens: int
    stop: str | None = None
    temperature: float = 0.0
    seed: int = 0


Ask = Callable[[Wanted], list[str]]
