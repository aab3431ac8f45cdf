"""Pieces of grammars in Lark's notation, as the library reads it."""

import json
from typing import Any


def quoted(text: str) -> str:
    """A text that is to be written as it is."""
    return json.dumps(text, ensure_ascii=False)


def embedded(schema: dict[str, Any], whitespace: str, is_lenient: bool = False) -> str:
    """JSON by a schema, with so much whitespace. What of the schema the library cannot follow is an error, or ignored."""
    options: dict[str, Any] = {"whitespace_flexible": bool(whitespace), "coerce_one_of": True, "lenient": is_lenient}
    options |= {"whitespace_pattern": whitespace} if whitespace else {}
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"
