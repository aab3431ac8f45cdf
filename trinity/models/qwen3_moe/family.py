"""The family as registry.py hands it out."""

from trinity.models.common.family import Family
from trinity.models.common.init import init_weights
from trinity.models.qwen3_moe.hf import read_config, write_config
from trinity.models.qwen3_moe.keys import KEYS
from trinity.models.qwen3_moe.model import Qwen3Moe

FAMILY = Family(Qwen3Moe, init_weights, read_config, write_config, KEYS)
