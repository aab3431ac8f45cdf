"""`trinity train CONFIG`: the job under Ray Train, until its last step, SIGTERM or Ctrl-C."""

import argparse

from serving.addresses import doors
from serving.fitting import fitted
from trinity.config import setup_environment
from trinity.launch import check_out_dir, load, rewound, train
from trinity.utils.terminal import say


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    serving = ["--serve.weights", "live"] if arguments.serve else []
    config = load(arguments.config, [*flags, *(["--train.resume", "true"] if arguments.resume else []), *serving])
    if arguments.dry_run:
        print(config.to_yaml(), end="")
        return 0
    if arguments.serve:
        config = fitted(config)
    point = check_out_dir(config)
    if point is not None and not rewound(config, point):
        return 0
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    from actors import pool as pools
    from actors.cluster import joined

    say("starting Ray" if config.cluster.address == "local" else f"joining {config.cluster.address}")
    with joined(config.cluster, config.train):
        try:
            result = train(config, announced if arguments.serve else None)
        finally:
            if not config.placement.keep:
                pools.destroy(config.placement.pool, config.cluster.namespace, config.placement.memory_dir)
    return 130 if result["stopped"] else 0


def announced(http_url: str, grpc_address: str) -> None:
    say(f"{doors(http_url, grpc_address)}\nanswers come from the weights as they are trained")
