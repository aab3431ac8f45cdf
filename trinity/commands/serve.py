"""`trinity serve CHECKPOINT`: engines under Ray Serve, experts in shard actors, until SIGTERM or Ctrl-C."""

import argparse
import signal
import threading
from pathlib import Path

from trinity.commands.train import to_yaml
from trinity.config import Config, setup_environment

SHORT = ("host", "http_port", "grpc_port")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from trinity.checkpoint import open_checkpoint

    short = [f"--serve.{name}={getattr(arguments, name)}" for name in SHORT if getattr(arguments, name) is not None]
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = Config.load(arguments.config, [*flags, *short, f"--model={checkpoint.config.model_dump_json()}"])
    if arguments.dry_run:
        print(to_yaml(config), end="")
        return 0
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    from actors.cluster import joined
    from serving import app

    app.check_ports(config.serve)
    with joined(config.cluster):
        provide_pool(config, str(checkpoint.path.resolve()))
        server = app.start(config, str(checkpoint.path.resolve()))
        print(f"HTTP {server.http_url}\ngRPC {server.grpc_address}\nready; Ctrl-C stops it", flush=True)
        wait_for_signal()
        print("draining", flush=True)
        server.stop()
    return 0


def wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C. Main thread only."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def provide_pool(config: Config, checkpoint: str) -> None:
    """Use the pool of the configured name if it is there and holds this checkpoint's version; else make or load it."""
    from actors import pool as pools
    from trinity.checkpoint import open_checkpoint
    from trinity.messages import Load

    name, namespace = config.placement.pool, config.cluster.namespace
    if pools.exists(name, namespace):
        pool = pools.connect(name, namespace, config.placement.call_timeout_s)
        if set(pool.versions().values()) == {open_checkpoint(checkpoint).version}:
            return
    else:
        state_dir = config.placement.state_dir or str(Path(checkpoint).parent / "placement")
        pool = pools.create(config.placement, namespace, config.model, None, state_dir)
    pool.load(Load(checkpoint, training=False))
