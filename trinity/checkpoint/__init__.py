"""Checkpoints are Hugging Face directories, written in parts by many processes and made real by one rename.

    step-000300/            config.json, generation_config.json, tokenizer files, model.safetensors.index.json
      model-backbone-00.safetensors, model-experts-<shard>-00.safetensors …     what transformers and vLLM load
      training/             optimizer state beside them, state.json                 what `--resume` needs
      manifest.json         every file with size and SHA-256, and its own; written last

A folder is what its name says, and a name changes in one rename:

    step-000300                     a checkpoint, never written to again
    step-000300.1f0c.partial        one that is being written, or that a dead saver left; the next save removes it
    step-000300.replaced            what another save of the step is about to take the place of; counts while nothing has
    step-000300.9ab2.deleted        one that is being deleted; the next save finishes that

Decisions: safetensors only; a file is hashed before the first tensor is read from it; a folder without a manifest is a
plain Hugging Face checkpoint (version 0), unless its index says that it had one; only a save deletes, a reader never;
file names inside an index or a manifest may not leave the folder. A folder may also be a model's on the Hub (hub.py), or an
adapter's in PEFT's format (adapter.py), as runs that train adapters write them:

    step-000300/            adapter_model.safetensors, adapter_config.json (which names the base), tokenizer files
      training/, manifest.json
"""

from trinity.checkpoint.adapter import AdapterFolder, adaptable, backbone_adapter, check_adapter, examined
from trinity.checkpoint.hub import hub_name, located, small_files, title_of
from trinity.checkpoint.layout import all_experts, expert_key, step_path
from trinity.checkpoint.read import Checkpoint, open_checkpoint
from trinity.checkpoint.run import (
    kept_generation,
    latest_checkpoint,
    list_checkpoints,
    prune,
    resume_point,
    rewind,
    step_of,
)
from trinity.checkpoint.write import CheckpointWriter, write_tensors
from trinity.models.common.keys import PROJECTIONS

__all__ = [
    "PROJECTIONS",
    "AdapterFolder",
    "Checkpoint",
    "CheckpointWriter",
    "adaptable",
    "all_experts",
    "backbone_adapter",
    "check_adapter",
    "examined",
    "expert_key",
    "hub_name",
    "kept_generation",
    "latest_checkpoint",
    "list_checkpoints",
    "located",
    "open_checkpoint",
    "prune",
    "resume_point",
    "rewind",
    "small_files",
    "step_of",
    "step_path",
    "title_of",
    "write_tensors",
]
