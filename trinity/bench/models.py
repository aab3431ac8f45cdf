"""Models that `bench train` and `bench decode` run: one random model, as our checkpoint, in shard actors, and in transformers.

Decisions: weights depend on the seed alone and are written once to the out folder, so that all arms start from the same
file; fp32, where results of different programs can be compared; an arm sets its number of threads when its turn comes.
"""

import argparse
import importlib.util
import secrets
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trinity.config import (
    ClusterConfig,
    Config,
    ModelConfig,
    OptimConfig,
    PlacementConfig,
    num_cpus,
    preset,
    setup_environment,
)
from trinity.errors import ConfigError
from trinity.utils.terminal import say

if TYPE_CHECKING:
    from actors.pool import RayPool

HERE, ACTORS, TRANSFORMERS = "one process", "shard actors", "transformers"
NUM_SHARDS = 2
NUM_LIKELY = 20  # first tokens, of which bf16 may choose another
SEED = 0
EXPERTS_IMPLEMENTATION = "grouped_mm"  # transformers' fastest on a CPU, and its default


class Split(NamedTuple):
    """Threads of the backbone's process, and of each shard."""

    backbone: int
    shard: int

    def __str__(self) -> str:
        return f"{self.backbone}:{self.shard}"


def numbers(text: str) -> tuple[int, ...]:
    """ "1,2,4"; for argparse."""
    return tuple(int(part) for part in text.split(","))


def splits(text: str) -> tuple[Split, ...]:
    """ "2:1,1:1"; for argparse. The first is the one that targets are held to."""
    found = tuple(Split(*map(int, part.split(":"))) for part in text.split(","))
    if any(threads < 1 for split in found for threads in split):
        raise argparse.ArgumentTypeError(f"{text}: a split gives at least one thread to each side, such as 2:1")
    return found


def flags(parser: argparse.ArgumentParser, usual: Mapping[str, Any]) -> None:
    """Flags that both benches take. `usual` holds the defaults of a run without --quick."""
    parser.add_argument("--preset", help=f"model (default: {usual['preset']}; with --quick tiny)")
    parser.add_argument("--threads", type=int, help="for what runs in one process (default: all cores)")
    parser.add_argument("--splits", type=splits, metavar="B:S,…", help="threads of the backbone and of each shard actor "
                        f"(default: {','.join(map(str, usual['splits']))}); the first is held to the targets")  # fmt: skip
    parser.add_argument("--rounds", type=int, help=f"turns that each arm takes (default: {usual['rounds']})")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=["actors", "transformers", "free"],
        help="leave these arms out",
    )


def filled(arguments: argparse.Namespace, usual: Mapping[str, Any], quick: Mapping[str, Any]) -> argparse.Namespace:
    """The flags that were given, over the defaults of this kind of run."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    defaults = {"threads": num_cpus(), **(quick if arguments.quick else usual)}
    return argparse.Namespace(**{**defaults, **given})


def config_of(preset: str, **sections: Mapping[str, Any]) -> Config:
    """The preset's settings, its model in fp32."""
    return Config.from_tree({"model": {"preset": preset, "dtype": "float32"}, **sections})


def shape(name: str, num_layers: int | None) -> ModelConfig:
    """The preset's model in bf16, of so many of its layers."""
    fields = preset(name).model_dump() | {"dtype": "bfloat16"}
    cut = {"num_hidden_layers": num_layers, "layer_types": ()} if num_layers else {}
    fields |= {name: value for name, value in cut.items() if name in fields}
    return ModelConfig.of(fields)


def checkpoint(model: ModelConfig, folder: Path) -> Path:
    """The seeded random weights of `model` in `folder`, written unless they are there; with a tokenizer of its size."""
    from trinity.checkpoint import CheckpointWriter, open_checkpoint, write_tensors
    from trinity.data.documents import documents
    from trinity.models.registry import family_of
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load
    from trinity.text.tokenizer import Tokenizer

    if (folder / "manifest.json").is_file() and open_checkpoint(folder).config == model:
        return folder
    pool = local_pool(model, Load(seed=SEED))
    backbone = family_of(model).build(model, pool.dispatcher())
    family_of(model).init_weights(backbone, SEED)
    writer = CheckpointWriter(folder, 0)
    parts = [*pool.save(str(writer.folder), 0)(), *write_tensors(writer.folder, "model", backbone.tensors().items())]
    tokenizer = Tokenizer.train(documents(("stdlib",), max_documents=50), model.vocab_size)
    return writer.finish(parts, model, tokenizer, None)


def random_ids(model: ModelConfig, *shape: int) -> list[Any]:
    """Seeded token ids, none of them special."""
    import numpy as np

    ids: list[Any] = np.random.default_rng(SEED).integers(20, model.vocab_size, shape).tolist()
    return ids


def twin(path: Path, dtype: str = "float32") -> Any:
    """transformers' own model of the checkpoint. Raises ConfigError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("transformers is not installed: pip install transformers, or run --without transformers")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), experts_implementation=EXPERTS_IMPLEMENTATION, local_files_only=True
    )
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def ray_joined(wanted: bool) -> Iterator[None]:
    """A private Ray on this machine inside the block, if it is wanted."""
    if not wanted:
        yield
        return
    cluster = ClusterConfig()
    setup_environment(cluster.auth)
    from actors.cluster import joined

    with joined(cluster):
        yield


@contextmanager
def shard_actors(
    model: ModelConfig,
    num_threads: int,
    num_shards: int = NUM_SHARDS,
    optim: OptimConfig | None = None,
    durable: bool = True,
) -> Iterator["RayPool"]:
    """A pool of shard actors without weights, ended with the block."""
    from actors import pool as pools

    name, namespace = f"bench-{secrets.token_hex(4)}", ClusterConfig().namespace
    settings = PlacementConfig(pool=name, num_shards=num_shards, num_threads_per_shard=num_threads, durable=durable)
    with tempfile.TemporaryDirectory(prefix="trinity-bench-") as state_dir:
        pool = pools.create(settings, namespace, model, optim, state_dir)
        try:
            yield pool
        finally:
            pools.destroy(name, namespace)


def by_shard_threads(splits: Sequence[Split]) -> dict[int, list[Split]]:
    """One pool serves all splits that agree on a shard's threads."""
    found: dict[int, list[Split]] = {}
    for split in splits:
        found.setdefault(split.shard, []).append(split)
    return found


def tell(rates: Mapping[str, list[float]]) -> None:
    """A race's medians, for who is watching."""
    say("  " + ", ".join(f"{name} {statistics.median(found):,.0f} tokens/s" for name, found in rates.items()))


def actor_arm(split: Split) -> str:
    return f"{NUM_SHARDS} {ACTORS}, threads {split}"
