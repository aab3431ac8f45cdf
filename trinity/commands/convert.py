"""`trinity convert SRC DST`: read a checkpoint, check it whole, write it again without training state. An adapter is merged."""

import argparse
from pathlib import Path


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from trinity.checkpoint import open_checkpoint
    from trinity.checkpoint.rewrite import rewrite
    from trinity.errors import ConfigError

    target = Path(arguments.target)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder")
    source = open_checkpoint(arguments.source)
    config = source.config.model_copy(update={"dtype": arguments.dtype or source.config.dtype})
    parts = rewrite(source, target, config, int(arguments.max_file_gb * 2**30))
    num, total = sum(len(part.tensors) for part in parts), sum(part.num_bytes for part in parts)
    merged = "" if source.adapter is None else f", with the adapter {source.path} merged in"
    print(f"{target}: {num:,} tensors, {total / 2**30:.2f} GiB in {len(parts)} files, {config.dtype}{merged}")
    return 0
