"""Texts as hashes of their runs of words, for everything that compares texts.

Legend: U units, G grams (runs of n units).

Decisions: a unit is a word in lower case or, in scripts without spaces, a character; punctuation is none. A gram is a 64-bit
number, the same in every process: a polynomial of its words' CRC-32, mixed. Two different grams have the same number once in
10^19 but where words share a CRC (once in 4 10^9).
"""

import re
import zlib

import numpy as np

UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|[^\W_]+")
BASE, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def units(text: str) -> list[str]:
    """Words, and characters of scripts without spaces, in lower case."""
    return UNIT.findall(text.lower())


def grams_G(words: list[str], n: int) -> np.ndarray:
    """Numbers of the runs of n units, in their order: max(0, U - n + 1) of uint64."""
    hashes_U = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    num = max(0, len(words) - n + 1)
    found_G = np.zeros(num, np.uint64)
    for at in range(n if num else 0):
        found_G = found_G * BASE + hashes_U[at : at + num]
    return mixed(found_G)


def mixed(values: np.ndarray) -> np.ndarray:
    """Numbers whose bits all depend on all bits of those given (two rounds of xor, shift and multiply)."""
    for _ in range(2):
        values = (values ^ (values >> np.uint64(32))) * MIX
    found: np.ndarray = values ^ (values >> np.uint64(32))
    return found
