"""`trinity prepare CONFIG`: tokenise what a run reads, or each of its stages, on all nodes of the cluster, before it trains."""

import argparse
from pathlib import Path

from trinity.config import Config, merged, setup_environment
from trinity.data.prepare import Prepared
from trinity.launch import load
from trinity.preparing import prepare_stages, prepared
from trinity.stages import Stage, read_stages
from trinity.utils.terminal import say


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    path = Path(arguments.config)
    stages: tuple[Stage, ...] = ()
    if path.is_file() and "stages" in (tree := merged(path, flags)):
        stages = read_stages(tree)
    configs = [stage.config for stage in stages] or [load(arguments.config, flags)]
    if arguments.dry_run:
        for config in configs:
            print(config.to_yaml(), end="")
        return 0
    cluster = configs[0].cluster
    setup_environment(cluster.auth, is_local=cluster.address == "local")
    from actors.cluster import joined

    say("starting Ray" if cluster.address == "local" else f"joining {cluster.address}")
    with joined(cluster):
        if not stages:
            _tell(configs[0], prepared(configs[0], everywhere=True))
        for stage, found in prepare_stages(stages, join=lambda: None, everywhere=True):
            _tell(stage.config, found)
    return 0


def _tell(config: Config, found: Prepared) -> None:
    folder = Path(config.train.out_dir).absolute() / "data"
    print(f"{found.train.num_sequences:,} sequences of {config.train.seq_len:,} tokens are ready in {folder}")
