"""Names for what each end of a connection computes with, exchanged in its handshake: rules for bits, kernels, formats.

Decisions: kernels that are there on one side only are no reason to refuse anybody, as they have the bits of those in Python:
rows then take the way that both know, and either side says so once. Other rules for bits are one: answers would be others.
"""

import logging

from actors.dataplane.frames import BadFrame
from trinity import native

log = logging.getLogger(__name__)
WORDS_BYTES = 96
_told = set[str]()  # what was said of peers


def own_words() -> bytes:
    """Words of this process about itself, WORDS_BYTES."""
    return f"{native.BITS} {native.computes()}".encode().ljust(WORDS_BYTES, b"\0")


def check_words(words: bytes, who: str) -> None:
    """Raise BadFrame for a peer, `who` in words, whose answers would have other bits; say once what differs otherwise."""
    said = words.rstrip(b"\0").decode("ascii", "backslashreplace")
    bits, _, theirs = said.partition(" ")
    if bits != str(native.BITS):
        raise BadFrame(
            f"{who} computes by rules for bits of number {bits[:8]!r} ({theirs}), this process by {native.BITS} "
            f"({native.computes()}): answers would differ; run one release of Trinity (docs/operations.md, Upgrades)"
        )
    _tell(who, theirs, native.computes())


def _tell(who: str, theirs: str, ours: str) -> None:
    if theirs in _told:
        return
    _told.add(theirs)
    kernels = {each.partition(":")[0] for each in (theirs, ours)}
    if "python" in kernels and len(kernels) > 1:
        log.warning(
            "%s computes with %s, this process with %s: inference between them takes the plain path, with the same "
            "bits; trinity doctor there says why",
            who, theirs, ours,
        )  # fmt: skip
    else:
        log.info("%s computes with %s, this process with %s", who, theirs, ours)
