"""Messages, tools and what else makes a conversation, as OpenAI's and vLLM's clients write them.

Decisions: what an answer of ours holds, or one of another server's, may be sent back as it is: what does not change the
prompt is ignored (IGNORED_IN_MESSAGES), and what a model wrote as arguments is never parsed here. `developer` is today's name
of `system`.
"""

import re
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.http.strict import Strict
from trinity.errors import InvalidRequest
from trinity.text.conversation import MAX_CALLS, MAX_TOOLS, Chat, shown_tool
from trinity.text.grammar.constraint import Constraint
from trinity.text.tool_calls.choice import Choice, check_choice, constraint_of

MAX_MESSAGES, MAX_DOCUMENTS = 1024, 1024
IGNORED_IN_MESSAGES = frozenset(
    {
        *("id", "object", "index", "annotations", "parsed", "weight", "cache_control", "provider_specific_fields"),
        *(
            "reasoning_details",
            "thinking_blocks",
            "thinking",
            "signature",
            "status",
            "created_at",
            "metadata",
            "images",
        ),
    }
)
EMPTY: tuple[Any, ...] = ("", [], {})
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Tolerant(Strict):
    """Part of a message. Fields that do not change the prompt, and unknown ones without content, are ignored."""

    @model_validator(mode="before")
    @classmethod
    def _without_hints(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            key: value for key, value in fields.items() if key in cls.model_fields or not cls._says_nothing(key, value)
        }

    @classmethod
    def _says_nothing(cls, key: str, value: Any) -> bool:
        return value is None or value in EMPTY or key in IGNORED_IN_MESSAGES


class TextPart(Tolerant):
    type: Literal["text"]
    text: str


class RefusalPart(Tolerant):
    """A part with what a model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(Tolerant):
    """`arguments` is what the model wrote: JSON, or not."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any] = ""


class ToolCall(Tolerant):
    id: str = Field(default="", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class ChatMessage(Tolerant):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = Field(default=None, description="of the function, where a tool answers; else ignored")
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = Field(default=None, description="another name of `reasoning`")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] = Field(default=[], max_length=MAX_CALLS)
    tool_call_id: str | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role not in ("assistant", "tool"):
            raise ValueError(f"a message of role {self.role} needs content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning or self.reasoning_content):
            raise ValueError("only messages of role assistant have reasoning and tool_calls")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    def flat(self) -> dict[str, Any]:
        """Role and text, and what else there is of reasoning, calls and the call that a tool answers."""
        calls = [call.model_dump() for call in self.tool_calls]
        more = {
            "reasoning": self.reasoning or self.reasoning_content,
            "tool_calls": calls,
            "tool_call_id": self.tool_call_id,
            "name": self.name if self.role == "tool" else None,
        }
        return {"role": self.role, "content": self.text, **{key: value for key, value in more.items() if value}}

    def compact(self) -> Self:
        name = self.name if self.role == "tool" else None
        return self.model_copy(update={"content": self.text, "refusal": None, "name": name})


class Function(Tolerant):
    """`strict` asks for arguments that fit the schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _legal(cls, name: str) -> str:
        if not re.fullmatch("[a-zA-Z0-9_.:/-]{1,128}", name):
            raise ValueError(f"the name {name[:140]!r} is no function's; use 1 to 128 of a-z, A-Z, 0-9 and _.:/-")
        return name


class Tool(Tolerant):
    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """The part that the model sees."""
        return shown_tool(self.function.model_dump())


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


Messages = Annotated[list[ChatMessage], Field(fail_fast=True)]


class Conversation(Strict):
    """Fields that make the prompt of a chat, wherever one is sent."""

    messages: Messages = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: Annotated[list[Tool], Field(fail_fast=True)] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default={})
    documents: list[dict[str, Any]] = Field(default=[], max_length=MAX_DOCUMENTS)
    reasoning_effort: Effort | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Bounds of what only together is too much. InvalidRequest goes through pydantic as it is."""
        if self.continue_final_message and self.messages:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise InvalidRequest(
                    "excludes add_generation_prompt; set that to false", param="continue_final_message"
                )
            if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
                raise InvalidRequest(
                    "the last message is to be continued: let it be of role assistant, without calls",
                    param="continue_final_message",
                )
        assert self.chat is not None
        return self

    @cached_property
    def chat(self) -> Chat:
        """The chat as a template takes it, without tools where none may be called: their description would invite calls."""
        tools = [tool.shown() for tool in self.tools]
        check_choice(self._choice, tools)
        return Chat(
            [message.flat() for message in self.messages],
            [] if self.tool_choice == "none" else tools,
            self.add_generation_prompt,
            self.continue_final_message,
            template_arguments(self.reasoning_effort, self.documents, self.chat_template_kwargs),
        )

    def calls_constraint(self, form: str | None, parallel: bool, answer: Constraint | None) -> Constraint | None:
        """The grammar of what may or has to be called, in the model's format of calls, beside that of other answers."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return constraint_of(self._choice, tools, form, parallel, answer)

    @property
    def _choice(self) -> Choice:
        if isinstance(self.tool_choice, NamedTool):
            return Choice("named", self.tool_choice.function.name)
        return Choice(self.tool_choice)

    def compact(self) -> Self:
        return self.model_copy(update={"messages": [message.compact() for message in self.messages]})


def template_arguments(effort: str | None, documents: list[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template by name: thinking models' switches after `reasoning_effort`, the request's own last."""
    told: dict[str, Any] = {"documents": documents} if documents else {}
    if effort is not None:
        told |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return told | own
