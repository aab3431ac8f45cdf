"""A pool that engines can ask, from the source of the weights: what `trinity serve` and a Serve config do first.

Ray is imported where it is used: settings are resolved, and the environment is set, before it.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trinity.checkpoint import examined, located, open_checkpoint, title_of
from trinity.config import RUN_SETTINGS, Config, merge, read_yaml
from trinity.engine.defaults import read_defaults
from trinity.errors import CheckpointError, ConfigError, InvalidRequest, TrinityError
from trinity.pool.pool import describe
from trinity.rpc.messages import Load
from trinity.text.chat_template import render_chat
from trinity.text.tokenizer import read_template
from trinity.utils.terminal import say, watched
from trinity.utils.trying import tried

if TYPE_CHECKING:
    from actors.pool import RayPool

T = TypeVar("T")


def resolve(source: str, tree: Mapping[str, Any]) -> Config:
    """Settings over what the source itself says: a checkpoint its model; a run its model, pool and namespace, too."""
    if _is_of_run(tree):
        own = _settings_of_run(Path(source))
    elif (Path(source) / RUN_SETTINGS).is_file():
        raise ConfigError(f"{source} is a run, not a checkpoint: name one of its step folders, or add --weights live")
    else:
        own = {"model": open_checkpoint(source).config.model_dump(mode="json")}
    return _with_located(Config.from_tree({**merge(own, tree), "model": own["model"]}))


def _with_located(config: Config) -> Config:
    """The settings with adapters by what any process finds them."""
    if not (adapters := config.serve.adapters):
        return config
    found = {name: _of_adapter(name, located, source) for name, source in adapters.items()}
    return config.model_copy(update={"serve": config.serve.model_copy(update={"adapters": found})})


def _of_adapter(name: str, what: Callable[..., T], *arguments: Any) -> T:
    """The result, or an error that says which adapter it is about."""
    found = tried(partial(what, *arguments), CheckpointError)
    if isinstance(found, CheckpointError):
        raise ConfigError(f"serve.adapters.{name}: {found.message}")
    return found


def source_of(named: str, tree: Mapping[str, Any]) -> str:
    """Return by what any process finds the source: an absolute path, or a model's name on the Hub at a commit."""
    return str(Path(named).resolve()) if _is_of_run(tree) else located(named)


def _is_of_run(tree: Mapping[str, Any]) -> bool:
    serve = tree.get("serve")
    weights = serve.get("weights") if isinstance(serve, Mapping) else None
    return str(weights).startswith(("live", "pinned"))


def _settings_of_run(folder: Path) -> dict[str, Any]:
    if not (folder / RUN_SETTINGS).is_file():
        raise ConfigError(
            f"{folder} holds no {RUN_SETTINGS}, so it is no run of `trinity train`; name the train.out_dir of one, or serve a "
            "checkpoint with --weights checkpoint"
        )
    tree = read_yaml(folder / RUN_SETTINGS)
    return {
        "model": tree["model"],
        "placement": tree["placement"],
        "cluster": {"namespace": tree["cluster"]["namespace"]},
    }


def check_source(source: str, config: Config) -> None:
    """Check, before anything is started, that a checkpoint is whole and a run is somewhere to be joined."""
    _check_adapters(source, config)
    if not config.serve.is_of_run:
        checkpoint = open_checkpoint(source)
        checkpoint.verify()
        try_template(checkpoint.path)
        if config.serve.generation_config == "checkpoint":
            for line in read_defaults(checkpoint.generation, source).sentences():
                say(line)
        if config.cluster.address == "local":  # elsewhere each node fetches what it needs
            checkpoint.fetch()
    elif config.cluster.address == "local":
        raise ConfigError(
            f"--weights {config.serve.weights} joins the cluster that trains {source}: give --cluster.address auto, or its "
            "host:port"
        )


def _check_adapters(source: str, config: Config) -> None:
    if (name := config.serve.served_model_name or title_of(source)) in config.serve.adapters:
        raise ConfigError(f"serve.adapters.{name}: that is the served model's own name; take another one")
    base = None if config.serve.is_of_run else source
    for name, adapter in config.serve.adapters.items():
        _of_adapter(name, examined, adapter, config.model, base)


def try_template(source: str | Path) -> None:
    """Say at once that a checkpoint's template will refuse chats, instead of with the first one."""
    if (template := read_template(source)) is None:
        return
    try:
        render_chat(template, [{"role": "user", "content": "Hello"}])
    except InvalidRequest as error:
        say(f"/v1/chat/completions will answer 400 to most or all: {error.message}")


def provide_weights(config: Config, source: str) -> bool:
    """See that the pool is there with what engines will ask it for; -> whether it ends with the server."""
    from actors import pool as pools

    if not config.serve.is_of_run:
        return provide_pool(config, source)
    if not pools.exists(config.placement.pool, config.cluster.namespace):
        raise ConfigError(
            f"there is no pool {config.placement.pool!r} in this cluster: nobody trains {source} in it. Start the training "
            "first, or serve its last checkpoint"
        )
    provide_adapters(pools.connect(config.placement, config.cluster.namespace), config)
    return False


def provide_adapters(pool: "RayPool", config: Config) -> None:
    """Have the pool's shards take up the adapters of the settings. Raises InvalidRequest where another one has such a name."""
    for name, source in config.serve.adapters.items():
        pool.service.ask("add_adapter", name, source, timeout_s=config.placement.checkpoint_timeout_s)


def provide_pool(config: Config, checkpoint: str) -> bool:
    """See that the pool of the configured name holds this checkpoint's experts; -> whether it ends with the server: it was
    made for one, now or by a command that died, and is not to be kept.

    A pool that is there is used as it is or refused, never loaded: somebody may be training in it.
    """
    from actors import pool as pools

    name, namespace, ends = config.placement.pool, config.cluster.namespace, not config.placement.keep
    if pools.exists(name, namespace):
        pool = pools.connect(config.placement, namespace)
        _check_holds(pool, config, checkpoint)
        provide_adapters(pool, config)
        return ends and pool.service.spec().ends_with_server
    pool = pools.create(
        config.placement, namespace, config.model, None, config.placement.state_dir, ends_with_server=ends
    )
    try:
        with watched("reading the experts", partial(tried, pool.progress, TrinityError)):
            pool.load(Load(checkpoint, training=False))
        provide_adapters(pool, config)
    except TrinityError:
        pools.destroy(name, namespace)
        raise
    print(describe(pool.status(), config.model), file=sys.stderr)
    return ends


def _check_holds(pool: "RayPool", config: Config, checkpoint: str) -> None:

    source, versions = pool.service.source(), set(pool.versions().values())
    same = source is not None and source.checkpoint == checkpoint and pool.service.spec().model == config.model
    if not same or versions != {open_checkpoint(checkpoint).version}:
        raise ConfigError(
            f"pool {pool.name!r} holds {source.checkpoint if source else 'other weights'} at version {versions}, not "
            f"{checkpoint}; serve from another --placement.pool, or end this one with `trinity placement rm {pool.name}`"
        )
