"""The application from a plain mapping: what a Serve config (`serve deploy`) and a RayService import.

Decisions: it provides the pool of shards first, exactly as `trinity serve` does, so that a config file is all one needs.
It is harmless when called again: Serve retries it, and a pool that is there is used or refused. Where deployments run
(gateway on the head, engines on `engine` resources) is the config's to say: clusters/serve.yaml.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from serving import app
from serving.launch import check_source, provide_weights, resolve, source_of


class DeployArgs(BaseModel):
    """`args` of the Serve config. `settings` is trinity.config.Config as a tree, without `model`: the checkpoint says that.

    `checkpoint` is a folder, or a model's name on the Hub; with `serve.weights` live or pinned, the folder of the run.
    """

    model_config = ConfigDict(extra="forbid")
    checkpoint: str
    settings: dict[str, Any] = {}


def build(args: DeployArgs) -> serve.Application:
    """Check the checkpoint, provide its pool, return the application. Raises ConfigError as `trinity serve` would.

    The API key comes from TRINITY_API_KEY of the head's environment, never from the config file.
    """
    source = source_of(args.checkpoint, args.settings)
    config = resolve(source, args.settings)
    if not config.serve.is_of_run:  # Ray Serve has joined its cluster already
        check_source(source, config)
    provide_weights(config, source)
    return app.build(config, source)
