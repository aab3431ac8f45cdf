"""Settings of the data plane for a pool's shards. Without torch: those who only control need none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataPlane:
    """Settings by which a shard takes rows: where it listens, who may send, how many threads compute."""

    host: str
    secret: bytes
    num_threads: int
