"""Names of what blocks of the KV cache hold: chains of sha256 over their tokens. Host code, no torch.

A block's key is the digest of the key of the block before it and of its own token ids; the first one's, of a root: all that
decides what tokens become, and who may see that somebody had them cached. So equal keys are equal texts, and nobody can find
out by the time that an answer takes what other clients have asked. Cryptographic digests, because whoever can make two texts of
one key reads another's cache.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np


def root(*parts: object) -> bytes:
    """A chain's root. The parts are what JSON has: which model, how its keys and values are stored, whose they are."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).digest()


class KeyBase(NamedTuple):
    """Facts about an engine's roots, so that others can name its blocks: the model, how its keys and values are stored, and how
    many tokens are in a block."""

    model: str
    block_size: int

    def root(self, traced: bool, client: str, salt: str | None, adapter: int | None) -> bytes:
        """The root of a request's chain: `client` is the name of who asks, `adapter` the number of its content."""
        return root(self.model, self.block_size, traced, client, salt, adapter)


def extend(keys: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int) -> None:
    """Append the keys of the first `num_blocks` blocks that are not there yet."""
    first = len(keys)
    if num_blocks <= first:
        return
    ids = np.asarray(token_ids[first * block_size : num_blocks * block_size], "<u4").tobytes()
    width, key = 4 * block_size, keys[-1] if keys else root
    for start in range(0, len(ids), width):
        key = sha256(key + ids[start : start + width]).digest()
        keys.append(key)
