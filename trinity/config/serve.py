"""The settings of an engine, its edges and the cluster."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from trinity.config.yaml import Frozen, at_home
from trinity.utils.origins import LOOPBACK

DEFAULT_CLIENT, ADMIN_CLIENT = "default", "admin"  # the names of those with serve.api_key and serve.admin_key
ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s?#@]+")
DEFAULT_PORT = re.compile(r"^(http(?=://.*:80$)|https(?=://.*:443$))(://.*):\d+$")  # which browsers leave out
HIDDEN = "(set)"  # in place of a key, where settings are printed
NODE = "node"  # the address by which Ray knows the node
EVERY_NODE = "every_node"


ROLES_TIER_BYTES = 1 << 30
Role = Literal["both", "prefill", "decode"]


def check_roles(roles: Sequence[Role], tier_bytes: int, num_engines: int) -> None:
    """Raises ValueError where no engine would be there to answer, or to take over what another one has computed; `num_engines`
    are there at most."""
    if not roles:
        raise ValueError("role names no engine; give both, or a list")
    if all(role == "prefill" for role in roles):
        raise ValueError("role prefill needs another engine that answers; add decode or both to the list")
    if "prefill" in roles and not tier_bytes:
        raise ValueError(
            "role prefill hands prompts over in the node's shared memory; give it some with engine.kv_tier_bytes, and leave "
            "engine.prefix_cache on"
        )
    if len(roles) > num_engines:
        raise ValueError(f"role names {len(roles)} engines and there are at most {num_engines}; raise replicas")


class EngineConfig(Frozen):
    """Continuous batching and the paged KV cache."""

    replicas: int = Field(default=1, ge=1, description="engines of one server, over one pool of experts")
    max_replicas: int | None = Field(default=None, ge=1, description="scale engines up to so many under load")
    requests_per_replica: int = Field(default=48, ge=1, description="running requests at which another engine starts")
    role: tuple[Role, ...] = Field(
        default=("both",),
        description="what an engine is sent: both, long prompts (prefill), or answers (decode); one for all, or a list in the "
        "order of their start, whose last is that of the rest",
    )
    min_prefill_tokens: int = Field(
        default=512, ge=1, description="a prompt with so many tokens that are not cached goes to a prefill engine first"
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="prompt + generated tokens; default: the model's, or what fits into memory"
    )
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=1024, ge=1, description="tokens in one forward pass (chunked prefill)")
    max_num_waiting: int = Field(default=1024, ge=1)
    max_pass_ms: float | None = Field(
        default=None,
        gt=0,
        description="what a pass of several tokens may take: so long an urgent request waits, and a long prompt delays others' "
        "tokens, at most; passes become as long as the last ones show to fit. Default: max_num_batched_tokens alone",
    )
    num_overlapped_microbatches: int = Field(
        default=1, ge=1, description="parts of a large batch side by side: one goes on while another's rows are away"
    )
    min_part_tokens: int = Field(
        default=32, ge=1, description="no part of a batch is smaller, with num_overlapped_microbatches > 1"
    )
    max_draft_tokens: int = Field(
        default=8,
        ge=0,
        le=64,
        description="most tokens that a pass computes after a sequence's last one, where its text or earlier answers of the "
        "client went on so before; as many as pay, by what passes take and what came true. The text is the same. 0: none",
    )
    block_size: int = Field(default=16, ge=1)
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="of one engine; default: by memory_fraction, at most what max_num_seqs could use",
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="auto: keys and values are kept in the model's type; int8: in 8 bits, with a scale of each token and "
        "head: nearly twice as many tokens fit as in bfloat16, nearly four times as many as in float32",
    )
    weight_dtype: Literal["auto", "bfloat16", "int8", "fp8", "nvfp4"] = Field(
        default="auto",
        description="what the matrices of attention, dense and shared feed-forwards and the head are kept in and multiplied "
        "as, on a CPU; norms, routers and the embedding stay. auto: the model's type. Routed experts: placement.expert_dtype",
    )
    memory_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of a GPU, for weights and KV cache together (default: 0.9); of what the weights leave of the memory that "
        "is free where the CPU computes, for the KV cache (default: 0.5)",
    )
    num_gpus: float = Field(default=0, ge=0, description="of one engine replica; 0: it computes on the CPU")
    resources: dict[str, float] = Field(default={}, description="custom resources of each engine, such as engine: 1")
    num_threads: int = Field(default=1, ge=1)
    prefix_cache: bool = Field(default=True, description="compute no beginning of a request again that is still cached")
    kv_tier_bytes: int | None = Field(
        default=None,
        ge=0,
        description="of each node's shared memory, for what its engines have cached: all of them find it there, and one that "
        "starts again does; 0: none. Default: none, or 1 GiB where roles are apart, which hand prompts over by it",
    )
    max_num_kept: int | None = Field(
        default=None,
        ge=0,
        description="sequences that have ended and for which the cache has room beside max_num_seqs; default: as many, with "
        "prefix_cache",
    )
    kv_max_age: int | Literal["unbounded"] = Field(
        default=0,
        description="steps by which cached keys and values may be older than the weights that a live request uses (`keep` was "
        "`unbounded`, `recompute` was 0)",
    )
    preload: bool = Field(
        default=True, description="copy a newer version's backbone beside the one in use, so that no pass waits for it"
    )
    max_versions: int = Field(default=2, ge=1, description="versions that pinned requests hold at once")

    @model_validator(mode="after")
    def _check_replicas(self) -> "EngineConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is below replicas {self.replicas}; raise it, or leave it out"
            )
        return self

    @field_validator("role", mode="before")
    @classmethod
    def _one_role_is_enough(cls, value: Any) -> Any:
        if not isinstance(value, str | list | tuple):
            raise ValueError("give both, prefill or decode, or a list of these")
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_roles(self) -> "EngineConfig":
        check_roles(self.role, self.tier_bytes, self.max_replicas or self.replicas)
        return self

    @field_validator("kv_max_age", mode="before")
    @classmethod
    def _check_age(cls, value: Any) -> Any:
        if value != "unbounded" and not (type(value) is int and value >= 0):
            raise ValueError("give a number of steps, 0 and more, or `unbounded`")
        return value

    @property
    def tier_bytes(self) -> int:
        """`kv_tier_bytes` as a number; 0: none."""
        if not self.prefix_cache:
            return 0
        is_apart = any(role != "both" for role in self.role)
        return ROLES_TIER_BYTES * is_apart if self.kv_tier_bytes is None else self.kv_tier_bytes

    @property
    def num_kept_seqs(self) -> int:
        """Sequences of the longest length that the cache has room for at most."""
        kept = self.max_num_seqs * self.prefix_cache if self.max_num_kept is None else self.max_num_kept
        return self.max_num_seqs + kept

    @property
    def max_age(self) -> int | None:
        """`kv_max_age` as a number; None: any."""
        return None if self.kv_max_age == "unbounded" else self.kv_max_age

    @property
    def max_pass_s(self) -> float | None:
        return None if self.max_pass_ms is None else self.max_pass_ms / 1e3


class Client(NamedTuple):
    """Whoever asks, its weight beside others that ask at the same time, and the most urgent priority that it may ask for."""

    name: str
    weight: float = 1.0
    first_priority: int = -(1 << 63)


ANYBODY = Client("anybody")  # where nobody has a key
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
MOST_ADAPTERS = 64  # of one pool at once


class AdapterRef(NamedTuple):
    """An adapter that is served beside its base. `content`: a number made of all that is in its files, above 0, by which shards
    and engines know it; `source`: by what any process finds them."""

    name: str
    content: int
    source: str


class AdapterSet(NamedTuple):
    """All adapters of a pool. `number` grows with each change."""

    number: int = 0
    refs: tuple[AdapterRef, ...] = ()


def check_adapter_name(name: str) -> str:
    """Return it. Raises ValueError for a name that would not be told from a model's, a path's or a separator."""
    if not ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            f"{name[:150]!r} is no adapter's name; use 1 to 128 letters, digits, _ . and -, beginning with a letter or digit"
        )
    return name


class ClientConfig(Frozen):
    """A key beside serve.api_key, under a name."""

    key: str = Field(min_length=1, repr=False)
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="its share of slots and turns beside others; serve.api_key has 1"
    )
    first_priority: int = Field(
        default=0,
        ge=-(1 << 63),
        lt=1 << 63,
        description="the lowest `priority`, which is the most urgent, that its requests may have; serve.api_key's may have any",
    )

    def as_client(self, name: str) -> Client:
        return Client(name, self.weight, self.first_priority)


class ServeConfig(Frozen):
    """The HTTP and gRPC edges. Loopback unless `allow_remote` is set and an API key is configured."""

    host: str = Field(
        default="127.0.0.1",
        description="where each gateway listens on its own node; `node`: the address by which Ray knows the node",
    )
    gateways: int | Literal["every_node"] = Field(
        default=1, description="gateways over the same engines; every_node: one on each node, and on those that come"
    )
    gateway_resources: dict[str, float] = Field(
        default={}, description="custom resources of each gateway, such as gateway: 1; with them it need not run here"
    )
    http_port: int = Field(default=8000, ge=0, le=65535)
    grpc_port: int = Field(default=9000, ge=0, le=65535)
    allow_remote: bool = False
    api_key: str | None = Field(default=None, min_length=1, repr=False, description="also from TRINITY_API_KEY")
    admin_key: str | None = Field(
        default=None, min_length=1, repr=False, description="who may move experts; also from TRINITY_ADMIN_KEY"
    )
    clients: dict[str, ClientConfig] = Field(
        default={}, max_length=1000, description="other keys, by name; each has a share of the slots, and its turn"
    )
    served_model_name: str | None = None
    adapters: dict[str, str] = Field(
        default={},
        max_length=MOST_ADAPTERS,
        description="adapters served beside the weights, by name: folders in PEFT's format, or names on the Hub",
    )
    weights: str = Field(
        default="checkpoint",
        description="those of a checkpoint, or of a run that trains: `live`, `pinned` (its newest) or `pinned:STEP`",
    )
    generation_config: Literal["checkpoint", "none"] = Field(
        default="checkpoint",
        description="whether a checkpoint's generation_config.json sets the defaults of sampling; a run's weights have none",
    )
    routed_experts: bool = Field(
        default=False, description="whether a request may ask to which experts each of its tokens went"
    )
    tool_format: Literal["auto", "hermes", "qwen3_coder", "glm", "none"] = Field(
        default="auto", description="how the model writes calls of tools; auto: as its chat template shows"
    )
    reasoning_format: Literal["auto", "think", "none"] = Field(
        default="auto", description="does it reason between <think> and </think>? auto: if its chat template shows them"
    )
    tls_cert: str | None = None
    tls_key: str | None = None
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_body_bytes: int = Field(default=2 << 20, ge=1024)
    max_answer_bytes: int = Field(
        default=64 << 20, ge=1024, description="of an answer that is not streamed, at most about"
    )
    max_concurrent_requests: int = Field(default=1024, ge=1)
    max_connections: int = Field(default=2048, ge=1, description="of each listener; then idle ones make room")
    max_connections_per_peer: int = Field(default=1024, ge=1, description="from one address, over HTTP")
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="names in the Host header besides loopback's and `host`; without a key others are refused",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="of pages that may call over HTTP, such as http://localhost:3000; * for all"
    )
    drain_timeout_s: float = Field(default=20.0, ge=0)
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        description="from the moment when health says NOT_SERVING until new requests are refused: as long as a balancer takes",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://",
        description="where spans of requests are sent (OTLP over HTTP), such as http://127.0.0.1:4318/v1/traces; needs the "
        "extra `otlp`",
    )

    _at_home = field_validator("tls_cert", "tls_key")(at_home)

    @field_validator("gateways", mode="before")
    @classmethod
    def _check_gateways(cls, value: Any) -> Any:
        if value != EVERY_NODE and not (type(value) is int and value >= 1):
            raise ValueError("give a number, 1 and more, or `every_node`")
        return value

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _one_origin_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("allowed_origins")
    @classmethod
    def _as_browsers_say_them(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin[:100]!r} is no origin; write scheme://host:port, without a path, or *")
        return tuple(DEFAULT_PORT.sub(r"\1\2", origin.lower()) for origin in value)

    @property
    def needs_key(self) -> bool:
        return self.api_key is not None or bool(self.clients)

    @property
    def client_by_key(self) -> dict[str, Client]:
        """Whoever has each key but the admin's; serve.api_key's is `default`."""
        found = {} if self.api_key is None else {self.api_key: Client(DEFAULT_CLIENT)}
        return found | {client.key: client.as_client(name) for name, client in self.clients.items()}

    @property
    def is_of_run(self) -> bool:
        """Are the weights those of a run that trains, instead of a checkpoint's?"""
        return self.weights != "checkpoint"

    @property
    def pinned_step(self) -> int | None:
        """The STEP of `pinned:STEP`; in the settings of a server's engines the version's name (trinity/utils/lines.py)."""
        step = self.weights.partition(":")[2]
        return int(step) if step else None

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        if not re.fullmatch("checkpoint|live|pinned(:[0-9]{1,19})?", value):
            raise ValueError("choose checkpoint, live, pinned or pinned:STEP")
        return value

    @field_validator("adapters")
    @classmethod
    def _adapter_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            check_adapter_name(name)
        return value

    @field_validator("clients")
    @classmethod
    def _legal_names(cls, value: dict[str, ClientConfig]) -> dict[str, ClientConfig]:
        for name in value:
            if not re.fullmatch("[a-z0-9][a-z0-9_.-]{0,63}", name) or name in (DEFAULT_CLIENT, ADMIN_CLIENT):
                raise ValueError(
                    f"{name[:100]!r} is no client's name; use 1 to 64 of a-z, 0-9, _ . and -, "
                    f"neither {DEFAULT_CLIENT} nor {ADMIN_CLIENT}"
                )
        return value

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if not self.is_loopback and not (self.allow_remote and self.needs_key):
            raise ValueError(
                f"host {self.host} is reachable by others: set serve.allow_remote true and serve.api_key (or TRINITY_API_KEY)"
            )
        self._check_keys()
        self._check_ports()
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together; one of them is missing")
        return self

    def _check_ports(self) -> None:
        http, grpc, most = self.http_port, self.grpc_port, self.gateways if isinstance(self.gateways, int) else 1
        if http == grpc != 0:
            raise ValueError(f"http_port and grpc_port are both {http}; choose two")
        if http and grpc and (abs(http - grpc) < most or max(http, grpc) + most > 1 << 16):
            raise ValueError(
                f"{most} gateways on one machine would take ports from {http} and from {grpc} on, which meet each other or "
                "65535; choose http_port and grpc_port further apart, or fewer gateways"
            )

    def _check_keys(self) -> None:
        owners: dict[str, str] = {} if self.api_key is None else {self.api_key: "api_key"}
        for name, client in self.clients.items():
            if client.key in owners:
                raise ValueError(f"clients.{name} has the key of {owners[client.key]}; give it one of its own")
            owners[client.key] = f"clients.{name}"
        if (hidden := owners.get(HIDDEN)) or self.admin_key == HIDDEN:
            raise ValueError(
                f"{hidden or 'admin_key'} is {HIDDEN!r}, which printed settings show for a key; give the key itself"
            )
        if self.admin_key is not None and self.admin_key in owners:
            raise ValueError(
                f"admin_key is the key of {owners[self.admin_key]}, so that this client could move experts; choose two"
            )


class ClusterConfig(Frozen):
    address: str = Field(default="local", description="`local` starts Ray here; `auto` or host:port joins a cluster")
    namespace: str = "trinity"
    num_cpus: int = Field(default=2, ge=1, description="for `local`")
    auth: Literal["disabled", "token"] = Field(default="token", description="RAY_AUTH_MODE, unless it is already set")
