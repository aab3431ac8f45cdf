"""A checkpoint as an LLM in this process, for commands that need no server. Settings are the flags of `trinity serve`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trinity.config import Config, merge, parse_flags
from trinity.errors import ConfigError
from trinity.utils.terminal import show_info

if TYPE_CHECKING:
    from trinity.engine.defaults import GenerationConfig
    from trinity.llm import LLM

PLACEMENT = ("num_shards", "backend", "device", "expert_dtype")  # what a pool in one process has


def offline(checkpoint: str, flags: Sequence[str], generation_config: "GenerationConfig" = "checkpoint") -> "LLM":
    """The checkpoint, loaded; what it takes of memory is said before. Raises ConfigError and CheckpointError."""
    config = settings_of(flags)
    from trinity.llm import LLM

    show_info("trinity.llm")
    placed = {name: getattr(config.placement, name) for name in PLACEMENT}
    return LLM(checkpoint, engine=config.engine, generation_config=generation_config, **placed)


def settings_of(flags: Sequence[str]) -> Config:
    """Settings of which only `engine` and those of PLACEMENT are set. Raises ConfigError for a flag of anything else."""
    tree = parse_flags(flags)
    config = Config.from_tree({"model": "tiny", **merge({"placement": {"num_shards": 1}}, tree)})
    allowed = {"engine": tuple(type(config.engine).model_fields), "placement": PLACEMENT}
    for name, values in tree.items():
        for key in values:
            if key not in allowed.get(name, ()):
                shards = ", ".join(f"--placement.{each}" for each in PLACEMENT)
                raise ConfigError(f"--{name}.{key} changes nothing without a server; give --engine.NAME, {shards}")
    return config
