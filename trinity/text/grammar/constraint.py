"""Constraints: what a client may ask the text of an answer to be, as a value that travels with a request.

Decision: only what reading needs is checked here, in whatever process takes the request; what a schema or a pattern may cost is
found where it is compiled (admission.py).
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["json", "regex", "choice", "grammar", "json_object", "tools"]
MAX_BYTES = {"tools": 256 << 10}  # agents describe many tools; of the others 64 KiB
MAX_TEXT_BYTES = 64 << 10
MAX_CHOICES = 1000
MAX_WHITESPACE_CHARS = 256
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,8}"  # compact, spaced and indented JSON; no endless run of newlines
KINDS = tuple(kind for kind in get_args(Kind) if kind != "tools")
OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")


@dataclass(frozen=True)
class Constraint:
    """A kind, and its text: a JSON Schema, a pattern, a JSON list of texts, a grammar in Lark's notation, or tools (tools.py).

    `whitespace` is the pattern of whitespace between the tokens of JSON. `is_closed`: an object whose schema does not speak of
    additional properties has none.
    """

    kind: Kind
    text: str = ""
    whitespace: str = WHITESPACE
    is_closed: bool = False

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Constraint":
        """Read {"json": ...}, or one of the other kinds. Raises ValueError that names value, bound and remedy."""
        fields = {key: value for key, value in tree.items() if value is not None}
        if unknown := fields.keys() - set(KINDS) - set(OPTIONS):
            raise ValueError(f"{sorted(unknown)[0][:100]!r} is unknown; there are {', '.join(KINDS + OPTIONS)}")
        given = [kind for kind in KINDS if kind in fields]
        if len(given) != 1:
            raise ValueError(f"{len(given)} constraints ({', '.join(given)}); set exactly one of {', '.join(KINDS)}")
        text = READERS[given[0]](fields[given[0]])
        check_bytes(given[0], text)
        return cls(given[0], text, _whitespace(fields), _flag(fields, "disable_additional_properties"))

    def tree(self) -> dict[str, Any]:
        """The same in the words of `of`."""
        value = True if self.kind == "json_object" else json.loads(self.text) if self.kind == "choice" else self.text
        options = {"whitespace_pattern": self.whitespace} if self.whitespace != WHITESPACE else {}
        return {self.kind: value, **options, **({"disable_additional_properties": True} if self.is_closed else {})}


def check_bytes(kind: str, text: str) -> None:
    size, most = len(text.encode("utf-8", "surrogatepass")), MAX_BYTES.get(kind, MAX_TEXT_BYTES)
    if size > most:
        raise ValueError(f"{kind} has {size:,} bytes, at most {most:,} are taken; ask for less structure")


def _schema(value: Any) -> str:
    """A JSON Schema in one line, its keys in their order: properties are written in it. A string is read as JSON."""
    if isinstance(value, str):
        check_bytes("json", value)
        value = _loaded(value)
    if not isinstance(value, dict):
        raise ValueError(f"json is a {type(value).__name__}; a JSON Schema is an object")
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ValueError("the JSON Schema is nested too deeply; flatten it") from None
    except TypeError as error:
        raise ValueError(f"the JSON Schema holds what JSON does not: {error}") from None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json is no JSON Schema: {str(error)[:200]}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{str(value)[:80]!r} is no pattern or grammar; send a text that is not empty")
    return value


def _choices(value: Any) -> str:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_CHOICES:
        raise ValueError(f"choice must be a list of 1 to {MAX_CHOICES} texts")
    for text in value:
        if not isinstance(text, str) or not text:
            raise ValueError(f"choice has {str(text)[:80]!r}; each must be a text that is not empty")
    return json.dumps(list(value), ensure_ascii=False)


def _true(value: Any) -> str:
    if value is not True:
        raise ValueError("json_object can only be true; leave it out for free text")
    return ""


READERS = {"json": _schema, "regex": _text, "choice": _choices, "grammar": _text, "json_object": _true}


def _whitespace(fields: dict[str, Any]) -> str:
    if _flag(fields, "disable_any_whitespace"):
        return ""
    pattern = fields.get("whitespace_pattern", WHITESPACE)
    if not isinstance(pattern, str) or len(pattern) > MAX_WHITESPACE_CHARS:
        raise ValueError(f"whitespace_pattern must be a text of at most {MAX_WHITESPACE_CHARS} characters")
    return pattern


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {str(value)[:80]!r}; it can be true or false")
    return value
