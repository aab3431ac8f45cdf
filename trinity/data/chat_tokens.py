"""Tokens of a conversation, and which of them are trained: what the model itself would have written.

Decisions. What is trained is found without a word of the template about it, by rendering beginnings of the conversation: the
prompt of a turn is what our server would be asked with, and what the turn adds to it is the answer, its end mark included, the
newline after it not. Tokens are those of serving: a prompt's are encoded as one text, an answer's follow. Where a later turn
shows an earlier one otherwise (templates drop old reasoning), each answer is an example of its own, as it is served. Whoever
writes a control token as text is left out: it would become the token itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from trinity.data.chats import Conversation
from trinity.errors import DataError, InvalidRequest
from trinity.text.conversation import render
from trinity.text.tokenizer import Tokenizer


class Example(NamedTuple):
    """Tokens, and whether each is one that the model is to write."""

    ids: list[int]
    is_trained: list[bool]

    @property
    def num_trained(self) -> int:
        return sum(self.is_trained)


class _Turn(NamedTuple):
    prompt: str
    answer: str
    place: int  # of the message


def examples(conversation: Conversation, tokenizer: Tokenizer, where: str, last_only: bool = False) -> list[Example]:
    """All that is to be learned from a conversation: one example where its turns agree, else one for each; none where no
    message is trained. `last_only`: of its last answer alone. Raises DataError that names place and message."""
    turns = [_turn(conversation, at, tokenizer, where) for at, trained in enumerate(conversation.is_trained) if trained]
    turns = turns[-1:] if last_only else turns
    whole = _as_one(turns, tokenizer)
    return [whole] if whole else [_alone(turn, tokenizer) for turn in turns]


def _turn(conversation: Conversation, at: int, tokenizer: Tokenizer, where: str) -> _Turn:
    """The prompt of the message `at`, and what it adds."""
    chat = conversation.chat
    try:
        prompt = render(replace(chat, messages=chat.messages[:at], add_generation_prompt=True), tokenizer)
        whole = render(replace(chat, messages=chat.messages[: at + 1]), tokenizer)
    except InvalidRequest as error:
        raise DataError(f"{where}, message {at}: {error.message}") from None
    if not whole.startswith(prompt):
        raise DataError(
            f"{where}, message {at}: the template shows it other than as an answer to its prompt, which ends with "
            f"{prompt[-40:]!r}; give the reasoning that it asks for, or switch that off in chat_template_kwargs"
        )
    return _Turn(prompt, whole[len(prompt) :].rstrip("\n"), at)


def _as_one(turns: Sequence[_Turn], tokenizer: Tokenizer) -> Example | None:
    """All turns in one example; None where the prompt of one is not, token by token, what came before."""
    example, text = Example([], []), ""
    for turn in turns:
        if not turn.prompt.startswith(text):
            return None
        prompt_ids = tokenizer.encode(turn.prompt)
        if prompt_ids[: len(example.ids)] != example.ids:
            return None
        between = prompt_ids[len(example.ids) :]
        answer_ids = tokenizer.encode(turn.answer)
        example.ids.extend([*between, *answer_ids])
        example.is_trained.extend([*[False] * len(between), *[True] * len(answer_ids)])
        text = turn.prompt + turn.answer
    return example if turns else None


def _alone(turn: _Turn, tokenizer: Tokenizer) -> Example:
    prompt_ids, answer_ids = tokenizer.encode(turn.prompt), tokenizer.encode(turn.answer)
    return Example([*prompt_ids, *answer_ids], [*[False] * len(prompt_ids), *[True] * len(answer_ids)])


def control_in(conversation: Conversation, tokenizer: Tokenizer) -> str | None:
    """A control token that somebody wrote as text."""
    controls = [text for text, token_id in tokenizer.added_ids.items() if token_id in tokenizer.special_ids]
    said = list(_texts(conversation))
    return next((control for control in controls if any(control in text for text in said)), None)


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.chat.messages:
        yield from filter(None, (message.get(name) for name in ("content", "reasoning", "reasoning_content")))
        yield from (call["function"]["arguments"] for call in message.get("tool_calls") or ())
