"""Faults that no process of Ray's can bring about: cables, power and clocks of hosts, asked of whoever has them.

That is a program of yours that listens at a Unix socket. A connection is a fault: one line of JSON comes, {"fault": "cut-host",
"draw": 0.25, "for_s": 4.0}, and one goes back when it is over, {"target": "what was hit"} or {"error": "why it was not"}.
`draw` in [0, 1) picks the host. tests/chaos/world.py is one, for hosts that are namespaces.
"""

import json
import socket
from pathlib import Path

from actors.chaos.plan import Planned
from trinity.errors import Unavailable

PATIENCE_S = 120.0  # beyond the fault's own time: a host may have to start


def strike(hosts: Path, planned: Planned) -> str:
    """-> what was hit. Waits while it lasts. Raises Unavailable."""
    order = {"fault": planned.fault.value, "draw": planned.draw, "for_s": planned.for_s}
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(planned.for_s + PATIENCE_S)
            sock.connect(str(hosts))
            sock.sendall(json.dumps(order).encode() + b"\n")
            told = json.loads(sock.makefile("rb").readline() or b'{"error": "it said nothing"}')
    except (OSError, ValueError) as error:
        raise Unavailable(f"nobody there to hurt hosts at {hosts}, or nobody who answers in JSON: {error}") from None
    if "target" not in told:
        raise Unavailable(f"{planned.fault.value}: {told.get('error')}")
    return str(told["target"])
