"""Origins of peers, as far as limits by peer are concerned."""

from ipaddress import IPv6Address, ip_address, ip_network


def origin_of(address: str) -> str:
    """The address; of IPv6 its first 64 bits, the network in which one host may have any number of them. "" for none."""
    if not address:
        return ""
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped or ip_network((int(found), 64), strict=False))
    return str(found)
