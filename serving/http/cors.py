"""Pages of other origins: what a browser asks before one of them may call this server, and reads in each answer (CORS).

Decisions: nobody, unless `serve.allowed_origins` lists it. The question comes without a key, because browsers send none
with it, and is answered alike for every path, so that it tells nothing of what is there; the call itself needs the key as
ever. No credentials: a page puts its key into a header, and this server knows no cookies.
"""

from collections.abc import Callable

from starlette.responses import Response

from trinity.config import ServeConfig

METHODS = "GET, HEAD, POST"
SEEN = "x-request-id, retry-after"  # headers of answers that a page may read beside the usual ones
KNOWN_FOR_S = 600
Header = Callable[[str], str | None]


def is_allowed(origin: str | None, config: ServeConfig) -> bool:
    return origin is not None and ("*" in config.allowed_origins or origin.lower() in config.allowed_origins)


def preflight(method: str, header: Header, config: ServeConfig) -> Response | None:
    """The answer to a browser that asks whether a page may call; None for any other request, and for other pages."""
    wanted = header("access-control-request-method")
    if method != "OPTIONS" or wanted is None or not is_allowed(header("origin"), config):
        return None
    headers = {"access-control-allow-methods": METHODS, "access-control-max-age": str(KNOWN_FOR_S)}
    if names := header("access-control-request-headers"):
        headers["access-control-allow-headers"] = names
    if header("access-control-request-private-network") == "true":  # a public page, a server on this machine
        headers["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=headers)


def answer_headers(origin: str | None, config: ServeConfig) -> list[tuple[bytes, bytes]]:
    """Headers of every answer: for a page that may read it; and for caches, where it depends on who asks."""
    if not config.allowed_origins:
        return []
    if not is_allowed(origin, config):
        return [(b"vary", b"origin")]
    assert origin is not None
    allowed = {"access-control-allow-origin": origin, "access-control-expose-headers": SEEN, "vary": "origin"}
    return [(key.encode(), value.encode("latin-1")) for key, value in allowed.items()]
