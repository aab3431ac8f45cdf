"""Rows that prefer one answer over another: TRL's and OpenAI's."""

from collections.abc import Iterator, Sequence
from typing import Any

from trinity.data.chat_tokens import Example, control_in, examples
from trinity.data.chats import Conversation
from trinity.data.documents import files
from trinity.data.formats import rows, say_once
from trinity.errors import DataError
from trinity.text.tokenizer import Tokenizer

KINDS = "chosen and rejected, with or without a prompt; or input, preferred_output and non_preferred_output"


def pairs_of(patterns: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[Example, Example]]:
    """(chosen, rejected) of each row of these files: tokens, and which the model is to write. Says how many rows are left out,
    for control tokens that are written as text. Raises DataError."""
    for file in (file for pattern in patterns for file in files(pattern)):
        num_left_out = 0
        for where, row in rows(file):
            sides = [Conversation.of(side, where) for side in sides_of(row, where)]
            if any(control_in(side, tokenizer) for side in sides):
                num_left_out += 1
                continue
            chosen, rejected = (_answer(side, tokenizer, where) for side in sides)
            yield chosen, rejected
        if num_left_out:
            say_once(f"{file}: {num_left_out:,} pairs are left out, they hold control tokens as text")


def sides_of(row: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two rows of a prompt and a completion. Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}; a pair is an object with {KINDS}")
    given = {key: value for key, value in row.items() if value is not None}
    if {"input", "preferred_output", "non_preferred_output"} <= given.keys() and isinstance(given["input"], dict):
        asked, chosen, rejected = given["input"], given["preferred_output"], given["non_preferred_output"]
        tools, prompt = asked.get("tools"), asked.get("messages", [])
    elif {"chosen", "rejected"} <= given.keys():
        chosen, rejected, tools = given["chosen"], given["rejected"], given.get("tools")
        prompt = given["prompt"] if "prompt" in given else _common(chosen, rejected, where)
        if "prompt" not in given:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        raise DataError(f"{where} has {', '.join(sorted(given)) or 'nothing'}; a pair has {KINDS}")
    first, second = ({"prompt": prompt, "completion": answer, "tools": tools} for answer in (chosen, rejected))
    return first, second


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
        raise DataError(f"{where} has an answer without a message of the assistant's; both are to have one")
    return found[-1]
