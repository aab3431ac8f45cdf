"""Needles in a haystack: does a model find what stands far back in its context?

A text is lines of a key and its value, `bako lemu`. In a question all lines but one are hay, which looks like the needle
(multi-key NIAH, arXiv 2404.06654): the last line is the needle's key alone, and right is who goes on with its value. Texts to
train on ask again and again on their way, so that every line after the first ones teaches.

Decisions: words are two syllables of a consonant and a vowel, in one fixed shuffled order; keys and values are apart. Texts and
questions are functions of a seed, and those of questions are never those of texts.
"""

import argparse
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trinity.errors import ConfigError

Count = Callable[[str], int]  # of a prompt's tokens, special ones included
NUM_KEYS, NUM_VALUES = 1024, 32
CHANCE = 1 / NUM_VALUES
MAX_TOKENS = 8  # of a value, whatever the tokenizer makes of it
FEWEST_LINES = 4


class Question(NamedTuple):
    """A prompt, and the word that is to follow."""

    prompt: str
    answer: str


@functools.cache
def words() -> tuple[Sequence[str], Sequence[str]]:
    """(keys, values)."""
    found = ["".join(parts) for parts in itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou")]
    random.Random(0).shuffle(found)
    return found[:NUM_KEYS], found[NUM_KEYS : NUM_KEYS + NUM_VALUES]


def texts(num: int, num_lines: int, seed: int = 0) -> Iterator[str]:
    """Texts of so many lines each, to train on: first new keys, in 2 to half of the lines, then those keys again."""
    keys, values = words()
    for nth in range(num):
        rng = random.Random(f"text {seed} {nth}")
        chosen = rng.sample(keys, rng.randint(2, max(2, min(num_lines // 2, NUM_KEYS))))
        value = {key: rng.choice(values) for key in chosen}
        again = [rng.choice(chosen) for _ in range(num_lines - len(chosen))]
        yield "".join(f"{key} {value[key]}\n" for key in (*chosen, *again))


def questions(num: int, num_tokens: int, count: Count, seed: int = 0) -> list[Question]:
    """Questions of just under so many tokens, their needles at even depths. Raises ConfigError where that is too few."""
    return [_question(nth / num, num_tokens, count, random.Random(f"question {seed} {nth}")) for nth in range(num)]


def _question(depth: float, num_tokens: int, count: Count, rng: random.Random) -> Question:
    keys, values = words()
    chosen = [(key, rng.choice(values)) for key in rng.sample(keys, NUM_KEYS)]
    num = NUM_KEYS
    while True:
        lines = chosen[:num]
        key, value = lines[int(depth * num)]
        prompt = "".join(f"{each} {its}\n" for each, its in lines) + key
        taken = count(prompt) + MAX_TOKENS
        if taken <= num_tokens:
            return Question(prompt, value)
        num = min(num - 1, num * num_tokens // taken)
        if num < FEWEST_LINES:
            raise ConfigError(f"niah of {num_tokens} tokens has no room for {FEWEST_LINES} lines; give more tokens")


def is_right(question: Question, text: str) -> bool:
    """Say whether the text goes on with the value, as a word of its own."""
    return text.startswith(" ") and text.split()[:1] == [question.answer]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write texts to train on: `python -m trinity.evaluate.niah needles.jsonl --texts 10000 --lines 80`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl of rows with a text")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=80, help="of each text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write(given.file, given.texts, given.lines, given.seed)


def write(file: Path, num: int, num_lines: int, seed: int = 0) -> Path:
    """A file of rows with texts to train on; -> file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"text": text}) + "\n" for text in texts(num, num_lines, seed))
    file.write_text("".join(rows))
    return file


if __name__ == "__main__":
    main()
