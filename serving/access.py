"""Access to what may be called: one rule for HTTP and gRPC.

| access | without keys on the server | with `serve.api_key` or `serve.clients` | with `serve.admin_key` |
|---|---|---|---|
| open | everybody | everybody | everybody |
| key | everybody | any key | (says nothing of these) |
| admin | loopback listeners only | nobody | the admin key |

Decisions: operators may do what clients may, so their key opens both. A server whose clients need a key, or which others
reach, moves experts for nobody until it has an admin key: a key handed to clients is not an operator's. Keys are compared
in constant time and appear in no log and no answer.
"""

import hmac
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Literal

from trinity.config import ADMIN_CLIENT, ANYBODY, Client, ServeConfig
from trinity.errors import InvalidRequest, Unauthenticated
from trinity.utils.origins import LOOPBACK, host_name

Access = Literal["open", "key", "admin"]
ASKS: ContextVar[Client] = ContextVar("asks", default=ANYBODY)  # whoever's call is being answered


def only(name: str, values: Sequence[str]) -> str | None:
    """The one value of a header, if it is there. Raises InvalidRequest for two: a proxy may have read the other one."""
    if len(values) > 1:
        raise InvalidRequest(f"the request has {len(values)} {name} headers; send one")
    return values[0] if values else None


def check_host(host: str | None, config: ServeConfig) -> None:
    """Raises InvalidRequest where no key is needed and the Host header is a name that is not this server's: a page of that
    name, which a browser on this machine shows, would be asking (DNS rebinding)."""
    if config.needs_key or host is None:
        return
    if host_name(host) not in (*LOOPBACK, config.host, *config.allowed_hosts):
        raise InvalidRequest(
            f"this server is not called {host[:100]!r}; ask it by its address, "
            "add the name to serve.allowed_hosts, or set a key"
        )


def sent_key(authorization: str | None, x_api_key: str | None) -> str | None:
    """The `authorization` header, also where the key came as `x-api-key`, as Anthropic's clients send it. Raises InvalidRequest
    for two that differ: a proxy may have looked at the other one."""
    if x_api_key is None:
        return authorization
    if authorization is not None and not key_matches(authorization, x_api_key):
        raise InvalidRequest("the request has an authorization and an x-api-key header that differ; send one of them")
    return f"Bearer {x_api_key}"


def key_matches(header: str | None, key: str) -> bool:
    """Is it `Bearer KEY`? Takes the same time wherever the two differ."""
    given = (header or "").encode("utf-8", "replace")
    scheme, _, sent = given.partition(b" ")
    return hmac.compare_digest(sent, key.encode("utf-8")) and scheme.lower() == b"bearer"


def check_access(access: Access, header: str | None, config: ServeConfig) -> Client:
    """-> who calls. Raises Unauthenticated unless its `authorization` header opens what it asks for."""
    if access == "key" and config.needs_key:
        keys = config.client_by_key | _admin(config)
        return _holder(header, keys, "send the server's key as `Authorization: Bearer KEY` or `x-api-key: KEY`")
    if access == "admin" and config.admin_key is not None:
        return _holder(header, _admin(config), "send the server's admin key as `Authorization: Bearer KEY`")
    if access == "admin" and not (config.is_loopback and not config.needs_key):
        raise Unauthenticated("this server has no admin key; start it with serve.admin_key (TRINITY_ADMIN_KEY)")
    return ANYBODY


def _admin(config: ServeConfig) -> dict[str, Client]:
    return {} if config.admin_key is None else {config.admin_key: Client(ADMIN_CLIENT)}


def _holder(header: str | None, keys: dict[str, Client], advice: str) -> Client:
    found = [client for key, client in keys.items() if key_matches(header, key)]  # all are compared, in equal time
    if not found:
        raise Unauthenticated(advice)
    return found[0]
