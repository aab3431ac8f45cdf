"""The family as registry.py hands it out."""

from trinity.models.common.family import Family
from trinity.models.common.init import init_weights
from trinity.models.glm4_moe.hf import read_config, write_config
from trinity.models.glm4_moe.keys import KEYS
from trinity.models.glm4_moe.model import Glm4Moe

FAMILY = Family(Glm4Moe, init_weights, read_config, write_config, KEYS)
