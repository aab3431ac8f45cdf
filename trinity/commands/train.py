"""`trinity train CONFIG`: the job under Ray Train, its progress on this terminal, its pictures at the end."""

import argparse
import sys
from pathlib import Path

from trinity.config import Config, merged, preset_names, setup_environment
from trinity.errors import ConfigError


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    config = load(arguments.config, [*flags, *(["--train.resume", "true"] if arguments.resume else [])])
    if arguments.dry_run:
        print(to_yaml(config), end="")
        return 0
    check_out_dir(config)
    setup_environment(config.cluster.auth, is_local=config.cluster.address == "local")
    from actors.cluster import joined

    with joined(config.cluster, config.train.num_workers):
        train(config)
    return 0


def load(source: str, flags: list[str]) -> Config:
    """A YAML file or a preset's name, with flags over it. Without a `model` it is that of `train.init_from`."""
    if source in preset_names() and not Path(source).exists():
        return Config.load(None, flags, model=source)
    tree = merged(source, flags)
    weights = tree.get("train", {}).get("init_from")
    if weights and "model" not in tree:
        from trinity.checkpoint import open_checkpoint

        tree["model"] = open_checkpoint(weights).config.model_dump()
    return Config.from_tree(tree)


def check_out_dir(config: Config) -> None:
    """Refuse to mix two runs in one folder, and to resume another architecture's."""
    from trinity.checkpoint import latest_checkpoint, open_checkpoint

    found = latest_checkpoint(config.train.out_dir)
    if found is None:
        return
    if not config.train.resume:
        raise ConfigError(
            f"{config.train.out_dir} already holds {found.name}; continue it with --resume, or choose another --train.out_dir"
        )
    if open_checkpoint(found).config != config.model:
        raise ConfigError(f"{found} is of another architecture than this configuration; choose another --train.out_dir")


def to_yaml(config: Config) -> str:
    import yaml

    tree = config.model_dump(mode="json")
    tree["serve"]["api_key"] = "(set)" if config.serve.api_key else None
    return yaml.safe_dump(tree, sort_keys=False)


def train(config: Config) -> dict:
    """Run the job in the cluster this process has joined, showing its progress; -> its result."""
    from actors.train import fit
    from trinity.progress import Progress, shown
    from trinity.report import expert_load_png, loss_curve_png

    out_dir = Path(config.train.out_dir)
    tokens_per_step = config.train.global_batch_size * config.train.seq_len
    with shown(out_dir / "metrics.jsonl", Progress(config.train.steps, tokens_per_step, sys.stderr)):
        result = fit(config)
    pictures = [loss_curve_png(out_dir / "metrics.jsonl", out_dir / "loss.png")]
    if (out_dir / "expert_load.jsonl").is_file():
        pictures.append(expert_load_png(out_dir / "expert_load.jsonl", out_dir / "expert_load.png"))
    print(f"loss {result['loss']:.4f}, validation loss {result['val_loss']:.4f} after {result['position']} steps")
    print(f"checkpoint {result['checkpoint']}")
    print("pictures " + ", ".join(map(str, pictures)))
    return result
