"""`StructuredOutput` of the gRPC API in the engine's words."""

from typing import Any

from protos.trinity.v1 import inference_pb2 as pb
from trinity.errors import InvalidRequest

NAMES = {"json_schema": "json"}


def structured_outputs(message: pb.StructuredOutput) -> dict[str, Any]:
    """Constraint as SamplingParams takes it. Raises InvalidRequest where no constraint is set."""
    kind = message.WhichOneof("constraint")
    if kind is None:
        raise InvalidRequest("structured_outputs has no constraint; set one of its kinds", param="structured_outputs")
    value = getattr(message, kind)
    options = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
    given = {name: getattr(message, name) for name in options if message.HasField(name)}
    return {NAMES.get(kind, kind): list(value.texts) if kind == "choice" else value, **given}
