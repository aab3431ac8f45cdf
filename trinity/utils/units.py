"""Numbers as people read them."""


def size(num_bytes: int) -> str:
    """ "1.83 GiB", "320 MiB": three digits in the unit that fits; below 1 MiB bytes."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}" if num_bytes < 1000 * unit else f"{num_bytes / unit:,.0f} {name}"
    return f"{num_bytes:,} bytes"
