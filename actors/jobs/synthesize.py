"""Synthetic data by several workers of Ray Data: each makes whole shards, whose journals lie in a folder that all share."""

from collections.abc import Generator, Sequence

import ray.data

from trinity.config import SynthesisConfig
from trinity.errors import Unavailable
from trinity.synthesis.maker import OPEN_SHARDS, Maker, Shard


def made_by_workers(
    config: SynthesisConfig, url: str, key: str | None, model: str, shards: Sequence[Shard]
) -> Generator[str, None, None]:
    """-> names of shards as they become whole. As many questions at a time as in one process. Raises Unavailable with what
    ended a worker."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    each = max(1, config.server.concurrency // config.workers)
    actors = ray.data.ActorPoolStrategy(size=config.workers)
    found = ray.data.from_items([shard._asdict() for shard in shards], override_num_blocks=len(shards)).map_batches(
        Maker, fn_constructor_args=(config, url, key, model, each), compute=actors, batch_size=OPEN_SHARDS
    )
    for row in found.iter_rows():
        if row["error"]:
            raise Unavailable(row["error"])
        yield row["name"]
