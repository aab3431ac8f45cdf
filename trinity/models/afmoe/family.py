"""The family as registry.py hands it out."""

from trinity.models.afmoe.hf import read_config, write_config
from trinity.models.afmoe.init import init_weights
from trinity.models.afmoe.keys import KEYS
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.family import Family

FAMILY = Family(Afmoe, init_weights, read_config, write_config, KEYS)
