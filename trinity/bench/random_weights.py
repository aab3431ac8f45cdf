"""A checkpoint of any shape with random weights in bf16, as the Hub has them: files by layers, an index, no manifest.

Decisions: values are one block of random numbers, again and again from another place: as quick as the disk, and no file system
finds anything to compress. Statistics are those of a fresh model, so that a forward pass stays finite.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trinity.checkpoint import PROJECTIONS, all_experts, expert_key, write_tensors
from trinity.config import ModelConfig
from trinity.models.common.family import Nobody
from trinity.models.registry import build, write_config
from trinity.text.tokenizer import Tokenizer

BLOCK = (1 << 24) + 7
STEP = 1_299_709  # another place in the block for each tensor
FILE_BYTES = 4 << 30


def write(model: ModelConfig, folder: Path, seed: int) -> None:
    """Write the weights of that shape, config.json and a small tokenizer; config.json last."""
    parts = write_tensors(folder, "model", _tensors(model, seed), FILE_BYTES)
    index = {"metadata": {}, "weight_map": {key: part.file for part in parts for key in part.tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Tokenizer.train(iter(["def f(x): return x + 1\n" * 50]), 320).save(folder)
    (folder / "config.json").write_text(json.dumps(write_config(model), indent=2))


def _tensors(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).mul_(model.init_std).bfloat16()
    places = itertools.count(0, STEP)
    for key, like in build(model, Nobody(), device="meta").tensors().items():
        is_vector = like.ndim == 1  # gains, and selection biases that prefer nobody
        yield key, torch.ones(like.shape, dtype=like.dtype) if is_vector else _values(block, like.shape, next(places))
    d, f = model.hidden_size, model.moe_intermediate_size
    shapes = [torch.Size((f, d)), torch.Size((f, d)), torch.Size((d, f))]
    for layer, experts in all_experts(model).items():
        for expert in experts:
            for projection, shape in zip(PROJECTIONS, shapes, strict=True):
                yield expert_key(model, layer, expert, projection), _values(block, shape, next(places))


def _values(block: Tensor, shape: torch.Size, place: int) -> Tensor:
    """Numbers of the block from a place of its own on; more than it has, round and round."""
    num = shape.numel()
    if num >= BLOCK:
        return block.repeat(-(-num // BLOCK))[:num].view(shape)
    start = place % (BLOCK - num)
    return block[start : start + num].view(shape)
