"""One frozen tree of settings: defaults < YAML file < `--dotted.flags`.

Every value has its unit in its name. Unknown keys are refused with the nearest match. The environment is read in env.py
and nowhere else. Importable without torch and without Ray, so that a configuration can be checked anywhere.
"""

from trinity.config.env import (
    PACKAGES,
    THREADS,
    admin_key,
    api_key,
    native_is_wanted,
    num_cpus,
    ray_node_pid,
    setup_environment,
    setup_grpc,
    setup_proxies,
    setup_threads,
)
from trinity.config.evaluate import EvaluateConfig, TaskConfig
from trinity.config.model import NEW_IN_STAGE, LayerCache, ModelConfig
from trinity.config.objective import DistillConfig, PreferenceConfig, RewardConfig, RLConfig
from trinity.config.placement import FP4_GROUP, PlacementConfig, turn_of, why_not
from trinity.config.ramp import RampPart, Sequences
from trinity.config.serve import (
    ADMIN_CLIENT,
    ANYBODY,
    EVERY_NODE,
    MOST_ADAPTERS,
    NODE,
    AdapterRef,
    AdapterSet,
    Client,
    ClusterConfig,
    EngineConfig,
    Role,
    ServeConfig,
    check_adapter_name,
    check_roles,
)
from trinity.config.sources import LengthBias, SourceConfig
from trinity.config.synthesis import (
    PASSAGE,
    AskedConfig,
    ChecksConfig,
    DedupConfig,
    InputConfig,
    OutputConfig,
    SynthesisConfig,
    Template,
)
from trinity.config.track import TrackConfig
from trinity.config.train import RUN_SETTINGS, RUN_TOKENIZER, DataConfig, LoraConfig, OptimConfig, Target, TrainConfig
from trinity.config.tree import Config, differences, merged, preset, section
from trinity.config.yaml import PRESETS, Frozen, merge, parse_flags, preset_names, read_yaml

__all__ = [
    "ADMIN_CLIENT",
    "ANYBODY",
    "EVERY_NODE",
    "FP4_GROUP",
    "MOST_ADAPTERS",
    "NEW_IN_STAGE",
    "NODE",
    "PACKAGES",
    "PASSAGE",
    "PRESETS",
    "RUN_SETTINGS",
    "RUN_TOKENIZER",
    "THREADS",
    "AdapterRef",
    "AdapterSet",
    "AskedConfig",
    "ChecksConfig",
    "Client",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DedupConfig",
    "DistillConfig",
    "EngineConfig",
    "EvaluateConfig",
    "Frozen",
    "InputConfig",
    "LayerCache",
    "LengthBias",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "PlacementConfig",
    "PreferenceConfig",
    "RLConfig",
    "RampPart",
    "RewardConfig",
    "Role",
    "Sequences",
    "ServeConfig",
    "SourceConfig",
    "SynthesisConfig",
    "Target",
    "TaskConfig",
    "Template",
    "TrackConfig",
    "TrainConfig",
    "admin_key",
    "api_key",
    "check_adapter_name",
    "check_roles",
    "differences",
    "merge",
    "merged",
    "native_is_wanted",
    "num_cpus",
    "parse_flags",
    "preset",
    "preset_names",
    "ray_node_pid",
    "read_yaml",
    "section",
    "setup_environment",
    "setup_grpc",
    "setup_proxies",
    "setup_threads",
    "turn_of",
    "why_not",
]
