from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPlacementResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class WatchPlacementRequest(_message.Message):
    __slots__ = ("every_s",)
    EVERY_S_FIELD_NUMBER: _ClassVar[int]
    every_s: float
    def __init__(self, every_s: _Optional[float] = ...) -> None: ...

class WatchPlacementResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("num_shards", "reason")
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    num_shards: int
    reason: str
    def __init__(self, num_shards: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("layer", "expert", "num_replicas")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    num_replicas: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., num_replicas: _Optional[int] = ...) -> None: ...

class ReplicateResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("shard",)
    SHARD_FIELD_NUMBER: _ClassVar[int]
    shard: str
    def __init__(self, shard: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("pool", "time_s", "epoch", "placed_shards", "layers", "shards", "imbalance", "changes", "num_recoveries")
    POOL_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLACED_SHARDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    pool: str
    time_s: float
    epoch: int
    placed_shards: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    imbalance: float
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    num_recoveries: int
    def __init__(self, pool: _Optional[str] = ..., time_s: _Optional[float] = ..., epoch: _Optional[int] = ..., placed_shards: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., imbalance: _Optional[float] = ..., changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., num_recoveries: _Optional[int] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("index", "num_replicas", "replica_shards", "rows_per_s")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_SHARDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    index: int
    num_replicas: _containers.RepeatedScalarFieldContainer[int]
    replica_shards: _containers.RepeatedScalarFieldContainer[int]
    rows_per_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, index: _Optional[int] = ..., num_replicas: _Optional[_Iterable[int]] = ..., replica_shards: _Optional[_Iterable[int]] = ..., rows_per_s: _Optional[_Iterable[float]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("name", "host", "state", "version", "num_replicas", "weight_bytes", "rows_per_s", "expert_dtype", "computes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    COMPUTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    host: str
    state: str
    version: int
    num_replicas: int
    weight_bytes: int
    rows_per_s: float
    expert_dtype: str
    computes: str
    def __init__(self, name: _Optional[str] = ..., host: _Optional[str] = ..., state: _Optional[str] = ..., version: _Optional[int] = ..., num_replicas: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., rows_per_s: _Optional[float] = ..., expert_dtype: _Optional[str] = ..., computes: _Optional[str] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("epoch", "started_s", "seconds", "reason", "phase", "num_copies", "num_drops", "copied_bytes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIES_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPS_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    started_s: float
    seconds: float
    reason: str
    phase: str
    num_copies: int
    num_drops: int
    copied_bytes: int
    def __init__(self, epoch: _Optional[int] = ..., started_s: _Optional[float] = ..., seconds: _Optional[float] = ..., reason: _Optional[str] = ..., phase: _Optional[str] = ..., num_copies: _Optional[int] = ..., num_drops: _Optional[int] = ..., copied_bytes: _Optional[int] = ...) -> None: ...
