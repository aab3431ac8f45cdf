"""Rows that prefer one answer over another, or say of an answer whether it is wanted: TRL's and OpenAI's.

Decision: in a store each row has two answers, wanted and unwanted, one after the other; the one that a labelled row lacks is
empty. So one store serves what is learned from pairs and what is learned from labels.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trinity.config import DataConfig
from trinity.data.chat_tokens import Example, control_in, examples
from trinity.data.chats import Conversation
from trinity.data.documents import files, stamps
from trinity.data.example_store import example_stores
from trinity.data.formats import rows, say_once
from trinity.data.token_store import TokenStore, fingerprint
from trinity.errors import DataError
from trinity.text.tokenizer import Tokenizer

KINDS = (
    "chosen and rejected, with or without a prompt; input, preferred_output and non_preferred_output; or prompt, completion "
    "and label"
)
NO_ANSWER = Example([], [])


def answer_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out): answers of the rows in these files, two a row, unless they are there already. Raises DataError."""
    facts = ["answers", stamps(patterns), data.max_documents, tokenizer.to_json(), tokenizer.chat_template]
    found = answers_of(patterns, tokenizer, data.max_documents)
    return example_stores(folder / f"answers-{fingerprint(*facts, val_fraction, seed)}", found, val_fraction, seed)


def answers_of(
    patterns: Sequence[str], tokenizer: Tokenizer, most: int | None = None
) -> Iterator[tuple[Example, Example]]:
    """(wanted, unwanted) of each row of these files, of a labelled row one of them without tokens: tokens, and which the model
    is to write. Says how many rows are left out, for control tokens that are written as text. Raises DataError."""
    for file in (file for pattern in patterns for file in files(pattern)):
        num_left_out = 0
        for where, row in islice(rows(file), most):
            sides = [side and Conversation.of(side, where) for side in sides_of(row, where)]
            if any(side and control_in(side, tokenizer) for side in sides):
                num_left_out += 1
                continue
            wanted, unwanted = (_answer(side, tokenizer, where) if side else NO_ANSWER for side in sides)
            yield wanted, unwanted
        if num_left_out:
            say_once(f"{file}: {num_left_out:,} rows are left out, they hold control tokens as text")


def sides_of(row: Any, where: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Two rows of a prompt and a completion, wanted and unwanted; None where there is none. Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}; it is an object with {KINDS}")
    given = {key: value for key, value in row.items() if value is not None}
    if {"prompt", "completion", "label"} <= given.keys():
        return _labelled(given, where)
    if {"input", "preferred_output", "non_preferred_output"} <= given.keys() and isinstance(given["input"], dict):
        asked, chosen, rejected = given["input"], given["preferred_output"], given["non_preferred_output"]
        tools, prompt = asked.get("tools"), asked.get("messages", [])
    elif {"chosen", "rejected"} <= given.keys():
        chosen, rejected, tools = given["chosen"], given["rejected"], given.get("tools")
        prompt = given["prompt"] if "prompt" in given else _common(chosen, rejected, where)
        if "prompt" not in given:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        raise DataError(f"{where} has {', '.join(sorted(given)) or 'nothing'}; it is to have {KINDS}")
    first, second = ({"prompt": prompt, "completion": answer, "tools": tools} for answer in (chosen, rejected))
    return first, second


def _labelled(given: dict[str, Any], where: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    label = given["label"]
    if label not in (True, False):
        raise DataError(f"{where} has the label {str(label)[:80]!r}; it is true for an answer that is wanted, or false")
    row = {name: given.get(name) for name in ("prompt", "completion", "tools")}
    return (row, None) if label else (None, row)


def _common(chosen: Any, rejected: Any, where: str) -> list[Any]:
    """The messages that both begin with."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError(f"{where} has answers that are texts and no prompt; give the prompt, or messages")
    num = 0
    while num < min(len(chosen), len(rejected)) and chosen[num] == rejected[num]:
        num += 1
    return chosen[:num]


def _answer(conversation: Conversation, tokenizer: Tokenizer, where: str) -> Example:
    found = examples(conversation, tokenizer, where)
    if not found:
        raise DataError(f"{where} has an answer without a message of the assistant's; each is to have one")
    return found[-1]
