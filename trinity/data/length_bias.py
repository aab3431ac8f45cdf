"""More of the long documents of a source, for a stage that extends the context.

Legend: N documents, M documents of one pass, V lengths that are unlike.
Decisions. A document of n tokens is drawn with probability ~ n^beta, so its tokens weigh n^(1 + beta); beta, found by
bisection, makes those of documents of `tokens` or more the share that is asked for. One pass has as many tokens as the
source. How often a document is in it is what is expected, rounded up or down (systematic sampling), from lengths and the seed
alone: no token is read. Beta is at most MOST, where nearly all tokens are of the longest documents: beyond, a few of them
come for ever.
"""

import logging

import numpy as np

from trinity.config import LengthBias
from trinity.data.dataset import Drawn
from trinity.errors import DataError

MOST, HALVINGS = 8.0, 60
DRAW = 4  # tells its seeds from those of other orders

log = logging.getLogger(__name__)


def drawn(lengths_N: np.ndarray, bias: LengthBias, seed: int) -> Drawn:
    """The documents of a pass, shuffled. Raises DataError where the share cannot be reached, with the best that can."""
    beta = beta_of(lengths_N, bias)
    copies_N = _copies(lengths_N, beta, seed)
    rng = np.random.default_rng([seed % 2**64, DRAW])
    documents_M = rng.permutation(np.repeat(np.arange(len(lengths_N)), copies_N))
    log.info(
        "length bias %.3g: tokens of documents of %d or more are %.1f %% of a pass, of the source they are %.1f %%; a document "
        "comes up to %d times",
        beta, bias.tokens, 100 * share(lengths_N, copies_N, bias.tokens), 100 * share(lengths_N, 1, bias.tokens),
        copies_N.max(initial=0),
    )  # fmt: skip
    return Drawn(documents_M, f"{bias.share:g} from {bias.tokens}")


def share(lengths_N: np.ndarray, copies_N: np.ndarray | int, least: int) -> float:
    """Share of the tokens that documents of `least` tokens or more have, each with so many copies."""
    tokens_N = lengths_N * copies_N
    return float(tokens_N[lengths_N >= least].sum() / max(1, tokens_N.sum()))


def beta_of(lengths_N: np.ndarray, bias: LengthBias) -> float:
    """The power of the length, 0 where the share is there without."""
    lengths_V, nums_V = np.unique(lengths_N, return_counts=True)
    is_long_V = lengths_V >= bias.tokens

    def reached(beta: float) -> float:
        weights_V = nums_V * (lengths_V / lengths_V[-1]) ** (1 + beta)
        return float(weights_V[is_long_V].sum() / weights_V.sum())

    if (best := reached(MOST)) < bias.share:
        raise DataError(
            f"length_bias cannot make {bias.share:.1%} of the tokens those of documents of {bias.tokens:,} or more: at most "
            f"{best:.1%}, the longest document has {lengths_V[-1]:,} tokens; lower its share or tokens, or give longer ones"
        )
    low, high = 0.0, MOST
    if reached(low) >= bias.share:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= bias.share else (middle, high)
    return high


def _copies(lengths_N: np.ndarray, beta: float, seed: int) -> np.ndarray:
    """Copies of each document in a pass."""
    if not beta:
        return np.ones(len(lengths_N), np.int64)
    weights_N = (lengths_N / lengths_N.max()) ** beta
    expected_N = weights_N * (lengths_N.sum() / (weights_N * lengths_N).sum())
    offset = np.random.default_rng([seed % 2**64, DRAW, 0]).random()
    return np.diff(np.floor(np.cumsum(expected_N) + offset), prepend=0).astype(np.int64)
