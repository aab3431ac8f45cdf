"""`trinity serve CHECKPOINT`: engines under Ray Serve, experts in shard actors, until SIGTERM or Ctrl-C."""

import argparse
import signal
import sys
import tempfile
import threading
from typing import TYPE_CHECKING

from trinity.commands.train import describe, to_yaml
from trinity.config import Config, setup_environment
from trinity.errors import ConfigError, TrinityError

if TYPE_CHECKING:
    from actors.pool import RayPool

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
    from actors import pool as pools
    from actors.cluster import joined
    from serving import app

    app.check_ports(config.serve)
    checkpoint.verify()
    with joined(config.cluster):
        made = provide_pool(config, str(checkpoint.path.resolve()))
        try:
            server = app.start(config, str(checkpoint.path.resolve()))
            print(f"HTTP {server.http_url}\ngRPC {server.grpc_address}\nready; Ctrl-C stops it", flush=True)
            wait_for_signal()
            print("draining", flush=True)
            server.stop()
        finally:
            if made and not config.placement.keep:
                pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)
    return 0


def wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C; after that a second Ctrl-C interrupts. Main thread only."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def provide_pool(config: Config, checkpoint: str) -> bool:
    """See that the pool of the configured name holds this checkpoint's experts; -> whether it was made for that.

    A pool that is there is used as it is or refused, never loaded: somebody may be training in it.
    """
    from actors import pool as pools
    from trinity.messages import Load

    name, namespace = config.placement.pool, config.cluster.namespace
    if pools.exists(name, namespace):
        _check_holds(pools.connect(config.placement, namespace), config, checkpoint)
        return False
    state_dir = config.placement.state_dir or tempfile.mkdtemp(prefix="trinity-placement-")
    pool = pools.create(config.placement, namespace, config.model, None, state_dir)
    try:
        pool.load(Load(checkpoint, training=False))
    except TrinityError:
        pools.destroy(name, namespace)
        raise
    print(describe(pool.status()), file=sys.stderr)
    return True


def _check_holds(pool: "RayPool", config: Config, checkpoint: str) -> None:
    from trinity.checkpoint import open_checkpoint

    source, versions = pool.source(), set(pool.versions().values())
    same = source is not None and source.checkpoint == checkpoint and pool.spec().model == config.model
    if not same or versions != {open_checkpoint(checkpoint).version}:
        raise ConfigError(
            f"pool {pool.name!r} holds {source.checkpoint if source else 'other weights'} at version {versions}, not "
            f"{checkpoint}; serve from another --placement.pool, or end this one with `trinity placement rm {pool.name}`"
        )
