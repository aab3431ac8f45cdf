"""A pool and a caller on a host of a cluster; tests/chaos/test_hosts.py tells it what to do.

python hosts_driver.py GCS_ADDRESS '{"num_shards": 2, ...}'   (settings of the placement)

Each line in is a verb and its arguments as JSON, each line out its answer. The caller sends rows all the time, and compares
every answer with the experts' in this process.
"""

# ruff: noqa: E402
import json
import os
import sys

from trinity.config import setup_environment

setup_environment("disabled", is_local=False)

import ray
import torch

from actors import pool as pools
from actors.control.admin import operator
from tests.ray.test_moves import MODEL, SOURCE, Caller, until
from trinity.config import PlacementConfig

COMMON = {"pool": "hosts", "resources": {"expert_shard": 1}, "data_host": "node", "watch_every_s": 0.5, "drain_s": 0.1}


class Driver:
    def __init__(self, address: str, settings: dict):
        ray.init(address=address, namespace="trinity", log_to_driver=False, logging_level="ERROR")
        self.settings = PlacementConfig(**{**COMMON, "balance_every_s": 0, **settings})
        self.pool = pools.create(self.settings, "trinity", MODEL, None, "/tmp/ray/placement")
        self.pool.load(SOURCE)
        self.seen = operator(self.settings, "trinity")
        self.caller = Caller(self.pool)
        self.caller.thread.start()

    def whole(self, survives: list[int] | None = None) -> dict:
        """Wait until all shards are ready (and so many losses are survived); -> host of each shard."""
        until(lambda: all(shard.state == "ready" for shard in self.seen.snapshot().shards), within_s=120)
        until(lambda: survives is None or list(self.seen.snapshot().survives) == survives, within_s=120)
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return {shard.name: nodes[shard.host] for shard in self.seen.snapshot().shards}

    def calls(self) -> int:
        assert self.caller.errors == [], self.caller.errors
        return self.caller.num_calls

    def more(self, num: int) -> int:
        """Wait for so many calls more."""
        wanted = self.calls() + num
        until(lambda: self.calls() >= wanted, within_s=60)
        return self.calls()

    def longest_s(self) -> float:
        """The longest call since the last time."""
        found, self.caller.longest_s = self.caller.longest_s, 0.0
        return found

    def scale(self, num_shards: int) -> int:
        return self.seen.scale(num_shards, "test")

    def settled(self, num_shards: int) -> dict:
        """Wait until there are so many, and nothing is under way."""
        until(lambda: len(self.seen.snapshot().table.shards) == num_shards, within_s=120)
        until(
            lambda: all(change.phase in ("done", "rolled back") for change in self.seen.snapshot().changes),
            within_s=120,
        )
        return self.whole()

    def changes(self) -> list[list[str]]:
        return [[change.reason, change.phase] for change in self.seen.snapshot().changes]

    def end(self) -> int:
        self.caller.stop.set()
        self.caller.thread.join(60)
        return self.calls()


def main(address: str, settings: str) -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Ray prints what it sees of other nodes
    driver = Driver(address, json.loads(settings))
    answers.write(json.dumps("on") + "\n")
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        answers.write(json.dumps(getattr(driver, verb)(*arguments)) + "\n")
    os._exit(0)  # the hosts go with all that is on them


if __name__ == "__main__":
    main(*sys.argv[1:])
