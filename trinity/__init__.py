"""Trinity: train and serve sparse mixture-of-experts models on one pool of live experts.

`from trinity import LLM, Config` is all most programs need. Imports are lazy so that `trinity --help` stays quick.
"""

from typing import TYPE_CHECKING, Any

import trinity.models.registry  # noqa: F401  so that a configuration knows the families

__version__ = "0.1.0"
__all__ = ["LLM", "Config", "Rollout", "__version__"]

if TYPE_CHECKING:
    from trinity.config import Config
    from trinity.llm import LLM
    from trinity.rl.rollout import Rollout

_HOMES = {"LLM": "trinity.llm", "Config": "trinity.config", "Rollout": "trinity.rl.rollout"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trinity' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
