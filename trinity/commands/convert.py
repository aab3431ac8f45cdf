"""`trinity convert SRC DST`: read a checkpoint, check it whole, write it again without training state."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trinity.checkpoint import Checkpoint


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from trinity.checkpoint import CheckpointWriter, open_checkpoint, write_tensors
    from trinity.errors import ConfigError

    target = Path(arguments.target)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder")
    source = open_checkpoint(arguments.source)
    source.fetch()
    config = source.config.model_copy(update={"dtype": arguments.dtype or source.config.dtype})
    limit = int(arguments.max_file_gb * 2**30)
    tokenizer = source.tokenizer if (source.path / "tokenizer.json").is_file() else None
    with CheckpointWriter(target, source.version) as writer:
        parts = write_tensors(writer.folder, "model", _tensors(source, getattr(torch, config.dtype)), limit)
        writer.finish(parts, config, tokenizer, None, source.generation)
    total = sum(part.num_bytes for part in parts)
    print(
        f"{target}: {len(source.weight_map):,} tensors, {total / 2**30:.2f} GiB in {len(parts)} files, {config.dtype}"
    )
    return 0


def _tensors(source: "Checkpoint", dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the architecture has, checked; selection biases stay fp32."""
    from trinity.checkpoint import all_experts, expert_key
    from trinity.models.common.family import Nobody
    from trinity.models.common.keys import PROJECTIONS
    from trinity.models.registry import build

    backbone = build(source.config, Nobody(), device="meta")
    biases = backbone.biases()
    for name, like in backbone.tensors().items():
        tensor = source.tensor(name, like.shape)
        yield name, tensor.float() if name in biases else tensor.to(dtype)
    for layer, experts in all_experts(source.config).items():
        for expert in experts:
            matrices = source.expert(layer, expert)
            for projection, matrix in zip(PROJECTIONS, matrices, strict=True):
                yield expert_key(source.config, layer, expert, projection), matrix.to(dtype)
