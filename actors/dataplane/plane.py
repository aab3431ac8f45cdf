"""What a pool's shards are told about the data plane. Without torch: those who only control need none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataPlane:
    """How a shard takes rows: where it listens, who may send, how many threads compute."""

    host: str
    secret: bytes
    num_threads: int
