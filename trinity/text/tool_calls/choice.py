"""Which tool has to be called: `tool_choice`. The one place where grammars meet it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trinity.errors import InvalidRequest


@dataclass(frozen=True)
class Choice:
    """`name` is the one tool's to be called, where it is `named`."""

    kind: Literal["none", "auto", "required", "named"] = "auto"
    name: str = ""


def needed_tools(choice: Choice, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools of which the answer has to call one, for a grammar of just their calls; none where the model is free."""
    if choice.kind == "required":
        return list(tools)
    return [tool for tool in tools if choice.kind == "named" and tool["function"]["name"] == choice.name]


def check_choice(choice: Choice, tools: Sequence[dict[str, Any]]) -> None:
    """Raise InvalidRequest for a choice among no tools, and for one that takes a grammar: there is none yet."""
    if choice.kind == "named" and not needed_tools(choice, tools):
        raise InvalidRequest(
            f"tool_choice names {choice.name[:100]!r}, which is no tool of this request", param="tool_choice"
        )
    if choice.kind == "required" and not tools:
        raise InvalidRequest("tool_choice is 'required', and there are no tools; send some", param="tool_choice")
    if needed_tools(choice, tools):
        raise InvalidRequest(
            "tool_choice may be 'auto' or 'none'; calls that have to be made are not implemented", param="tool_choice"
        )
