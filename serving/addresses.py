"""Addresses as they are written."""

from collections.abc import Sequence
from typing import NamedTuple


class Door(NamedTuple):
    """A gateway's address for either protocol, with the ports that were bound, and the address of its node."""

    http_url: str
    grpc_address: str
    node: str

    @property
    def text(self) -> str:
        return f"HTTP {self.http_url}\ngRPC {self.grpc_address}"


def bracketed(host: str) -> str:
    """IPv6 addresses take brackets in front of a port."""
    return f"[{host}]" if ":" in host else host


def doors(found: Sequence[Door]) -> str:
    """Lines that tell whoever started a server where it is."""
    if len(found) == 1:
        lines = [found[0].text]
    else:
        lines = [f"gateway on {door.node}\n{door.text}" for door in found]
    return "\n".join([*lines, f"try the model in a browser: {found[0].http_url}/"])
