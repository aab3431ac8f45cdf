"""Access to what may be called: one rule for HTTP and gRPC.

| access | without keys on the server | with `serve.api_key` | with `serve.admin_key` |
|---|---|---|---|
| open | everybody | everybody | everybody |
| key | everybody | either key | (says nothing of these) |
| admin | loopback listeners only | nobody | the admin key |

Decisions: operators may do what clients may, so their key opens both. A server whose clients need a key, or which others
reach, moves experts for nobody until it has an admin key: a key handed to clients is not an operator's. Keys are compared
in constant time and appear in no log and no answer.
"""

import hmac
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

from trinity.config import ServeConfig
from trinity.errors import InvalidRequest, Unauthenticated

Access = Literal["open", "key", "admin"]
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def only(name: str, values: Sequence[str]) -> str | None:
    """The one value of a header, if it is there. Raises InvalidRequest for two: a proxy may have read the other one."""
    if len(values) > 1:
        raise InvalidRequest(f"the request has {len(values)} {name} headers; send one")
    return values[0] if values else None


def check_host(host: str | None, config: ServeConfig) -> None:
    """Raises InvalidRequest where no key is needed and the Host header is a name that is not this server's: a page of that
    name, which a browser on this machine shows, would be asking (DNS rebinding)."""
    if config.api_key is not None or host is None:
        return
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in (*LOOPBACK, config.host, *config.allowed_hosts):
        raise InvalidRequest(
            f"this server is not called {host[:100]!r}; ask it by its address, "
            "add the name to serve.allowed_hosts, or set a key"
        )


def key_matches(header: str | None, key: str) -> bool:
    """Is it `Bearer KEY`? Takes the same time wherever the two differ."""
    given = (header or "").encode("utf-8", "replace")
    scheme, _, sent = given.partition(b" ")
    return hmac.compare_digest(sent, key.encode("utf-8")) and scheme.lower() == b"bearer"


def check_access(access: Access, header: str | None, config: ServeConfig) -> None:
    """Raises Unauthenticated unless the `authorization` header of a call opens what it asks for."""
    if access == "key" and config.api_key is not None:
        _check(header, (config.api_key, config.admin_key), "send the server's key as `Authorization: Bearer KEY`")
    elif access == "admin" and config.admin_key is not None:
        _check(header, (config.admin_key,), "send the server's admin key as `Authorization: Bearer KEY`")
    elif access == "admin" and not (config.is_loopback and config.api_key is None):
        raise Unauthenticated("this server has no admin key; start it with serve.admin_key (TRINITY_ADMIN_KEY)")


def _check(header: str | None, keys: tuple[str | None, ...], advice: str) -> None:
    if not any([key_matches(header, key) for key in keys if key is not None]):  # noqa: C419  all of them, in equal time
        raise Unauthenticated(advice)
