"""Tokens between two answers of a conversation that goes on.

Decisions. What a model has drawn is never encoded again: the tokens of the next message follow it, whatever a template would
make of the answer's text. They are found by rendering a stand-in for the answer: what comes after it and its end mark, which
the model has drawn itself. A prompt that is a text goes on with the texts as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trinity.errors import InvalidRequest
from trinity.text.conversation import Chat, render
from trinity.text.tokenizer import Tokenizer

STAND_IN = "\ue000an answer\ue001"  # of private use: in nobody's template or text


def between(tokenizer: Tokenizer, chat: Chat | None, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens from the end mark of an answer to where the next answer begins; `chat`: the prompt, None for a text. Raises
    InvalidRequest for a message with a control token in it, and for a template that shows it otherwise."""
    _refuse_control(tokenizer, messages)
    if chat is None:
        return tokenizer.encode("".join(message["content"] for message in messages))
    answered = [*chat.messages, {"role": "assistant", "content": STAND_IN}]
    end = _after(tokenizer, replace(chat, messages=answered, add_generation_prompt=False)).rstrip("\n")
    whole = _after(tokenizer, replace(chat, messages=[*answered, *messages], add_generation_prompt=True))
    if not whole.startswith(end):
        raise InvalidRequest(f"the chat template ends an answer with {end!r}, and one that is answered otherwise")
    return tokenizer.encode(whole[len(end) :])


def _after(tokenizer: Tokenizer, chat: Chat) -> str:
    _, shown, text = render(chat, tokenizer).rpartition(STAND_IN)
    if not shown:
        raise InvalidRequest("the chat template does not show an answer that was answered")
    return text


def _refuse_control(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> None:
    controls = [text for text, token_id in tokenizer.added_ids.items() if token_id in tokenizer.special_ids]
    for message in messages:
        if found := next((control for control in controls if control in message["content"]), None):
            raise InvalidRequest(f"a message holds the control token {found!r} as text; leave it out, or escape it")
