"""The ways in which models write calls of tools, and which one a checkpoint's template teaches."""

from typing import NamedTuple

from trinity.text.tool_calls.glm import GlmReader
from trinity.text.tool_calls.hermes import HermesReader
from trinity.text.tool_calls.qwen3_coder import Qwen3CoderReader
from trinity.text.tool_calls.reader import CallReader


class ToolFormat(NamedTuple):
    """`open` and `close` are the markers around a block of calls; `reader` reads one of them; a template that shows `sign`
    teaches this format."""

    name: str
    reader: type[CallReader]
    sign: str
    open: str = "<tool_call>"
    close: str = "</tool_call>"

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.open, self.close, *self.reader.markers)


# The last one is looked for last: its sign is in the others' templates, too.
FORMATS = (
    ToolFormat("qwen3_coder", Qwen3CoderReader, "<function="),
    ToolFormat("glm", GlmReader, "<arg_key>"),
    ToolFormat("hermes", HermesReader, "<tool_call>"),
)


def format_of(name: str, template: str | None) -> ToolFormat | None:
    """The format of that name; for `auto` what the template shows; None where there is none."""
    if name == "auto":
        shown = template or ""
        return next((each for each in FORMATS if each.sign in shown and "tools" in shown), None)
    return next((each for each in FORMATS if each.name == name), None)
