"""Adapters' folders as a run, or somebody else, may have written them: every factor drawn, so that each matrix has its say."""

import json

import torch
from safetensors.torch import save_file

from trinity.adapters import peft
from trinity.checkpoint import adaptable, open_checkpoint
from trinity.config import ModelConfig

ROLES = ("attention", "dense", "shared", "experts")


def write_adapter(path, base, seed, rank=3, alpha=8.0, roles=ROLES, size=0.5, **fields):
    """-> `path`: an adapter of that checkpoint's matrices with these roles; or of a model's, whose weights it does not know."""
    source, rng = None if isinstance(base, ModelConfig) else open_checkpoint(base), torch.Generator().manual_seed(seed)
    model = base if source is None else source.config
    names = {name: matrix.shape for name, matrix in adaptable(model).items() if matrix.role in roles}
    tensors = {}
    for name, (num_out, num_in) in names.items():
        shapes = dict(zip(peft.PARTS, ((rank, num_in), (num_out, rank)), strict=True))
        for part, shape in shapes.items():
            drawn = torch.randn(*shape, generator=rng)
            tensors[peft.key_of(name, part)] = size * drawn / (num_in if part == "lora_A" else rank) ** 0.5
    path.mkdir(parents=True)
    about = ("anywhere", rank, alpha) if source is None else (source.name, rank, alpha, source.content)
    tree = peft.tree_of(peft.AdapterConfig(*about), names)
    (path / peft.CONFIG).write_text(json.dumps(tree | fields))
    save_file(tensors, path / peft.WEIGHTS)
    return path
