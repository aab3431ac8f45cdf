"""The application from a plain mapping: what a Serve config (`serve deploy`) and a RayService import.

Decisions: it provides the pool of shards first, exactly as `trinity serve` does, so that a config file is all one needs.
It is harmless when called again: Serve retries it, and a pool that is there is used or refused. Where deployments run
(gateway on the head, engines on `engine` resources) is the config's to say: clusters/serve.yaml.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from serving import app
from trinity.checkpoint import open_checkpoint
from trinity.commands.serve import provide_pool
from trinity.config import Config


class DeployArgs(BaseModel):
    """`args` of the Serve config. `settings` is trinity.config.Config as a tree, without `model`: the checkpoint says that."""

    model_config = ConfigDict(extra="forbid")
    checkpoint: str
    settings: dict[str, Any] = {}


def build(args: DeployArgs) -> serve.Application:
    """Check the checkpoint, provide its pool, return the application. Raises ConfigError as `trinity serve` would.

    The API key comes from TRINITY_API_KEY of the head's environment, never from the config file.
    """
    checkpoint = open_checkpoint(args.checkpoint)
    config = Config.from_tree({**args.settings, "model": checkpoint.config.model_dump(mode="json")})
    checkpoint.verify()
    path = str(checkpoint.path.resolve())
    provide_pool(config, path)
    return app.build(config, path)
