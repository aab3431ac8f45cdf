"""Tokenise files on all nodes of a cluster, by Ray Data: one file in, one shard out (trinity/data/shards.py).

Decisions. A shard is bit for bit the one that a single process makes, under the same name, and is renamed when whole: a job
that was killed goes on with what is missing. The folder is one that all nodes see. A file that cannot be read ends the job with
its name; shards that are made until then stay.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray.data

from trinity.data.cache import Cache
from trinity.data.documents import Found
from trinity.data.shards import Recipe
from trinity.errors import ConfigError, DataError, TrinityError
from trinity.utils.trying import tried

ONE_THREAD = {"env_vars": {"RAYON_NUM_THREADS": "1"}}  # of the tokenizer: there is a task for each core


def tokenise(recipe: Recipe, files: Sequence[Found], cache: Cache, told: Callable[[int, int], None]) -> None:
    """Make the shards of these files that `cache` lacks; `told` hears how many are made, and of how many. In the cluster that
    this process has joined. Raises DataError that names a file, ConfigError where nodes write what this one does not see."""
    missing = recipe.missing(files, cache)
    if not missing:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `told` is who says how far it is
    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = ray.data.from_items([{"number": n} for n in range(len(missing))], override_num_blocks=len(missing))
    make = partial(_made, recipe, missing, cache)
    done = numbers.map_batches(make, batch_size=1, num_cpus=1, runtime_env=ONE_THREAD)
    for num, row in enumerate(done.iter_rows(), 1):
        if row["error"]:
            raise DataError(row["error"])
        told(num, len(missing))
    if unseen := recipe.missing(missing, cache):
        raise ConfigError(
            f"other nodes made {len(unseen)} shards that are not in {cache.folder} of this one; set data.cache to a folder "
            "that all nodes see, or to an address"
        )


def _made(recipe: Recipe, files: Sequence[Found], cache: Cache, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Errors of the shards of these files, in a task; empty where there is none. The errors are no exceptions, which Ray would
    wrap and try again."""
    found = [tried(partial(recipe.made, files[n], cache, False), TrinityError) for n in batch["number"]]
    return {"error": [each.message if isinstance(each, TrinityError) else "" for each in found]}
