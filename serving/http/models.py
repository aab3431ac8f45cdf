"""The served model as `GET /v1/models` tells of it: OpenAI's fields, vLLM's, and those that Anthropic's clients read."""

from datetime import UTC, datetime
from typing import Any

from serving.frontend import EngineInfo


def model_card(info: EngineInfo, created_s: int) -> dict[str, Any]:
    """`created_s`: Unix seconds at which the server began to serve it."""
    return {
        "id": info.model,
        "object": "model",
        "created": created_s,
        "owned_by": "trinity",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [_permission(info.model, created_s)],
        "type": "model",
        "display_name": info.model,
        "created_at": datetime.fromtimestamp(created_s, UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": info.max_model_len - 1,
    }


def model_list(info: EngineInfo, created_s: int) -> dict[str, Any]:
    page = {"has_more": False, "first_id": info.model, "last_id": info.model}
    return {"object": "list", "data": [model_card(info, created_s)], **page}


def _permission(model: str, created_s: int) -> dict[str, Any]:
    """Old clients of OpenAI's look for one."""
    granted = dict.fromkeys(("allow_sampling", "allow_logprobs", "allow_view"), True)
    others = ("allow_create_engine", "allow_search_indices", "allow_fine_tuning", "is_blocking")
    head = {"id": f"modelperm-{model}", "object": "model_permission", "created": created_s}
    return {**head, **granted, **dict.fromkeys(others, False), "organization": "*", "group": None}
