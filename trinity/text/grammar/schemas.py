"""JSON Schemas as they are compiled: within bounds, and with an end to every number.

Decisions. A greedy model that has begun a number may write digits until its tokens are used up. So a number without bounds
gets some: 18 digits before the point, 10 behind it, no exponent; where a schema says nothing at all of a value, it is replaced
by one that allows any JSON with such numbers. A `format` that the compiler does not know is a note to readers, as the standard
says. What the compiler cannot follow it refuses by name; nothing that constrains is dropped.
"""

from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64
MAX_NODES = 5000  # schemas in a schema
MAX_ENUM = 10_000  # values of all enums
MAX_MULTIPLE = 10_000  # an automaton has so many states
MOST, STEP = 1e18, 1e-10
FORMATS = {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
ONE = {"items", "additionalItems", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "contains"}
ONE |= {"propertyNames", "not", "if", "then", "else"}
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
ANY = "trinity_any_value"
NUMBER = {"type": "number", "minimum": -MOST, "maximum": MOST, "multipleOf": STEP}
ANY_REF = {"$ref": f"#/$defs/{ANY}"}
ANY_SCHEMA = {
    "anyOf": [
        {"type": ["string", "boolean", "null"]},
        NUMBER,
        {"type": "array", "items": ANY_REF},
        {"type": "object", "additionalProperties": ANY_REF},
    ]
}
OBJECT = {"type": "object", "additionalProperties": ANY_REF, "$defs": {ANY: ANY_SCHEMA}}


def bounded(schema: dict[str, Any], is_closed: bool = False) -> dict[str, Any]:
    """A schema whose numbers end; what follows it follows `schema`, too. Raises ValueError over the bounds."""
    out: dict[str, Any] = _Rewriter(is_closed).rewritten(schema, 0)
    defs = out.get("$defs", {})
    return {**out, "$defs": {**defs, ANY: ANY_SCHEMA}} if isinstance(defs, dict) else out


@dataclass
class _Rewriter:
    is_closed: bool
    num_nodes: int = 0
    num_values: int = 0

    def rewritten(self, schema: Any, depth: int) -> Any:
        """The schema with bounds, all schemas in it, too; what is no schema is the compiler's to refuse."""
        if schema is True or (isinstance(schema, dict) and depth and not schema.keys() - NOTES):
            return ANY_REF
        if not isinstance(schema, dict):
            return schema
        self._count(schema, depth)
        out = {key: self._inner(key, value, depth) for key, value in schema.items() if key != "x-guidance"}
        if isinstance(out.get("format"), str) and out["format"] not in FORMATS:
            del out["format"]
        if self.is_closed and "properties" in out and "unevaluatedProperties" not in out:
            out.setdefault("additionalProperties", False)
        return _with_bounds(out)

    def _inner(self, key: str, value: Any, depth: int) -> Any:
        if key in MAPS and isinstance(value, dict):
            return {name: self.rewritten(inner, depth + 1) for name, inner in value.items()}
        if key in LISTS and isinstance(value, list):
            return [self.rewritten(inner, depth + 1) for inner in value]
        return self.rewritten(value, depth + 1) if key in ONE else value

    def _count(self, schema: dict[str, Any], depth: int) -> None:
        self.num_nodes += 1
        self.num_values += len(values) if isinstance(values := schema.get("enum"), list) else 0
        for name, number, most in (
            ("levels", depth + 1, MAX_DEPTH),
            ("parts", self.num_nodes, MAX_NODES),
            ("values in its enums", self.num_values, MAX_ENUM),
        ):
            if number > most:
                raise ValueError(f"the schema has over {most:,} {name}; ask for less structure")


def _with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    multiple: Any = schema.get("multipleOf")
    if _is_number(multiple) and multiple > MAX_MULTIPLE:
        raise ValueError(
            f"multipleOf is {str(multiple)[:40]}, at most {MAX_MULTIPLE:,} is taken; check such numbers yourself"
        )
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if not {"integer", "number"} & {each for each in kinds if isinstance(each, str)}:
        return schema
    out = _within(_within(schema, "minimum", "exclusiveMinimum", -MOST), "maximum", "exclusiveMaximum", MOST)
    if "number" in kinds:
        out.setdefault("multipleOf", STEP)
    return out


def _within(schema: dict[str, Any], name: str, exclusive: str, most: float) -> dict[str, Any]:
    """The schema with the bound `most` on one side where the schema has none there, or one further out."""
    outward = 1 if most > 0 else -1
    given = {key: schema[key] for key in (name, exclusive) if _is_number(schema.get(key))}
    for key, value in given.items():
        if outward * value < -MOST:
            raise ValueError(f"{key} is {str(value)[:40]}; numbers are written with 18 digits at most")
    inner = {key for key, value in given.items() if outward * value <= MOST}
    out = {key: value for key, value in schema.items() if key not in given or key in inner}
    return out if inner else {**out, name: most}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
