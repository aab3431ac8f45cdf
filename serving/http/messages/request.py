"""Bodies of POST /v1/messages and /v1/messages/count_tokens, Anthropic's Messages API.

Decisions: results of tools, which are blocks of the user's, become messages of tools; one that is an error says so in front of
its text. Blocks of one message are joined by a line's end, but the assistant's as they are: that is what the model wrote. A
last message of the assistant's is gone on with. Budgets of thinking are accepted, and the model thinks as long as it does.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator

from serving.http.chat import MAX_MESSAGES, Effort, Tolerant
from serving.http.door import Door, joined
from serving.http.schema import IGNORED_BY_MESSAGES
from serving.http.strict import Strict
from trinity.engine.request import MAX_STOP_STRINGS
from trinity.errors import InvalidRequest
from trinity.text.conversation import MAX_TOOLS, check_nesting

TOOL_HINTS = frozenset({"cache_control", "eager_input_streaming", "defer_loading", "allowed_callers", "input_examples"})
BLOCK_HINTS = frozenset({"citations", "caller", "toolset_name"})
MAX_INPUT_DEPTH = 128
FORMAT_NAME = "output"  # a chat's schema has a name


class Hinted(Tolerant):
    """Block that may say where it comes from, which does not change the prompt."""

    @classmethod
    def _says_nothing(cls, key: str, value: Any) -> bool:
        return key in BLOCK_HINTS or super()._says_nothing(key, value)


class TextBlock(Hinted):
    type: Literal["text"]
    text: str


def as_blocks(given: Any) -> Any:
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


Texts = Annotated[list[TextBlock], Field(fail_fast=True), BeforeValidator(as_blocks)]


def text_of(blocks: list[TextBlock], between: str = "\n") -> str:
    return between.join(block.text for block in blocks if block.text)


class ThinkingBlock(Tolerant):
    """`signature` is nobody's proof here."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Tolerant):
    """Thoughts of another server's model; only that server can read it."""

    type: Literal["redacted_thinking"]
    data: str = ""


class ToolUseBlock(Hinted):
    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any] = Field(default={})

    @field_validator("input")
    @classmethod
    def _check_depth(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_nesting(value, MAX_INPUT_DEPTH, "messages")
        return value

    def call(self) -> dict[str, Any]:
        """The same as chats have it."""
        arguments = json.dumps(self.input, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolResultBlock(Hinted):
    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: Texts = Field(default=[])
    is_error: bool = False

    def message(self) -> dict[str, Any]:
        """The same as chats have it."""
        text = ("Error: " if self.is_error else "") + text_of(self.content)
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": text}

    def compact(self) -> Self:
        return self.model_copy(update={"content": as_texts(text_of(self.content))})


def as_texts(text: str) -> list[TextBlock]:
    return [TextBlock(type="text", text=text)] if text else []


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
Blocks = Annotated[
    list[Annotated[Block, Field(discriminator="type")]], Field(fail_fast=True), BeforeValidator(as_blocks)
]
OF_ROLE = {
    "user": TextBlock | ToolResultBlock,
    "assistant": TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock,
    "system": TextBlock,
}


class Message(Tolerant):
    role: Literal["user", "assistant", "system"]
    content: Blocks

    @field_validator("content")
    @classmethod
    def _of_role(cls, blocks: list[Block], info: Any) -> list[Block]:
        role = info.data.get("role", "user")
        if wrong := next((block for block in blocks if not isinstance(block, OF_ROLE[role])), None):
            raise ValueError(f"a message of role {role} has no block of type {wrong.type}")
        return blocks

    def messages(self) -> list[dict[str, Any]]:
        """The same as chats have it: first the tools' results."""
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        if self.role == "assistant":
            thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
            calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
            return [
                {"role": self.role, "content": text_of(texts, ""), "reasoning": "".join(thoughts), "tool_calls": calls}
            ]
        results = [block.message() for block in self.content if isinstance(block, ToolResultBlock)]
        return [*results, *([{"role": self.role, "content": text_of(texts)}] if texts or not results else [])]

    def compact(self) -> Self:
        """One block of text, at the end, and none of what is ignored."""
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        kept: list[Block] = [block for block in self.content if isinstance(block, ThinkingBlock | ToolUseBlock)]
        kept += [block.compact() for block in self.content if isinstance(block, ToolResultBlock)]
        whole = as_texts(text_of(texts, "" if self.role == "assistant" else "\n"))
        return self.model_copy(update={"content": [*kept, *whole]})


class Tool(Tolerant):
    """`strict` asks for an input that fits the schema. Tools of other types are run by Anthropic."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    strict: bool | None = None

    @classmethod
    def _says_nothing(cls, key: str, value: Any) -> bool:
        return key in TOOL_HINTS or super()._says_nothing(key, value)

    def nested(self) -> dict[str, Any]:
        """The same tool as chats have it."""
        told = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": told}


class ToolChoice(Strict):
    """`any` tool has to be called, or the one that is named."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def nested(self) -> Any:
        """The same as a chat's tool_choice."""
        if self.type == "tool":
            return {"function": {"name": self.name or ""}}
        return "required" if self.type == "any" else self.type


class Thinking(Strict):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountRequest(Door):
    """POST /v1/messages/count_tokens: what makes the prompt."""

    IGNORES: ClassVar[frozenset[str]] = IGNORED_BY_MESSAGES
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Texts = Field(default=[])
    tools: Annotated[list[Tool], Field(fail_fast=True)] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()

    @field_validator("tools", mode="before")
    @classmethod
    def _only_custom(cls, tools: Any) -> Any:
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict) and (kind := tool.get("type") or "custom") != "custom":
                raise InvalidRequest(
                    f"a tool has type {str(kind)[:80]!r}; only those that the client runs, of type custom, are implemented",
                    param="tools",
                )
        return tools

    def compact(self) -> Self:
        messages = [message.compact() for message in self.messages]
        return self.model_copy(update={"messages": messages, "system": as_texts(text_of(self.system))})

    def chat_body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        said = [told for message in self.messages for told in message.messages()]
        body = {
            "messages": joined([*system, *said]),
            "tools": [tool.nested() for tool in self.tools],
            "tool_choice": self.tool_choice.nested(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "reasoning_effort": self.output_config.effort,
        }
        return body | self._continued() | self._thinking() | self._format()

    def _continued(self) -> dict[str, Any]:
        is_continued = self.messages[-1].role == "assistant"
        return {"continue_final_message": True, "add_generation_prompt": False} if is_continued else {}

    def _thinking(self) -> dict[str, Any]:
        """Say whether it thinks: without a word about it the model does as its template says."""
        if self.thinking is None:
            return {}
        thinks = self.thinking.type != "disabled"
        own = {"enable_thinking": thinks} | self.carried.get("chat_template_kwargs", {})
        shown = {"chat_template_kwargs": own, "include_reasoning": thinks and self.thinking.display != "omitted"}
        return {"thinking_token_budget": self.thinking.budget_tokens, **self.carried, **shown}

    def _format(self) -> dict[str, Any]:
        form = self.output_config.format
        schema = {"name": FORMAT_NAME, "schema": form.schema_, "strict": True} if form else {}
        return {"response_format": {"type": "json_schema", "json_schema": schema}} if form else {}


class MessagesRequest(CountRequest):
    """POST /v1/messages"""

    max_tokens: int = Field(ge=1, le=2**31)
    stop_sequences: list[str] = Field(default=[], max_length=MAX_STOP_STRINGS)

    def chat_body(self) -> dict[str, Any]:
        return super().chat_body() | {"max_tokens": self.max_tokens, "stop": self.stop_sequences}
