"""Addresses as they are written."""


def bracketed(host: str) -> str:
    """IPv6 addresses take brackets in front of a port."""
    return f"[{host}]" if ":" in host else host
