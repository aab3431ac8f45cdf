"""A checkpoint as llama.cpp reads it: one GGUF file in float32, 16 or 8 bits, without a vocabulary.

Decisions: names come from the package `gguf`, which only a rival's environment has; what llama.cpp's own conversion leaves in
float32 (vectors and routers) stays so. Tensors pass one at a time: the largest stack of experts sets the memory.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity.checkpoint.tensor_file import Part, TensorFile

EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.*)")
KINDS = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config.json, by the names that gguf's writer adds them under."""
    names = {
        "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size", "head_count": "num_attention_heads",
        "head_count_kv": "num_key_value_heads", "key_length": "head_dim", "value_length": "head_dim",
        "rope_dimension_count": "head_dim", "rope_freq_base": "rope_theta", "layer_norm_rms_eps": "rms_norm_eps",
        "vocab_size": "vocab_size", "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        "expert_shared_count": "num_shared_experts", "expert_feed_forward_length": "moe_intermediate_size",
        "leading_dense_block_count": "num_dense_layers", "expert_weights_norm": "route_norm",
        "expert_weights_scale": "route_scale", "sliding_window": "sliding_window",
    }  # fmt: skip
    return {name: config[key] for name, key in names.items()} | {"tokenizer_model": "no_vocab"}


def stacks(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys of a checkpoint by the tensor of the file that they become: experts of a layer lie in one, in order."""
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=_place):
        match = EXPERT.fullmatch(key)
        found.setdefault(f"{match[1]}.{match[3]}" if match else key, []).append(key)
    return found


def _place(key: str) -> tuple[str, int]:
    match = EXPERT.fullmatch(key)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (key, 0)


def stays_wide(key: str, num_dims: int) -> bool:
    """Tell whether a tensor is float32 in any file."""
    return num_dims == 1 or key.endswith("mlp.router.gate.weight")


def write(checkpoint: Path, target: Path, kind: str) -> None:
    """Write the file, under its name when it is whole. `kind` is one of KINDS."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    files: dict[str, str] = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    part, weights = target.with_suffix(".part"), _Weights(checkpoint, files)
    writer = gguf.GGUFWriter(str(part), gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.AFMOE])
    for name, value in parameters(config).items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.AFMOE, config["num_hidden_layers"])
    types = {key: _type(key, sources, weights, kind) for key, sources in stacks(files).items()}
    _write(writer, {_name(names, key): (sources, types[key]) for key, sources in stacks(files).items()}, weights)
    part.rename(target)


def _write(writer: Any, tensors: Mapping[str, tuple[list[str], Any]], weights: "_Weights") -> None:
    """Header first, with all tensors' places; then one tensor after the other."""
    from gguf import quant_shape_to_byte_shape, quants

    for name, (sources, type_) in tensors.items():
        shape = weights.shape(sources)
        num_bytes = math.prod(quant_shape_to_byte_shape(shape, type_))
        writer.add_tensor_info(name, shape, np.dtype("float32"), num_bytes, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for sources, type_ in tensors.values():
        writer.write_tensor_data(quants.quantize(weights.read(sources), type_))
    writer.close()


def _name(names: Any, key: str) -> str:
    """The file's name of a checkpoint's tensor; a vector that is added is a bias there."""
    weight = key.removesuffix(".weight")
    return f"{names.get_name(weight)}.{'bias' if weight == key else 'weight'}"


def _type(key: str, sources: list[str], weights: "_Weights", kind: str) -> Any:
    import gguf

    wide = stays_wide(key, len(weights.shape(sources)))
    return gguf.GGMLQuantizationType["F32" if wide else KINDS[kind]]


class _Weights:
    """Tensors of a checkpoint, several of them as one."""

    def __init__(self, folder: Path, files: Mapping[str, str]):
        opened = {name: TensorFile(folder / name) for name in set(files.values())}
        self._file_of = {key: opened[name] for key, name in files.items()}

    def shape(self, keys: Sequence[str]) -> tuple[int, ...]:
        one = self._file_of[keys[0]].entry(keys[0]).shape
        return one if len(keys) == 1 else (len(keys), *one)

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Values in float32."""
        found = torch.empty(self.shape(keys))
        for key, target in zip(keys, found.view(len(keys), *self.shape(keys[:1])), strict=True):
            self._file_of[key].read(Part(key, target))
        return found.numpy()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
