"""Tokens of a conversation, and which of them are trained: what the model itself would have written.

Decisions. What is trained is found without a word of the template about it, by rendering beginnings of the conversation: the
prompt of a turn is what our server would be asked with, and what the turn adds to it is the answer, up to the first token that
our server ends at. A template that ends an answer with what comes next (GLM's with `<|user|>`) is asked what that is. Tokens
are those of serving: a prompt's are encoded as one text, an answer's follow. Where a later turn shows an earlier one otherwise
(templates drop old reasoning), each answer is an example of its own, as it is served. Whoever writes a control token as text
is left out: it would become the token itself.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from trinity.data.chats import Conversation
from trinity.data.formats import say_once
from trinity.errors import DataError, InvalidRequest
from trinity.text.conversation import TAIL, Chat, Message, render
from trinity.text.reasoning import THINK
from trinity.text.tokenizer import Tokenizer


class Example(NamedTuple):
    """Tokens, and whether each is one that the model is to write."""

    ids: list[int]
    is_trained: list[bool]

    @property
    def num_trained(self) -> int:
        return sum(self.is_trained)


class _Turn(NamedTuple):
    """Tokens of the prompt of an answer, and of the answer."""

    prompt: list[int]
    answer: list[int]


def examples(conversation: Conversation, tokenizer: Tokenizer, where: str, last_only: bool = False) -> list[Example]:
    """All that is to be learned from a conversation: one example where its turns agree, else one for each; none where no
    message is trained. `last_only`: of its last answer alone. Raises DataError that names place and message."""
    answers = [at for at, message in enumerate(conversation.chat.messages) if message["role"] == "assistant"]
    wanted = answers[-1:] if last_only else answers
    turns = [_turn(conversation.chat, at, tokenizer, where) for at in wanted if conversation.is_trained[at]]
    whole = _as_one(turns)
    return [whole] if whole else [_alone(turn) for turn in turns]


def _turn(chat: Chat, at: int, tokenizer: Tokenizer, where: str) -> _Turn:
    """The prompt of the message `at`, and what it adds."""
    try:
        prompt = render(replace(chat, messages=chat.messages[:at], add_generation_prompt=True), tokenizer)
        whole = render(replace(chat, messages=chat.messages[: at + 1], add_generation_prompt=False), tokenizer)
        if why := _why_other(prompt, whole, chat.messages[at]):
            raise DataError(f"{where}, message {at}: {why}")
        return _Turn(tokenizer.encode(prompt), _answer(chat, at, prompt, whole[len(prompt) :], tokenizer))
    except InvalidRequest as error:
        raise DataError(f"{where}, message {at}: {error.message}") from None


def _why_other(prompt: str, whole: str, message: Message) -> str | None:
    """Reason for which a message cannot be learned as the answer to its prompt; None where it can."""
    same = _num_same(prompt, whole)
    if same < len(prompt) and prompt.rstrip().endswith(THINK):
        return (
            "the template shows it other than as an answer to its prompt, which ends with "
            f"{prompt[-40:]!r}; give the reasoning that it asks for, or switch that off in chat_template_kwargs"
        )
    if same < len(prompt):
        return (
            f"the template is not prefix-preserving: with the answer it has {whole[same : same + 40]!r} where its prompt has "
            f"{prompt[same : same + 40]!r}; use one that shows the messages before an answer as they were"
        )
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    if hidden := next((name for name in names if name not in whole[same:]), None):
        return f"the template does not show its call of {hidden!r}; leave it out, or use a template that shows calls"
    _say_hidden(message, whole[same:])
    return None


def _num_same(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _say_hidden(message: Message, shown: str) -> None:
    """Say once that a template leaves something out: only what it shows is trained."""
    said = "".join(shown.split())
    for name in ("content", "reasoning", "reasoning_content"):
        if "".join((message.get(name) or "").split()) not in said:
            say_once(f"the chat template leaves out {name} of some answers; what it shows is trained")


def _answer(chat: Chat, at: int, prompt: str, added: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens up to the one that ends the answer, where there is one."""
    ids = tokenizer.encode(added)
    if ends := [n for n, token_id in enumerate(ids) if token_id in tokenizer.end_ids]:
        return ids[: ends[0] + 1]
    ids = tokenizer.encode(added.rstrip("\n"))
    if (end := _end_by_next(chat, at, prompt, tokenizer)) is not None:
        return [*ids, end]
    say_once(
        "the chat template ends answers with none of the tokens that end a text, so that the model learns no end; name the "
        "token in eos_token_id of generation_config.json"
    )
    return ids


def _end_by_next(chat: Chat, at: int, prompt: str, tokenizer: Tokenizer) -> int | None:
    """The token by which a message that follows ends the answer, if that is one that our server ends at."""
    follows = {"role": "tool" if chat.messages[at].get("tool_calls") else "user", "content": TAIL}
    try:
        text = render(
            replace(chat, messages=[*chat.messages[: at + 1], follows], add_generation_prompt=False), tokenizer
        )
    except InvalidRequest:  # a template that wants another message here
        return None
    before = text.partition(TAIL)[0]
    rest = tokenizer.encode(before[_num_same(prompt, before) :])
    return next((token_id for token_id in reversed(rest) if token_id in tokenizer.end_ids), None)


def _as_one(turns: Sequence[_Turn]) -> Example | None:
    """All turns in one example; None where the prompt of one is not, token by token, what came before."""
    example = Example([], [])
    for prompt, answer in turns:
        if prompt[: len(example.ids)] != example.ids:
            return None
        between = prompt[len(example.ids) :]
        example.ids.extend([*between, *answer])
        example.is_trained.extend([*[False] * len(between), *[True] * len(answer)])
    return example if turns else None


def _alone(turn: _Turn) -> Example:
    return Example([*turn.prompt, *turn.answer], [*[False] * len(turn.prompt), *[True] * len(turn.answer)])


def control_in(conversation: Conversation, tokenizer: Tokenizer) -> str | None:
    """A control token that somebody wrote as text."""
    kept = tokenizer.special_ids | tokenizer.end_ids
    controls = [text for text, token_id in tokenizer.added_ids.items() if token_id in kept]
    said = list(_texts(conversation))
    return next((control for control in controls if any(control in text for text in said)), None)


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.chat.messages:
        yield from filter(None, (message.get(name) for name in ("content", "reasoning", "reasoning_content")))
        yield from (call["function"]["arguments"] for call in message.get("tool_calls") or ())
    yield json.dumps(conversation.chat.tools, ensure_ascii=False)
