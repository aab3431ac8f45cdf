"""`trinity serve SOURCE`: engines under Ray Serve, experts in shard actors, until SIGTERM or Ctrl-C.

SOURCE is a checkpoint, whose experts get a pool of their own here, or the folder of a run that trains, whose pool is used.
"""

import argparse
import signal
import threading
from pathlib import Path

from serving.launch import check_source, provide_weights, resolve
from trinity.config import merged, setup_environment

SHORT = ("host", "http_port", "grpc_port", "weights")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    short = [f"--serve.{name}={getattr(arguments, name)}" for name in SHORT if getattr(arguments, name) is not None]
    config = resolve(arguments.source, merged(arguments.config, [*flags, *short]))
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    check_source(arguments.source, config)
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    from actors import pool as pools
    from actors.cluster import joined
    from serving import app

    app.check_ports(config.serve)
    source = str(Path(arguments.source).resolve())
    with joined(config.cluster):
        made = provide_weights(config, source)
        try:
            server = app.start(config, source)
            print(f"HTTP {server.http_url}\ngRPC {server.grpc_address}\nready; Ctrl-C stops it", flush=True)
            wait_for_signal()
            print("draining", flush=True)
            server.stop()
        finally:
            if made and not config.placement.keep:
                pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)
    return 0


def wait_for_signal() -> None:
    """Wait for SIGTERM or Ctrl-C; after that a second Ctrl-C interrupts. Main thread only."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
