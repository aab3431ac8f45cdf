"""The application from a plain mapping: what a Serve config (`serve deploy`) and a RayService import.

Decisions: it provides the pool of shards first, exactly as `trinity serve` does, so that a config file is all one needs.
It is harmless when called again: Serve retries it, and a pool that is there is used or refused. Where deployments run
(gateway on the head, engines on `engine` resources) is the config's to say: clusters/serve.yaml.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from serving import app
from serving.launch import check_source, provide_weights, resolve


class DeployArgs(BaseModel):
    """`args` of the Serve config. `settings` is trinity.config.Config as a tree, without `model`: the checkpoint says that.

    With `serve.weights` live or pinned, `checkpoint` is the folder of the run.
    """

    model_config = ConfigDict(extra="forbid")
    checkpoint: str
    settings: dict[str, Any] = {}


def build(args: DeployArgs) -> serve.Application:
    """Check the checkpoint, provide its pool, return the application. Raises ConfigError as `trinity serve` would.

    The API key comes from TRINITY_API_KEY of the head's environment, never from the config file.
    """
    config = resolve(args.checkpoint, args.settings)
    if not config.serve.is_of_run:  # Ray Serve has joined its cluster already
        check_source(args.checkpoint, config)
    path = str(Path(args.checkpoint).resolve())
    provide_weights(config, path)
    return app.build(config, path)
