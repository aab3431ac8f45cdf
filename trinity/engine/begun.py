"""Answers that another engine has begun, and their way back to where they were.

Decision: an answer's state is a function of its tokens (text held back, grammar, penalties, seed and position of the next
draw), so they are all that travels; the sequence goes on as if this engine had preempted it.
"""

from typing import NamedTuple

from trinity.engine.request import Sequence


class Begun(NamedTuple):
    """Tokens of an answer so far, the oldest weights behind any, those behind its last one, by their names, and how many
    tokens of its prompt were cached."""

    token_ids: tuple[int, ...] = ()
    first_version: int = 0
    version: int = 0
    num_cached: int = 0


class Handed(NamedTuple):
    """About a prompt that is handed over. Where another engine has computed it: the name of the version that a pinned request
    goes on at, and how many tokens nobody had to compute. Where another engine goes on: how long the version is held after the
    end."""

    version: int | None = None
    num_cached: int | None = None
    held_s: float = 0.0


NOT_HANDED = Handed()


def resume(sequence: Sequence, begun: Begun) -> None:
    """Bring a new sequence to where the answer is. Its caller has the text of these tokens already."""
    for token_id in begun.token_ids:
        sequence.token_ids.append(token_id)
        sequence.text.push(token_id)
        if sequence.progress is not None:
            sequence.progress.take(token_id)
    sequence.first_version, sequence.num_cached = begun.first_version, begun.num_cached
