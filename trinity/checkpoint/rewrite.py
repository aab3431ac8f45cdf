"""A checkpoint written anew, whole and without training state: in another type, in other files, with its adapter merged, or
with its matrices quantised as compressed-tensors lays them out.

Decisions: quantised are the matrices that adapters may be beside: attention, shared, dense and routed experts. Embedding, head,
router and norms stay as they are, and the settings name those that a reader would expect otherwise.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trinity.checkpoint.adapter import adaptable
from trinity.checkpoint.forms import Form
from trinity.checkpoint.layout import all_experts, expert_key
from trinity.checkpoint.read import Checkpoint
from trinity.checkpoint.write import MAX_FILE_BYTES, CheckpointWriter, write_tensors
from trinity.config import ModelConfig
from trinity.models.common.family import Nobody
from trinity.models.common.keys import PROJECTIONS
from trinity.models.registry import build, family_of
from trinity.rpc.messages import Part

if TYPE_CHECKING:
    from trinity.models.common.decoder import CausalLM


def rewrite(
    source: Checkpoint,
    target: Path,
    config: ModelConfig | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    form: Form | None = None,
) -> tuple[Part, ...]:
    """Write `target`, with the weights in the type of `config`, its matrices in that form; -> the files that they are in.
    Raises CheckpointError."""
    source.fetch()
    config = config or source.config
    tokenizer = source.tokenizer if source.has_tokenizer else None
    with CheckpointWriter(target, source.version) as writer:
        tensors = _written(source, getattr(torch, config.dtype), form)
        parts = write_tensors(writer.folder, "model", tensors, max_file_bytes)
        said = None if form is None else form.settings(_kept(source.config))
        writer.finish(parts, config, tokenizer, None, source.generation, said)
    return parts


def _written(source: Checkpoint, dtype: torch.dtype, form: Form | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the target; selection biases stay fp32."""
    backbone = build(source.config, Nobody(), device="meta")
    biases, matrices = backbone.biases(), adaptable(source.config) if form is not None else {}
    for key, tensor in _tensors(source, backbone):
        if form is not None and key.removesuffix(".weight") in matrices:
            stored, scale = form.made(tensor)
            yield from ((key, stored), (f"{key}_scale", scale))
        else:
            yield key, tensor.float() if key in biases else tensor.to(dtype)


def _tensors(source: Checkpoint, backbone: "CausalLM") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the architecture has, checked, as it is read."""
    for name, like in backbone.tensors().items():
        yield name, source.tensor(name, like.shape)
    for layer, experts in all_experts(source.config).items():
        for expert in experts:
            for projection, matrix in zip(PROJECTIONS, source.expert(layer, expert), strict=True):
                yield expert_key(source.config, layer, expert, projection), matrix


def _kept(config: ModelConfig) -> list[str]:
    """Matrices of linear layers that are not quantised: what settings have to name."""
    keys = family_of(config).keys
    tensors = build(config, Nobody(), device="meta").tensors()
    roles = {key: keys.role(key) for key, like in tensors.items() if like.ndim == 2}
    return [key.removesuffix(".weight") for key, role in roles.items() if role in ("head", "router")]
