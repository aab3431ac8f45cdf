"""Which tool has to be called: `tool_choice`. The one place where grammars meet it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from trinity.errors import InvalidRequest
from trinity.text.grammar.constraint import Constraint
from trinity.text.grammar.tools import CallForm, tools_constraint
from trinity.utils.trying import tried

FORMS = get_args(CallForm)  # formats of calls that have a grammar


@dataclass(frozen=True)
class Choice:
    """`name` is the one tool's to be called, where it is `named`."""

    kind: Literal["none", "auto", "required", "named"] = "auto"
    name: str = ""


def check_choice(choice: Choice, tools: Sequence[dict[str, Any]]) -> None:
    """Raise InvalidRequest for a choice among no tools."""
    if choice.kind == "named" and choice.name not in [tool["function"]["name"] for tool in tools]:
        raise InvalidRequest(
            f"tool_choice names {choice.name[:100]!r}, which is no tool of this request", param="tool_choice"
        )
    if choice.kind == "required" and not tools:
        raise InvalidRequest("tool_choice is 'required', and there are no tools; send some", param="tool_choice")


def constraint_of(
    choice: Choice,
    tools: Sequence[dict[str, Any]],
    form: str | None,
    parallel: bool,
    answer: Constraint | None = None,
) -> Constraint | None:
    """The grammar that sees to calls that have to be made, to arguments of strict tools, and to what is said instead of calls
    (`answer`); None where there is no more to see to than `answer`.

    `form`: the name of the model's format of calls. Raises InvalidRequest where that has no grammar, and for calls that have to
    be made beside another `answer`."""
    is_forced = choice.kind in ("required", "named")
    if form not in FORMS:
        if is_forced:
            raise InvalidRequest(
                f"tool_choice may be 'auto' or 'none': calls can be seen to in {' and '.join(FORMS)}, and this model's are "
                f"written in {form or 'no format'}",
                param="tool_choice",
            )
        return None
    if is_forced and answer is not None:
        raise InvalidRequest(
            "a call has to be made, and response_format or structured_outputs say what else the answer must be; send one",
            param="tool_choice",
        )
    if not tools or (answer is not None and answer.kind not in ("json", "json_object")):
        return None
    wanted = {"function": {"name": choice.name}} if choice.kind == "named" else choice.kind
    found = tried(lambda: tools_constraint(cast(CallForm, form), tools, wanted, parallel, answer), ValueError)
    if isinstance(found, ValueError):
        raise InvalidRequest(f"tools: {found}", param="tools")
    return found
