"""Settings of the data plane for a pool's shards. Without torch: those who only control need none."""

from dataclasses import dataclass

from trinity.config import PlacementConfig


@dataclass(frozen=True)
class DataPlane:
    """Settings by which a shard takes rows: where it listens, who may send, how many threads
    compute, and whether what comes over TCP is sealed."""

    host: str
    secret: bytes
    num_threads: int
    is_sealed: bool = False

    @classmethod
    def of(cls, settings: PlacementConfig, host: str, secret: bytes) -> "DataPlane":
        return cls(host, secret, settings.num_threads_per_shard, settings.data_tls)
