"""The served model as `GET /v1/models` tells of it: OpenAI's fields, vLLM's, and those that Anthropic's clients read."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from serving.frontend import EngineInfo, Served


def model_card(info: EngineInfo, created_s: int, served: Served) -> dict[str, Any]:
    """`created_s`: Unix seconds at which the server began to serve the base."""
    return {
        "id": served.model,
        "object": "model",
        "created": created_s,
        "owned_by": "trinity",
        "root": served.model,
        "parent": info.model if served.adapter else None,
        "max_model_len": info.max_model_len,
        "permission": [_permission(served.model, created_s)],
        "type": "model",
        "display_name": served.model,
        "created_at": datetime.fromtimestamp(created_s, UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": info.max_model_len - 1,
    }


def model_list(info: EngineInfo, created_s: int, models: Sequence[Served]) -> dict[str, Any]:
    page = {"has_more": False, "first_id": models[0].model, "last_id": models[-1].model}
    return {"object": "list", "data": [model_card(info, created_s, each) for each in models], **page}


def _permission(model: str, created_s: int) -> dict[str, Any]:
    """Old clients of OpenAI's look for one."""
    granted = dict.fromkeys(("allow_sampling", "allow_logprobs", "allow_view"), True)
    others = ("allow_create_engine", "allow_search_indices", "allow_fine_tuning", "is_blocking")
    head = {"id": f"modelperm-{model}", "object": "model_permission", "created": created_s}
    return {**head, **granted, **dict.fromkeys(others, False), "organization": "*", "group": None}
