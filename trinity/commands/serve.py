"""`trinity serve SOURCE`: engines under Ray Serve, experts in shard actors, until SIGTERM or Ctrl-C; `trinity serve stop`.

SOURCE is a checkpoint, in a folder or by its name on the Hub, whose experts get a pool of their own here, or the folder of a
run that trains, whose pool is used.
In a cluster that others use, too, server and pool outlive a command that dies: `--adopt` takes them over, `stop` ends them.
"""

import argparse
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack

from serving.addresses import doors
from serving.fitting import fitted
from serving.launch import check_source, provide_weights, resolve, source_of
from trinity.config import Config, merged, setup_environment
from trinity.errors import ConfigError

SHORT = ("host", "http_port", "grpc_port", "weights", "generation_config")
STOP = "stop"
LOOK_S = 2.0


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    short = [f"--serve.{name}={getattr(arguments, name)}" for name in SHORT if getattr(arguments, name) is not None]
    is_stop, given = arguments.source == STOP, (arguments.config, [*flags, *short])
    tree = merged(*given)
    source = STOP if is_stop else source_of(arguments.source, tree)
    config = _anywhere(*given) if is_stop else resolve(source, tree)
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    is_local = config.cluster.address == "local"
    if is_local and (is_stop or arguments.adopt):
        raise ConfigError(
            "cluster.address is local: a Ray of one command, whose server ends with it, so there is none to adopt or to stop; "
            "give --cluster.address auto, or the host:port of a cluster"
        )
    if not is_stop:
        config = fitted(config)
        check_source(source, config)
    setup_environment(config.cluster.auth, is_local)
    stop(config) if is_stop else serve(config, source, arguments.adopt)
    return 0


def _anywhere(path: str | None, flags: list[str]) -> Config:
    """Settings of a cluster, of which nothing else matters."""
    return Config.from_tree({**merged(path, flags, cluster={"address": "auto"}), "model": "tiny"})


def stop(config: Config) -> None:
    from actors.cluster import joined
    from serving.adoption import ended

    with joined(config.cluster):
        for line in ended(config.cluster.namespace):
            print(line, flush=True)


def serve(config: Config, source: str, adopt: bool) -> None:
    from actors import pool as pools
    from actors.cluster import joined
    from serving import adoption, app

    is_local = config.cluster.address == "local"
    if is_local:
        app.check_ports(config.serve)
    with joined(config.cluster), ExitStack() as undo:
        server = adoption.taken_over(config, source, adopt)
        if server is None:
            app.check_ports(config.serve)
        if provide_weights(config, source):
            undo.callback(pools.destroy, config.placement.pool, config.cluster.namespace, config.placement.memory_dir)
        server = server or app.start(config, source)
        undo.callback(server.stop)
        print(f"{doors(server.doors)}\nready; Ctrl-C stops it", flush=True)
        if wait_for_signal(adoption.is_gone):
            print("draining", flush=True)
        else:
            print("another command has ended it")
            undo.pop_all()


def wait_for_signal(is_over: Callable[[], bool] = lambda: False) -> bool:
    """Wait for SIGTERM or Ctrl-C; after that a second Ctrl-C interrupts. Main thread only. -> False where it is over before."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(LOOK_S) and not is_over():
        pass
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return stop.is_set()
