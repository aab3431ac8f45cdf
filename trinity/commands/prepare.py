"""`trinity prepare CONFIG`: tokenise what a run reads, or each of its stages, on all nodes of the cluster, before it trains."""

import argparse
from pathlib import Path

from trinity.config import Config, merged, setup_environment
from trinity.launch import load
from trinity.stages import read_stages
from trinity.utils.terminal import say


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    path = Path(arguments.config)
    if path.is_file() and "stages" in (tree := merged(path, flags)):
        configs = [stage.config for stage in read_stages(tree)]
    else:
        configs = [load(arguments.config, flags)]
    if arguments.dry_run:
        for config in configs:
            print(config.to_yaml(), end="")
        return 0
    cluster = configs[0].cluster
    setup_environment(cluster.auth, is_local=cluster.address == "local")
    from actors.cluster import joined

    say("starting Ray" if cluster.address == "local" else f"joining {cluster.address}")
    with joined(cluster):
        for config in configs:
            _prepare(config)
    return 0


def _prepare(config: Config) -> None:
    """Shards on all nodes, then here the order of their documents."""
    from actors.jobs.tokenise import tokenise
    from trinity.data.prepare import prepare, recipes

    out_dir = Path(config.train.out_dir).absolute()
    for recipe, files, folder in recipes(config.data, config.train, config.model, out_dir):
        tokenise(recipe, files, folder, lambda num, total: say(f"tokenised {num} of {total} files"))
    train = prepare(config.data, config.train, config.model, out_dir).train
    print(f"{train.num_sequences:,} sequences of {config.train.seq_len:,} tokens are ready in {out_dir / 'data'}")
