"""Doors beside the chat's: bodies of other APIs that say what a body of /v1/chat/completions can say.

Decision: a door translates a body into a chat's and checks it as that, so that there is one way to generate: what the chat's
door takes, bounds and refuses, these do too.
"""

from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from serving.http.schema import ChatRequest, of_tree
from serving.http.strict import Strict
from trinity.errors import InvalidRequest


class Door(Strict):
    """`carried` gathers the fields that a chat takes under the same name. `NAMES`: what a chat's field is called here."""

    NAMES: ClassVar[dict[str, str]] = {}
    model: str | None = None
    stream: bool = False
    carried: dict[str, Any] = Field(default={})

    def chat_body(self) -> dict[str, Any]:
        """The body for /v1/chat/completions that asks for the same."""
        raise NotImplementedError

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat request of it, checked. Raises InvalidRequest."""
        try:
            return of_tree(ChatRequest, self.carried | self.chat_body())
        except InvalidRequest as error:
            head, dot, rest = (error.param or "").partition(".")
            error.param = self.NAMES.get(head, head) + dot + rest or None
            raise

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Check the chat: its faults are this body's. InvalidRequest goes through pydantic as it is."""
        assert self.chat is not None
        return self


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages, the system's at the beginning as one: many templates show only the first."""
    num = next(
        (i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), len(messages)
    )
    if num < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:num])
    return [{"role": "system", "content": text}, *messages[num:]]
