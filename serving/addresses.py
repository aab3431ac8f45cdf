"""Addresses as they are written."""


def bracketed(host: str) -> str:
    """IPv6 addresses take brackets in front of a port."""
    return f"[{host}]" if ":" in host else host


def doors(http_url: str, grpc_address: str) -> str:
    """Lines that tell whoever started a server where it is."""
    return f"HTTP {http_url}\ngRPC {grpc_address}\ntry the model in a browser: {http_url}/"
