"""Rows that prefer one answer over another, or say of an answer whether it is wanted: TRL's and OpenAI's.

Decision: in a store each row has two answers, wanted and unwanted, one after the other; the one that a labelled row lacks is
empty. So one store serves what is learned from pairs and what is learned from labels.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from trinity.config import DataConfig
from trinity.data.chat_store import ExampleRecipe, example_stores, other_ends
from trinity.data.chat_tokens import Example, control_in, examples
from trinity.data.chats import Conversation, messages_in
from trinity.data.documents import Found, files, say_left_out
from trinity.data.formats import DataFile, rows
from trinity.data.kept import fingerprint
from trinity.data.listing import listed
from trinity.data.token_store import TokenStore
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
    found, recipe = listed(patterns, folder), AnswerRecipe(data.max_documents, tokenizer)
    stamps = [each.stamp for pattern in patterns for each in found[pattern]]
    store = f"answers-{fingerprint(*recipe.facts, stamps, val_fraction, seed)}"
    return example_stores(store, folder, recipe, found, data, val_fraction, seed, "row with an answer to train on")


class AnswerRecipe(ExampleRecipe):
    """Answers, two a row."""

    def __init__(self, most: int | None, tokenizer: Tokenizer):
        self.most, self.tokenizer = most, tokenizer

    @cached_property
    def facts(self) -> list[Any]:
        tokenizer = self.tokenizer
        made_by = fingerprint(tokenizer.to_json(), tokenizer.chat_template, *other_ends(tokenizer))
        return ["answers", self.most, made_by]

    def rows(self, found: Found, left_out: Counter[str]) -> Iterator[tuple[Example, Example]]:
        yield from _answers(found.file, self.tokenizer, self.most, left_out)


def answers_of(
    patterns: Sequence[str], tokenizer: Tokenizer, most: int | None = None
) -> Iterator[tuple[Example, Example]]:
    """(wanted, unwanted) of each row of these files, of a labelled row one of them without tokens: tokens, and which the model
    is to write. Says how many rows are left out. Raises DataError."""
    for pattern in patterns:
        left_out = Counter[str]()
        for file in files(pattern):
            yield from _answers(file, tokenizer, most, left_out)
        say_left_out(pattern, left_out)


def _answers(
    file: DataFile, tokenizer: Tokenizer, most: int | None, left_out: Counter[str]
) -> Iterator[tuple[Example, Example]]:
    for where, row in islice(rows(file), most):
        sides = [side and Conversation.of(side, where) for side in sides_of(row, where)]
        if any(side and control_in(side, tokenizer) for side in sides):
            left_out["rows with control tokens as text"] += 1
            continue
        wanted, unwanted = (_answer(side, tokenizer, where) if side else NO_ANSWER for side in sides)
        yield wanted, unwanted


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
        chosen, rejected, tools = _listed(given["chosen"]), _listed(given["rejected"]), given.get("tools")
        prompt = _listed(given.get("prompt"))
        if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):  # TRL, too: both have the prompt
            prompt = _common(chosen, rejected, where)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        raise DataError(f"{where} has {', '.join(sorted(given)) or 'nothing'}; it is to have {KINDS}")
    told = {"prompt": prompt, "tools": tools, "chat_template_kwargs": given.get("chat_template_kwargs")}
    return told | {"completion": chosen}, told | {"completion": rejected}


def _listed(value: Any) -> Any:
    """Messages, where it is the JSON text of some; else as it is."""
    return messages_in(value) or value if isinstance(value, str) else value


def _labelled(given: dict[str, Any], where: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    label = given["label"]
    if label not in (True, False):
        raise DataError(f"{where} has the label {str(label)[:80]!r}; it is true for an answer that is wanted, or false")
    row = {name: given.get(name) for name in ("prompt", "completion", "tools", "chat_template_kwargs")}
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
