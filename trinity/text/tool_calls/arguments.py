"""JSON text of arguments that a model wrote as tags: each value is typed by the tool's schema, and texts flow as they come.

Decisions: where a schema allows a text, the value is a text, whatever it looks like; where it says nothing, only what begins
like an object or a list is read as JSON. A value that is no JSON of the wanted kind becomes a text: the tool may judge.
"""

import json
from collections.abc import Mapping
from typing import Any

WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's, which models mix in


class ArgumentsWriter:
    """Writes one object. `trims` drops the line breaks that the format puts around a value."""

    def __init__(self, schema: Mapping[str, Any], trims: bool):
        self._schema, self._trims = schema, trims
        self._opened = False
        self._value: ValueWriter | None = None

    @property
    def in_value(self) -> bool:
        return self._value is not None

    def key(self, name: str) -> str:
        opening = ", " if self._opened else "{"
        self._opened, self._value = True, ValueWriter(types_of(self._schema, name), self._trims)
        return f"{opening}{json.dumps(name, ensure_ascii=False)}: "

    def value(self, text: str) -> str:
        assert self._value is not None, "a value follows its key"
        return self._value.push(text)

    def end_value(self) -> str:
        assert self._value is not None, "a value follows its key"
        end, self._value = self._value.finish(), None
        return end

    def close(self) -> str:
        """The end of the object, and of the value that it is in."""
        return (self.end_value() if self.in_value else "") + ("}" if self._opened else "{}")


class ValueWriter:
    """One value. `_text` is what is not yet written of it."""

    def __init__(self, types: frozenset[str], trims: bool):
        self._types, self._trims, self._text = types, trims, ""
        self._started, self._is_text = False, False

    def push(self, text: str) -> str:
        self._text += text
        if self._trims and not self._started and self._text:
            self._text = self._text.removeprefix("\n")
            self._started = True
        if not (self._is_text or self._becomes_text()):
            return ""
        keep = 1 if self._trims and self._text.endswith("\n") else 0  # it may be the last
        ready, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        opening, self._is_text = "" if self._is_text else '"', True
        return opening + escaped(ready)

    def finish(self) -> str:
        rest = self._text.removesuffix("\n") if self._trims else self._text
        if self._is_text:
            return escaped(rest) + '"'
        if "string" in self._types and rest != "null":
            return f'"{escaped(rest)}"'
        return as_json(rest, has_types=bool(self._types))

    def _becomes_text(self) -> bool:
        """Is it certain to be a text?"""
        if self._types and "string" not in self._types:
            return False
        if "null" in self._types and "null".startswith(self._text.removesuffix("\n")):
            return False
        return bool(self._types) or self._text.lstrip()[:1] not in ("", "{", "[")


def escaped(text: str) -> str:
    """`text` as a part of a JSON text."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def as_json(text: str, has_types: bool = True) -> str:
    """JSON of what a model wrote for a value, as it is if it is any."""
    bare = text.strip()
    bare = WORDS.get(bare, bare)
    if has_types or bare[:1] in ("{", "["):
        try:
            json.loads(bare, parse_constant=_refuse)
        except (ValueError, RecursionError):  # what a model wrote may be anything
            return f'"{escaped(text)}"'
        return bare
    return f'"{escaped(text)}"'


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def types_of(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """Names of the JSON types that a parameter may have; none where the schema does not say."""
    properties = schema.get("properties")
    return _types(properties.get(name)) if isinstance(properties, Mapping) else frozenset()


def _types(schema: Any, depth: int = 4) -> frozenset[str]:
    if not isinstance(schema, Mapping) or not depth:
        return frozenset()
    told = schema.get("type")
    found = (
        {told}
        if isinstance(told, str)
        else {each for each in told if isinstance(each, str)}
        if isinstance(told, list)
        else set()
    )
    if not found and isinstance(values := schema.get("enum"), list):
        found = {"string" if isinstance(value, str) else "other" for value in values[:1024]}
    for word in ("anyOf", "oneOf", "allOf"):
        for branch in schema[word] if isinstance(schema.get(word), list) else ():
            found |= _types(branch, depth - 1)
    return frozenset(found)
