"""`trinity convert SRC DST`: read a checkpoint, check it whole, write it again without training state: in another type, in 8
bits, with an adapter merged."""

import argparse
from pathlib import Path


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from trinity.checkpoint import open_checkpoint
    from trinity.checkpoint.forms import FORMS
    from trinity.checkpoint.rewrite import rewrite
    from trinity.errors import ConfigError

    target = Path(arguments.target)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder")
    source = open_checkpoint(arguments.source)
    config = source.config.model_copy(update={"dtype": arguments.dtype or source.config.dtype})
    form = FORMS[arguments.to] if arguments.to else None
    parts = rewrite(source, target, config, int(arguments.max_file_gb * 2**30), form)
    num, total = sum(len(part.tensors) for part in parts), sum(part.num_bytes for part in parts)
    merged = "" if source.adapter is None else f", with the adapter {source.path} merged in"
    what = config.dtype if form is None else f"{form.name}, the rest {config.dtype}"
    print(f"{target}: {num:,} tensors, {total / 2**30:.2f} GiB in {len(parts)} files, {what}{merged}")
    return 0
