"""Answers of one model: which calls and which reasoning they may hold, and a parser for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trinity.errors import InvalidRequest
from trinity.text import reasoning
from trinity.text.tokenizer import Tokenizer
from trinity.text.tool_calls.events import Event, Text, merged
from trinity.text.tool_calls.formats import ToolFormat, format_of
from trinity.text.tool_calls.parser import AnswerParser, Markup

Tools = Sequence[dict[str, Any]]  # as OpenAI writes them: {"type": "function", "function": {"name", "parameters", ...}}


class Parser(Protocol):
    """AnswerParser, or Verbatim."""

    num_calls: int
    num_reasoning_tokens: int

    def push(self, token_ids: Sequence[int], text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


def read(parser: Parser, token_ids: Sequence[int], text: str, is_last: bool) -> list[Event]:
    """Events of these tokens, and with the last ones of all that was held back; neighbouring pieces in one."""
    return merged(parser.push(token_ids, text) + (parser.finish() if is_last else []))


class Verbatim:
    """Parser for answers that hold nothing but text."""

    num_calls = num_reasoning_tokens = 0

    def push(self, token_ids: Sequence[int], text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(frozen=True)
class AnswerFormat:
    """Form of the answers of one model. `tools` is None where it calls none."""

    tokenizer: Tokenizer
    tools: ToolFormat | None
    reasons: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_format: str = "auto", reasoning_format: str = "auto") -> "AnswerFormat":
        """Make it by the names of `serve.tool_format` and `serve.reasoning_format`; `auto` looks into the chat template."""
        template = tokenizer.chat_template
        reasons = reasoning.is_in_template(template) if reasoning_format == "auto" else reasoning_format == "think"
        return cls(tokenizer, format_of(tool_format, template), reasons)

    @property
    def tool_format(self) -> str | None:
        """The name of the format of calls."""
        return self.tools and self.tools.name

    def check_tools(self, tools: Tools) -> None:
        """Raise InvalidRequest for tools that the model cannot be told of."""
        if tools and self.tools is None:
            raise InvalidRequest(
                "this model's chat template shows no calls of tools; describe them in a message, or serve it with "
                "serve.tool_format",
                param="tools",
            )

    def parser(
        self,
        prompt_ids: Sequence[int],
        tools: Tools = (),
        most_calls: int | None = None,
        skip_special: bool = True,
    ) -> Parser:
        """A parser for one answer to this prompt, of which the first `most_calls` calls count. `skip_special` as the engine's:
        does its text leave out special tokens?"""
        if not tools and not self.reasons:
            return Verbatim()
        markup = self._markup(with_tools=bool(tools))
        starts_inside = self.reasons and reasoning.starts_inside(prompt_ids, self.tokenizer, markup.marker_by_id)
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        return AnswerParser(self.tokenizer, markup, schemas, starts_inside, most_calls, skip_special=skip_special)

    def _markup(self, with_tools: bool) -> Markup:
        tools = self.tools if with_tools else None
        markers = (*(tools.markers if tools else ()), *(reasoning.MARKERS if self.reasons else ()))
        ids = {self.tokenizer.added_ids[marker]: marker for marker in markers if marker in self.tokenizer.added_ids}
        return Markup(tools, self.reasons, ids, tuple(marker for marker in markers if marker not in ids.values()))
