"""Names of this machine that only it may use, and origins of peers, as far as limits by peer are concerned."""

from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def host_name(header: str) -> str | None:
    """The name in a Host header, without its port; None where there is none to be read."""
    with suppress(ValueError):
        return urlsplit(f"//{header}").hostname
    return None


def origin_of(address: str) -> str:
    """The address; of IPv6 its first 64 bits, the network in which one host may have any number of them. "" for none."""
    if not address:
        return ""
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped or ip_network((int(found), 64), strict=False))
    return str(found)
