"""Large Deltas in slices, so that a message between processes is never over what it may have.

Decision: only arrays are large (the experts that each token went to, the log-probabilities of a prompt), so only they are cut,
along their first axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from trinity.engine.prompt_logprobs import PromptLogprobs
from trinity.engine.request import Delta

MOST_BYTES = 1 << 20
SMALL_BYTES = 1 << 10  # of a Delta without arrays, or of a token with its alternatives, about
EXPERTS, SCORES = "experts_TLK", tuple(field.name for field in fields(PromptLogprobs))


class Slice(NamedTuple):
    """Rows of an array that belongs to a request's next Delta."""

    name: str
    rows: np.ndarray


def sliced(item: Any) -> Iterator[Any]:
    """The item, or slices and what is left of it, none of which is over MOST_BYTES."""
    arrays = arrays_of(item)
    if sum(array.nbytes for array in arrays.values()) <= MOST_BYTES:
        yield item
        return
    for name, array in arrays.items():
        step = max(1, MOST_BYTES * len(array) // max(1, array.nbytes))
        for start in range(0, max(1, len(array)), step):
            yield Slice(name, array[start : start + step])
    yield replace(item, experts_TLK=None, prompt_logprobs=None)


def whole(slices: Sequence[Slice], delta: Delta) -> Delta:
    """The Delta that slices belong to, as it was."""
    names = dict.fromkeys(each.name for each in slices)
    arrays = {name: np.concatenate([each.rows for each in slices if each.name == name]) for name in names}
    experts_TLK = arrays.pop(EXPERTS, None)
    return replace(delta, experts_TLK=experts_TLK, prompt_logprobs=PromptLogprobs(**arrays) if arrays else None)


def arrays_of(item: Any) -> dict[str, np.ndarray]:
    if not isinstance(item, Delta):
        return {}
    found = {} if item.experts_TLK is None else {EXPERTS: item.experts_TLK}
    if item.prompt_logprobs is not None:
        found |= {name: getattr(item.prompt_logprobs, name) for name in SCORES}
    return found


def weight(item: Any) -> int:
    """Bytes of an item, about."""
    if isinstance(item, Slice):
        return item.rows.nbytes + SMALL_BYTES
    num = len(item.logprobs or ()) if isinstance(item, Delta) else 0
    return SMALL_BYTES * (1 + num) + sum(array.nbytes for array in arrays_of(item).values())
