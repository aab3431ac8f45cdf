"""Layout that readers and writers of checkpoints share: names of files, folders and tensors, types, and the manifest's hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trinity.config import ModelConfig
from trinity.models.registry import family_of
from trinity.rpc.messages import Experts

INDEX, SINGLE, MANIFEST = "model.safetensors.index.json", "model.safetensors", "manifest.json"
STATE = "training/state.json"
MODELOPT = "hf_quant_config.json"  # where ModelOpt says how weights are quantised
PARTIAL, DELETED, REPLACED = ".partial", ".deleted", ".replaced"
FORMAT = 2
STORED = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WRITTEN = {**STORED, torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}


def expert_key(config: ModelConfig, layer: int, expert: int, projection: str) -> str:
    """The key under which a routed expert's matrix is written, by the family's key map."""
    return family_of(config).keys.expert.of(layer, expert, projection)


def all_experts(config: ModelConfig) -> Experts:
    return {layer: tuple(range(config.num_experts)) for layer in config.moe_layers}


def step_path(out_dir: str | Path, step: int) -> Path:
    """The folder of a run's checkpoint after `step` steps."""
    return Path(out_dir) / f"step-{step:06d}"


def replaced(path: Path) -> Path:
    return path.with_name(path.name + REPLACED)


def own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says besides it, however it is laid out."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
