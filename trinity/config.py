"""One frozen tree of settings: defaults < YAML file < `--dotted.flags`.

Every value has its unit in its name. Unknown keys are refused with the nearest match. The environment is read here
and nowhere else. Importable without torch and without Ray, so that a configuration can be checked anywhere.
"""

import difflib
import os
import secrets
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from trinity.errors import ConfigError
from trinity.placement.settings import PlacementConfig
from trinity.settings import ClusterConfig, EngineConfig, ServeConfig
from trinity.tree import PRESETS, Frozen, merge, parse_flags, preset_names, read_yaml

LayerType = Literal["sliding_attention", "full_attention"]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Frozen):
    """An AFMoE architecture, with the field names of its Hugging Face `config.json` (shared words, no translation)."""

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_dense_layers: int = Field(ge=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    num_shared_experts: int = Field(ge=0)
    route_scale: float
    sliding_window: int = Field(gt=0)
    global_attn_every_n_layers: int = Field(default=4, gt=0)
    layer_types: tuple[LayerType, ...] = ()
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    mup_enabled: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | None = 3
    pad_token_id: int | None = 12
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_invariant: bool = Field(
        default=True,
        description="on CPUs: a token's numbers are the same bits in any batch, in training as in serving",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_layer_types(cls, data: Any) -> Any:
        """Every n-th layer attends globally, the others within their window, unless listed one by one."""
        if not isinstance(data, dict):
            return data
        num, every = data.get("num_hidden_layers"), data.get("global_attn_every_n_layers", 4)
        if isinstance(num, int) and isinstance(every, int) and every > 0 and not data.get("layer_types"):
            kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num)]
            data = {**data, "layer_types": tuple(kinds)}
        return data

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        checks = [
            (
                len(self.layer_types) == self.num_hidden_layers,
                f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers",
            ),
            (
                self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok {self.num_experts_per_tok} > num_experts {self.num_experts}",
            ),
            (
                self.num_attention_heads % self.num_key_value_heads == 0,
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}",
            ),
            (
                self.num_dense_layers <= self.num_hidden_layers,
                f"num_dense_layers {self.num_dense_layers} > num_hidden_layers {self.num_hidden_layers}",
            ),
            (self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for rotary embeddings"),
        ]
        for holds, message in checks:
            if not holds:
                raise ValueError(message)
        return self

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(range(self.num_dense_layers, self.num_hidden_layers))

    @cached_property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size


class OptimConfig(Frozen):
    """Muon for hidden matrices, AdamW for embeddings, head, norms and router gates; per-stage learning-rate schedule.

    Momentum, weight decay, betas and clip are not published for Trinity: these are the usual ones (docs/training.md).
    """

    matrices: Literal["muon", "adamw"] = Field(
        default="muon", description="who updates hidden matrices, experts included"
    )
    muon_lr: float = Field(default=1e-3, gt=0)
    adamw_lr: float = Field(default=3e-4, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_nesterov: bool = False
    muon_steps: int = Field(default=5, ge=1)
    weight_decay: float = Field(default=0.01, ge=0)
    adamw_betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    adamw_eps: float = 1e-8
    grad_clip: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    decay: Literal["linear", "cosine", "none"] = "linear"
    decay_start: int | None = Field(default=None, description="first step of the decay; default: right after warmup")
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    bias_update: Literal["smebu", "sign", "none"] = "smebu"
    smebu_lambda: float = 5e-4
    smebu_beta: float = 0.5
    smebu_kappa: float = 2.0
    sign_gamma: float = 1e-3
    z_loss: float = Field(default=1e-6, ge=0)
    balance_loss: float = Field(default=1e-4, ge=0)


class DataConfig(Frozen):
    """Where text comes from. `train` and `val` take files, folders and globs of .txt/.py/.md…, .jsonl and .parquet;
    the word `stdlib` stands for the source files of Python's standard library."""

    train: tuple[str, ...] = ("stdlib",)
    val: tuple[str, ...] = ()
    val_fraction: float = Field(default=0.02, ge=0, lt=0.5, description="of documents, held out when `val` is empty")
    text_field: str = "text"
    tokenizer: str | None = Field(
        default=None, description="a tokenizer.json or a checkpoint folder; default: train one"
    )
    intra_document_mask: bool = True
    max_documents: int | None = Field(default=None, ge=1)

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class TrainConfig(Frozen):
    out_dir: str = "runs/train"
    steps: int = Field(default=1000, ge=1)
    seq_len: int = Field(default=256, ge=2)
    global_batch_size: int = Field(default=16, ge=1, description="sequences in one optimizer step, over all workers")
    micro_batch_size: int = Field(default=8, ge=1, description="sequences in one forward pass of one worker")
    num_in_flight: int = Field(
        default=1,
        ge=1,
        description="micro-batches side by side: one goes on while another's rows are with their experts",
    )
    num_workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="go on with so few when nodes leave, and with up to num_workers when they come; default: num_workers",
    )
    num_gpus_per_worker: float = Field(default=0, ge=0)
    num_threads_per_worker: int = Field(
        default=0,
        ge=0,
        description="0: the node's cores, shared out among its workers; shards compute while these wait",
    )
    seed: int = 0
    eval_every: int = Field(default=100, ge=0, description="steps; 0: only at the end")
    eval_sequences: int = Field(default=32, ge=0)
    save_every: int = Field(default=0, ge=0, description="steps; 0: only at the end")
    keep_checkpoints: int = Field(default=2, ge=1, description="so many of the newest; older ones are deleted")
    keep_every: int = Field(default=0, ge=0, description="steps; checkpoints at multiples of it are kept for good")
    init_from: str | None = Field(default=None, description="checkpoint whose weights start this run (fine-tuning)")
    resume: bool = Field(default=False, description="go on from the newest checkpoint in out_dir")
    resume_from: int | str | None = Field(
        default=None,
        description="go on from this step of out_dir, or from a checkpoint folder; later ones are moved aside",
    )
    runaway_nats: float = Field(
        default=1.0, gt=0, description="a step whose loss is so far above the usual makes a version that is not served"
    )
    max_failures: int = Field(default=3, ge=-1, description="restarts of the worker group that Ray Train may make")

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.fewest_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        per_pass = self.micro_batch_size * self.num_workers
        if self.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size x num_workers = {per_pass}"
            )
        return self

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def num_micro(self) -> int:
        """Micro-batches that each of `num_workers` runs in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_workers)


class Config(Frozen):
    """Everything. `Config.load("run.yaml", ["--train.steps", "20"])`."""

    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    placement: PlacementConfig = PlacementConfig()
    engine: EngineConfig = EngineConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def load(cls, path: str | Path | None = None, flags: Sequence[str] = (), **base: Any) -> "Config":
        """Merge `base` < the YAML file < flags like `--train.steps 20`. Raises ConfigError that names key and remedy."""
        return cls.from_tree(merged(path, flags, **base))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Config":
        """Validate a plain nested mapping; `model` may be a preset's name or a mapping with `preset`."""
        _refuse_unknown(cls, tree)
        tree = _expand_preset(dict(tree))
        if found := {name: key for name, key in (("api_key", api_key()), ("admin_key", admin_key())) if key}:
            tree["serve"] = {**found, **tree.get("serve", {})}
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("; ".join(_sentence(e) for e in error.errors())) from None

    def replace(self, **sections: Mapping[str, Any]) -> "Config":
        """A copy with some fields of some sections changed, validated again: `cfg.replace(train={"steps": 5})`."""
        tree = self.model_dump()
        return type(self).from_tree(merge(tree, sections))


def api_key() -> str | None:
    """The key from the environment, for servers and clients."""
    return os.environ.get("TRINITY_API_KEY")


def admin_key() -> str | None:
    """The operators' key from the environment, for servers and clients."""
    return os.environ.get("TRINITY_ADMIN_KEY")


def preset(name: str) -> ModelConfig:
    """The architecture of a preset: tiny, nano, mini or large."""
    return Config.from_tree({"model": name}).model


# OpenMP's threads spin at the end of each parallel region. With fewer cores than threads (a trainer, shards and an engine on
# one small machine) each then burns the time slice of the one it waits for: an expert layer took 1,400 ms instead of 23.
THREADS = {"GOMP_SPINCOUNT": "1000"}


def ray_node_pid() -> int:
    """The process of the Ray node that started this worker process."""
    return int(os.environ["RAY_RAYLET_PID"])


def num_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def setup_threads() -> None:
    """Before `import torch`: threads that wait soon sleep, unless the environment says otherwise."""
    for key, value in THREADS.items():
        os.environ.setdefault(key, value)


def setup_environment(auth: str, is_local: bool = True) -> None:
    """Variables that Ray's processes must see before `import ray`; sets those that are missing.

    A local cluster gets a token of its own, which only its processes inherit and no file keeps.
    """
    wanted = {
        **THREADS,
        "RAY_worker_niceness": "0",  # Ray's 15 lets the driver's own threads starve a shard that it waits for
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that asks while its process ends would start another Ray
        "RAY_AUTH_MODE": auth,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "OMP_NUM_THREADS": "1",
    }
    if auth == "token" and is_local:
        wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for key, value in wanted.items():
        os.environ.setdefault(key, value)


def merged(path: str | Path | None = None, flags: Sequence[str] = (), **base: Any) -> dict[str, Any]:
    """The plain tree `base` < the YAML file < flags, not yet checked."""
    return merge(merge(base, read_yaml(path) if path else {}), parse_flags(flags))


def _expand_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace `model: name` (or a mapping with `preset`) by the preset's values; its other sections become defaults."""
    model = tree.get("model")
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, Mapping) or "preset" not in model:
        return tree
    name = model["preset"]
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(preset_names())}")
    own = {key: value for key, value in model.items() if key != "preset"}
    return merge(read_yaml(PRESETS / f"{name}.yaml"), {**tree, "model": own})


def _refuse_unknown(kind: type[BaseModel], tree: Mapping[str, Any], prefix: str = "") -> None:
    """Name the nearest known key for each unknown one (pydantic alone would only say that it is extra)."""
    for key, value in tree.items():
        if prefix == "model." and key == "preset":
            continue
        if key not in kind.model_fields:
            near = difflib.get_close_matches(str(key), kind.model_fields, n=1, cutoff=0.6)
            near = ([] if prefix else _elsewhere(str(key))) or [prefix + name for name in near]
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kind.model_fields)}"
            raise ConfigError(f"unknown setting {prefix + str(key)!r}; {hint}")
        annotation = kind.model_fields[key].annotation
        inner = _section(annotation)
        if inner is not None and not isinstance(value, Mapping | str | None):
            raise ConfigError(f"{prefix}{key} is a section of settings, not {value!r}")
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(inner, value, f"{prefix}{key}.")
        if isinstance(value, bool) and inner is None and bool not in (annotation, *typing.get_args(annotation)):
            raise ConfigError(f"{prefix}{key} needs a value, such as {kind.model_fields[key].default!r}")


def _elsewhere(key: str) -> list[str]:
    """The dotted name of a setting that lives in some section, for keys given at the top level."""
    sections = {name: _section(field.annotation) for name, field in Config.model_fields.items()}
    return [f"{name}.{key}" for name, kind in sections.items() if kind and key in kind.model_fields][:1]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "config"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    got = (
        f" (got {value!r})" if isinstance(value, str | int | float | bool | None) and not where.endswith("_key") else ""
    )
    return f"{where}: {message}{got}"
