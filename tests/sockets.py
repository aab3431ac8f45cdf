"""Which addresses a process listens on, as Linux says it."""

import ipaddress
import os
import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path


def listening(pid="self"):
    """Local addresses of the TCP sockets that a process listens on."""
    held = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                found.add(decode_address(fields[1]))
    return found


def listening_each(pids):
    """The same of each that is still there."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = listening(pid)
    return found


def on_the_way(port):
    """Bytes of this machine's connections to that port which have been sent, and not read."""
    lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    ends = [(fields[1:3], fields[4].split(":")) for fields in map(str.split, lines) if fields[3] == "01"]
    return sum(int(size, 16) for pair, sizes in ends if port in {int(end[-4:], 16) for end in pair} for size in sizes)


def decode_address(text):
    host, port = text.split(":")
    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)


def free_ports(num, groups=2):
    """-> the first of so many neighbouring free ports of loopback, of each group. Below those that the system hands out."""
    while True:
        firsts = random.sample(range(20_000, 32_000, num), groups)
        try:
            with ExitStack() as taken:
                for port in (first + at for first in firsts for at in range(num)):
                    taken.enter_context(socket.create_server(("127.0.0.1", port)))
                return firsts
        except OSError:
            continue
