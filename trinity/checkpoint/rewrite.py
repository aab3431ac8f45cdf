"""A checkpoint written anew, whole and without training state: in another type, in other files, with its adapter merged."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trinity.checkpoint.layout import all_experts, expert_key
from trinity.checkpoint.read import Checkpoint
from trinity.checkpoint.write import MAX_FILE_BYTES, CheckpointWriter, write_tensors
from trinity.config import ModelConfig
from trinity.models.common.family import Nobody
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import build
from trinity.rpc.messages import Part


def rewrite(
    source: Checkpoint, target: Path, config: ModelConfig | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> tuple[Part, ...]:
    """Write `target`, with the weights in the type of `config`; -> the files that they are in. Raises CheckpointError."""
    source.fetch()
    config = config or source.config
    tokenizer = source.tokenizer if source.has_tokenizer else None
    with CheckpointWriter(target, source.version) as writer:
        parts = write_tensors(writer.folder, "model", _tensors(source, getattr(torch, config.dtype)), max_file_bytes)
        writer.finish(parts, config, tokenizer, None, source.generation)
    return parts


def _tensors(source: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the architecture has, checked; selection biases stay fp32."""
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
