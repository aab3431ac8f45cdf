"""Bodies of POST /v1/responses, OpenAI's Responses API, without its state: what was said before is sent again.

Decisions: items of the output may come back as they are. Reasoning, texts and calls that follow each other are one message of
the assistant, as the model wrote them. Tools that OpenAI itself runs, and what it keeps for later, are refused.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from serving.http.chat import MAX_MESSAGES, Effort, Tolerant
from serving.http.door import Door, joined
from serving.http.schema import IGNORED_BY_RESPONSES
from serving.http.strict import Refusals, Strict
from trinity.errors import InvalidRequest
from trinity.text.conversation import MAX_TOOLS

MAX_ITEMS = 4 * MAX_MESSAGES  # a turn of an agent is some: reasoning, text, a call, its output
MAX_METADATA, MAX_INCLUDED = 16, 64
STATELESS = "nothing is kept here between requests; send what was said before as items of `input`"
REFUSED_BY_RESPONSES: Refusals = {
    "previous_response_id": ((), STATELESS),
    "conversation": ((), STATELESS),
    "background": ((False,), "background work is not implemented; stream the answer"),
    "prompt": ((), "prompts by id are not implemented; send their text as `instructions`"),
    "truncation": (("disabled",), "truncation is not implemented; leave old items out of `input`"),
    "top_logprobs": ((0,), "log-probabilities are for /v1/chat/completions"),
    "moderation": ((), "moderation is not implemented"),
    "max_tokens": ((), "max_tokens is called 'max_output_tokens' here"),
    "max_completion_tokens": ((), "max_completion_tokens is called 'max_output_tokens' here"),
    "messages": ((), "messages are items of 'input' here"),
    "response_format": ((), "response_format is called 'text.format' here, without the inner json_schema"),
}
LOGPROBS = "message.output_text.logprobs"


class InputText(Tolerant):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class Refusal(Tolerant):
    """A part with what a model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Parts = Annotated[
    list[Annotated[InputText | Refusal, Field(discriminator="type")]],
    Field(fail_fast=True),
    BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
]


def text_of(parts: Parts) -> str:
    return "".join(part.text for part in parts)


def compact(parts: Parts) -> Parts:
    return [InputText(type="text", text=text_of(parts))]


class MessageItem(Tolerant):
    """`phase` is the client's note of what an answer's message is for."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    phase: str | None = None

    def compact(self) -> Self:
        return self.model_copy(update={"content": compact(self.content)})


class CallItem(Tolerant):
    """`arguments` is what the model wrote: JSON, or not."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: str = ""


class OutputItem(Tolerant):
    """Output of a function."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: Parts

    def compact(self) -> Self:
        return self.model_copy(update={"output": compact(self.output)})


class ReasoningItem(Tolerant):
    """`encrypted_content` is another server's, which alone can read it."""

    type: Literal["reasoning"]
    content: Parts = Field(default=[])
    summary: Parts = Field(default=[])
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        return text_of(self.content) or text_of(self.summary)

    def compact(self) -> Self:
        whole = InputText(type="text", text=self.text)
        return self.model_copy(update={"content": [whole], "summary": [], "encrypted_content": None})


def kind_of(item: Any) -> str | None:
    """Messages may leave their type out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        kind_of,
        custom_error_type="item",
        custom_error_message="an item is of type message, function_call, function_call_output or reasoning; "
        "what a server keeps cannot be referred to",
    ),
]
Items = Annotated[
    list[Item],
    Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS),
    BeforeValidator(lambda given: [{"role": "user", "content": given}] if isinstance(given, str) else given),
]


class FunctionTool(Tolerant):
    """`strict` asks for arguments that fit the schema."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def nested(self) -> dict[str, Any]:
        """The same tool as chats have it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class NamedTool(Strict):
    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """`json_schema` is flat here: its name, schema and so on lie beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def nested(self) -> dict[str, Any]:
        """The same as a chat's response_format."""
        rest = self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": self.type, **({"json_schema": rest} if self.type == "json_schema" else rest)}


class TextOptions(Strict):
    format: TextFormat = TextFormat()
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Tolerant):
    """Reasoning is shown as it is, whatever summary of it is asked for."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Door):
    """POST /v1/responses"""

    IGNORES: ClassVar[frozenset[str]] = IGNORED_BY_RESPONSES
    REFUSES: ClassVar[Refusals] = REFUSED_BY_RESPONSES
    NAMES: ClassVar[dict[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "verbosity": "text.verbosity",
    }
    input: Items
    instructions: str | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31)
    metadata: dict[str, str] = Field(default={}, max_length=MAX_METADATA)
    include: list[str] = Field(default=[], max_length=MAX_INCLUDED)

    @field_validator("tools", mode="before")
    @classmethod
    def _only_functions(cls, tools: Any) -> Any:
        for tool in tools if isinstance(tools, list) else ():
            if isinstance(tool, dict) and (kind := tool.get("type")) != "function":
                raise InvalidRequest(
                    f"a tool has type {str(kind)[:80]!r}; only functions, which the client runs, are implemented",
                    param="tools",
                )
        return tools

    @model_validator(mode="after")
    def _without_logprobs(self) -> Self:
        if LOGPROBS in self.include:
            raise InvalidRequest("log-probabilities are for /v1/chat/completions", param="include")
        return self

    def compact(self) -> Self:
        return self.model_copy(update={"input": [item.compact() for item in self.input], "include": []})

    def chat_body(self) -> dict[str, Any]:
        told = {"role": "system", "content": self.instructions}
        choice = self.tool_choice
        body = {
            "messages": joined([*([told] if self.instructions else []), *messages(self.input)]),
            "tools": [tool.nested() for tool in self.tools],
            "tool_choice": {"function": {"name": choice.name}} if isinstance(choice, NamedTool) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "max_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort,
            "verbosity": self.text.verbosity,
        }
        form = {} if self.text.format == TextFormat() else {"response_format": self.text.format.nested()}
        return body | form


def messages(given: Items) -> list[dict[str, Any]]:
    """The messages of a chat that these items make."""
    out: list[dict[str, Any]] = []
    for item in given:
        match item:
            case OutputItem():
                out.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
            case MessageItem() if item.role != "assistant":
                out.append({"role": item.role, "content": text_of(item.content)})
            case _:
                _into_turn(_turn(out, item), item)
    return out


def _turn(out: list[dict[str, Any]], item: Item) -> dict[str, Any]:
    """The assistant's message that the item belongs to: the last one, or one that begins with it."""
    last = out[-1] if out and out[-1]["role"] == "assistant" else None
    is_next = last is not None and (last["tool_calls"] or last["content"])
    is_apart = isinstance(item, ReasoningItem) or (isinstance(item, MessageItem) and last and not last["tool_calls"])
    if last is None or (is_next and is_apart):
        out.append({"role": "assistant", "content": "", "reasoning": "", "tool_calls": []})
    return out[-1]


def _into_turn(turn: dict[str, Any], item: Item) -> None:
    match item:
        case ReasoningItem():
            turn["reasoning"] += item.text
        case MessageItem():
            turn["content"] += text_of(item.content)
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            turn["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
