"""Needles in a haystack: does a model find what stands far back in its context?

A text is lines of a key and its value, `bako lemu`. In a question all lines but one are hay, which looks like the needle
(multi-key NIAH, arXiv 2404.06654): the last line is the needle's key alone, and right is who goes on with its value. Texts to
train on ask again and again on their way, so that every line after the first ones teaches.

Decisions: words are two syllables of a consonant and a vowel, in one fixed shuffled order; keys and values are apart. Fewer
keys are easier to learn, and fill fewer lines. Texts and questions are functions of a seed, and are never the same.
Texts are of 4 lines to the most, in even shares by their logarithm: the short ones teach how to look, the long ones how far.
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
NUM_VALUES, MOST_KEYS, USUAL_KEYS = 16, 4096, 1024
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
    return found[NUM_VALUES : NUM_VALUES + MOST_KEYS], found[:NUM_VALUES]


def texts(num: int, num_lines: int, seed: int = 0, num_keys: int = USUAL_KEYS) -> Iterator[str]:
    """Texts of up to so many lines each, to train on: first new keys, in 2 to half of the lines, then those keys again."""
    keys, values = words()
    for nth in range(num):
        rng = random.Random(f"text {seed} {nth}")
        most = int(FEWEST_LINES * (num_lines / FEWEST_LINES) ** rng.random())
        chosen = rng.sample(keys[:num_keys], rng.randint(2, max(2, min(most // 2, num_keys))))
        value = {key: rng.choice(values) for key in chosen}
        again = [rng.choice(chosen) for _ in range(most - len(chosen))]
        yield "".join(f"{key} {value[key]}\n" for key in (*chosen, *again))


def questions(num: int, num_tokens: int, count: Count, seed: int = 0, num_keys: int = USUAL_KEYS) -> list[Question]:
    """Questions of just under so many tokens, their needles at even depths. Raises ConfigError for more lines than keys, or
    fewer than four."""
    rngs = [random.Random(f"question {seed} {nth}") for nth in range(num)]
    return [_question(nth / num, num_tokens, count, rng, num_keys) for nth, rng in enumerate(rngs)]


def _question(depth: float, num_tokens: int, count: Count, rng: random.Random, num_keys: int) -> Question:
    keys, values = words()
    chosen = [(key, rng.choice(values)) for key in rng.sample(keys[:num_keys], num_keys)]
    num = num_keys
    while True:
        lines = chosen[:num]
        key, value = lines[int(depth * num)]
        prompt = "".join(f"{each} {its}\n" for each, its in lines) + key
        taken = count(prompt) + MAX_TOKENS
        if taken <= num_tokens:
            break
        num = min(num - 1, num * num_tokens // taken)
        if num < FEWEST_LINES:
            raise ConfigError(f"niah of {num_tokens} tokens has no room for {FEWEST_LINES} lines; give more tokens")
    if num == num_keys and count(prompt) * (num + 1) // num + MAX_TOKENS <= num_tokens:
        raise ConfigError(
            f"niah of {num_tokens:,} tokens has more lines than {num_keys:,} keys; give more keys, to {MOST_KEYS:,}"
        )
    return Question(prompt, value)


def is_right(question: Question, text: str) -> bool:
    """Say whether the text goes on with the value, as a word of its own."""
    return text.startswith(" ") and text.split()[:1] == [question.answer]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write texts to train on: `python -m trinity.evaluate.niah needles.jsonl --texts 10000 --lines 80`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl of rows with a text")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=80, help="of the longest (default: %(default)s)")
    parser.add_argument("--keys", type=int, default=USUAL_KEYS, help="that there are (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write(given.file, given.texts, given.lines, given.seed, given.keys)


def write(file: Path, num: int, num_lines: int, seed: int = 0, num_keys: int = USUAL_KEYS) -> Path:
    """A file of rows with texts to train on; -> file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"text": text}) + "\n" for text in texts(num, num_lines, seed, num_keys))
    file.write_text("".join(rows))
    return file


if __name__ == "__main__":
    main()
