"""Pages for a browser and the data they ask for. A page itself is open to all and holds no data: it asks for the key."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.frontend import Frontend
from serving.page import chat, dashboard
from serving.page.assembly import Page
from serving.training_run import encode

UNSTORED = {"cache-control": "no-store"}


async def chat_page(front: Frontend, request: Request) -> Response:
    return _response(chat.PAGE)


async def chat_data(front: Frontend, request: Request) -> Response:
    """Tell the page what it must know of the model before it asks for an answer."""
    own, info = front.tokenizer, front.info
    facts = {
        "model": info.model,
        "max_model_len": info.max_model_len,
        "weights_version": info.version,
        "has_chat_template": own.chat_template is not None,
        "special_ids": sorted(own.special_ids),
        "defaults": info.defaults.values,
        "has_routed_experts": front.config.routed_experts,
        "moe_layers": info.moe_layers,
        "has_pool": front.placement.is_there,
    }
    return JSONResponse(facts, headers=UNSTORED)


async def dashboard_page(front: Frontend, request: Request) -> Response:
    return _response(dashboard.PAGE)


async def dashboard_data(front: Frontend, request: Request) -> Response:
    body = dashboard.encode(*front.placement.latest())
    return Response(body, headers=UNSTORED, media_type="application/json")


async def training_data(front: Frontend, request: Request) -> Response:
    """Tell the page of the training run whose weights are served; without one `run` is null."""
    info = front.info
    body = encode(await front.training.tree(), info.version, info.stats.get("num_quarantined", 0))
    return Response(body, headers=UNSTORED, media_type="application/json")


def _response(page: Page) -> Response:
    return Response(page.html, headers=page.headers, media_type="text/html")
