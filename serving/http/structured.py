"""`response_format` of the OpenAI API, as the engine's structured_outputs."""

import re
from typing import Any

from trinity.errors import InvalidRequest

KINDS = ("text", "json_object", "json_schema")
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MEMBERS = {"name", "schema", "strict", "description"}


def with_response_format(fields: dict[str, Any], form: Any) -> dict[str, Any]:
    """The sampling fields of a body with what its response_format asks for. Raises InvalidRequest."""
    if form is None:
        return fields
    constraint = _constraint(form)
    if constraint is None:
        return fields
    if fields.get("structured_outputs") is not None:
        raise _refusal("beside structured_outputs it says two things; send one of them")
    return {**fields, "structured_outputs": constraint}


def _constraint(form: Any) -> dict[str, Any] | None:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in KINDS:
        raise _refusal(f"type is {str(kind)[:80]!r}; it can be {', '.join(KINDS)}")
    members = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if unknown := form.keys() - members:
        raise _refusal(f"{min(unknown)[:100]!r} is unknown beside type {kind!r}")
    if kind == "json_schema":
        return _schema(form.get("json_schema"))
    return {"json_object": True} if kind == "json_object" else None


def _schema(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict) or not isinstance(tree.get("schema"), dict):
        raise _refusal("json_schema must be an object with a name and a schema, which is an object, too")
    if unknown := tree.keys() - MEMBERS:
        raise _refusal(f"json_schema has {min(unknown)[:100]!r}; it has {', '.join(sorted(MEMBERS))}")
    name, strict = tree.get("name"), tree.get("strict")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _refusal(f"json_schema.name is {str(name)[:80]!r}; it has 1 to 64 letters, digits, _ or -")
    if strict not in (None, True, False) or (isinstance(strict, int) and not isinstance(strict, bool)):
        raise _refusal(f"json_schema.strict is {str(strict)[:80]!r}; it can be true or false")
    return {"json": tree["schema"], "disable_additional_properties": bool(strict)}


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"response_format: {why}", param="response_format")
