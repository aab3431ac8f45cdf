"""The settings of training: optimizer, data, and the loop."""

import math
import typing
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trinity.config.ramp import RampPart, Sequences, said, sequences_before
from trinity.config.sources import LengthBias, Packing, SourceConfig, TrainOn
from trinity.config.yaml import Frozen, at_home

RUN_SETTINGS, RUN_TOKENIZER = "settings.yaml", "tokenizer"  # in train.out_dir: what an engine of the run needs
Momentum = Annotated[float, Field(ge=0, lt=1)]
Target = Literal["attention", "dense", "shared", "experts"]
Role = Literal["embedding", "head", "norm", "router", Target]  # what a tensor is for; experts: the routed ones


class LoraConfig(Frozen):
    """Adapters of low rank (arXiv 2106.09685): with them nothing else is trained."""

    rank: int = Field(
        default=0, ge=0, le=4096, description="of the adapters that are trained in place of weights; 0: none"
    )
    alpha: float = Field(default=16.0, gt=0, description="an adapter's share is alpha / rank")
    targets: tuple[Target, ...] = Field(
        default=("attention", "dense", "shared", "experts"),
        min_length=1,
        description="which matrices get one, of those that the model has",
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


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
    skip_above_sigma: float | None = Field(
        default=None,
        gt=0,
        description="skip steps whose loss or gradient norm is so many standard deviations above the usual; default: none",
    )
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
    freeze: tuple[Role, ...] = Field(
        default=(), description="parts that stay bit for bit as they are; router: with its selection bias"
    )
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _check_trained(self) -> "OptimConfig":
        if self.lora.rank and self.freeze:
            raise ValueError("freeze and lora exclude each other: with adapters all other weights stay as they are")
        if set(typing.get_args(Role)) <= {*self.freeze}:
            raise ValueError("freeze names all parts of the model; leave one to be trained")
        return self

    def trains(self, role: str) -> bool:
        """Say whether weights of that role take steps themselves."""
        return not self.lora.rank and role not in self.freeze

    @property
    def trains_experts(self) -> bool:
        """Say whether routed experts have anything that takes steps: weights or adapters."""
        return "experts" in self.lora.targets if self.lora.rank else self.trains("experts")


class DataConfig(Frozen):
    """Sources of text. `train` and `val` take files, folders and globs of .txt/.py/.md…, .jsonl and .parquet;
    the word `stdlib` stands for the source files of Python's standard library. `sources` is a mixture of several, in the
    place of `train`, which is the short form of one."""

    train: tuple[str, ...] = ("stdlib",)
    val: tuple[str, ...] = ()
    sources: tuple[SourceConfig, ...] = Field(default=(), description="a mixture: each with its weight")
    val_fraction: float = Field(default=0.02, ge=0, lt=0.5, description="of documents, held out when `val` is empty")
    format: Literal["text", "chats", "pairs", "labels", "prompts"] = Field(
        default="text",
        description="chats: rows are conversations, and what the assistant says is trained; pairs: of two answers, one is "
        "preferred (DPO); labels: each answer is wanted or not (KTO); prompts: answers are drawn, and judged by rl.rewards",
    )
    train_on: TrainOn = Field(default="answers", description="of each conversation, with format chats")
    packing: Packing = Field(
        default="stream",
        description="of text; rsdb: each sequence from many documents, read on where they were left; best_fit: documents that "
        "fit are whole",
    )
    rsdb_documents: int = Field(
        default=256, ge=1, description="that each sequence of a step has to pick from, at least"
    )
    length_bias: LengthBias | None = Field(
        default=None, description="long documents more often, as when the context is extended; of text"
    )
    text_field: str = "text"
    tokenizer: str | None = Field(
        default=None, description="a tokenizer.json or a checkpoint folder; default: train one"
    )
    intra_document_mask: bool = True
    max_documents: int | None = Field(default=None, ge=1)
    cache: str | None = Field(
        default=None,
        description="tokenised files, shared by runs: a folder, that all nodes see, or an address; default: in train.out_dir",
    )

    _at_home = field_validator("tokenizer", "cache")(at_home)

    @field_validator("train", "val", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _sources_stand_alone(cls, tree: Any) -> Any:
        """Settings with sources have no `train` of their own, not the usual one either."""
        return {"train": (), **tree} if isinstance(tree, Mapping) and tree.get("sources") else tree

    @model_validator(mode="after")
    def _check_sources(self) -> "DataConfig":
        if self.sources and (self.train or self.val):
            raise ValueError("sources stand in the place of train and val; give files to a source of its own")
        if self.sources and not 0 < (total := sum(source.weight for source in self.sources)) < math.inf:
            raise ValueError(
                f"the weights of all sources sum to {total:g}; a sum is above 0 and finite: 1 for each is even"
            )
        label, num = Counter(source.label for source in self.sources).most_common(1)[0] if self.sources else ("", 0)
        if num > 1:
            raise ValueError(f"two sources are called {label!r}; give each a name of its own")
        if self.sources and self.format not in ("text", "chats"):
            raise ValueError(f"sources are mixed of text and chats; for {self.format}, give their files as train")
        if not self.intra_document_mask and self.is_flat:
            raise ValueError("intra_document_mask false goes with text alone, in packing stream or rsdb")
        if any(part.format == "chats" and part.length_bias for part in self.parts):
            raise ValueError("length_bias is of text; chats are packed whole")
        return self

    @property
    def parts(self) -> "tuple[DataConfig, ...]":
        """The settings of each source, as if it were the only one."""
        return tuple(self.model_copy(update={"sources": (), **each.own}) for each in self.sources) or (self,)

    @property
    def described(self) -> str:
        """Words for what is trained on: files, or sources with their shares."""
        total = sum(source.weight for source in self.sources)
        shares = (f"{source.label} ({source.weight / total:.1%}: {', '.join(source.train)})" for source in self.sources)
        return "; ".join(shares) if self.sources else ", ".join(self.train)

    @property
    def is_flat(self) -> bool:
        """Say whether sequences lie end to end in a batch, without padding, because some are shorter than others."""
        return any(part.format == "chats" or part.packing == "best_fit" for part in self.parts)


class TrainConfig(Frozen):
    out_dir: str = "runs/train"
    steps: int = Field(default=1000, ge=1)
    seq_len: int = Field(default=256, ge=2)
    global_batch_size: int = Field(default=16, ge=1, description="sequences in one optimizer step, over all workers")
    batch_ramp: tuple[RampPart, ...] = Field(
        default=(), description="steps that take fewer, before all others take global_batch_size"
    )
    micro_batch_size: int = Field(default=8, ge=1, description="sequences in one forward pass of one worker")
    num_overlapped_microbatches: int = Field(
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
    carry: Literal["weights", "all"] = Field(
        default="weights",
        description="what goes on from init_from; all: optimizer state and the number of the version, too",
    )
    resume: bool = Field(default=False, description="go on from the newest checkpoint in out_dir")
    resume_from: int | str | None = Field(
        default=None,
        description="go on from this step of out_dir, or from a checkpoint folder; later ones are moved aside",
    )
    loss_spike_threshold: float = Field(
        default=1.0, gt=0, description="a step whose loss is so far above the usual makes a version that is not served"
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="worker 0 serves Prometheus metrics there; 0: any free one; default: none",
    )
    metrics_host: str = Field(default="127.0.0.1", description="where it listens; anything but loopback needs a key")
    peak_tflops_per_gpu: float | None = Field(
        default=None, gt=0, description="of a GPU that MFU is measured by; default: dense bf16, by the device's name"
    )
    max_failures: int = Field(default=3, ge=-1, description="restarts of the worker group that Ray Train may make")

    _at_home = field_validator("out_dir", "init_from", "resume_from")(at_home)

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.fewest_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        per_pass, sizes = self.micro_batch_size * self.num_workers, self.batch_sizes
        if uneven := next((size for size in reversed(sizes) if size % per_pass), 0):
            where = "" if uneven == self.global_batch_size else "batch_ramp's "
            raise ValueError(
                f"{where}global_batch_size {uneven} is not a multiple of micro_batch_size x num_workers = {per_pass}"
            )
        if falls := next((f"{one} before {next_}" for one, next_ in pairwise(sizes) if one > next_), ""):
            raise ValueError(
                f"batch_ramp has {falls}; batches grow from part to part, up to global_batch_size {self.global_batch_size}"
            )
        return self

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sequences in a step, of each part of the ramp and after it."""
        return *(part.global_batch_size for part in self.batch_ramp), self.global_batch_size

    @property
    def ramp_words(self) -> str:
        """Words that tell one ramp from another; none without any, or of one that changes nothing."""
        return said(self.batch_ramp, self.global_batch_size)

    def num_sequences(self, steps: int) -> int:
        """Number of sequences that the first `steps` steps take."""
        return sequences_before(steps, self.batch_ramp, self.global_batch_size)

    def num_steps(self, sequences: int) -> int:
        """Number of steps, of the run's, that so many sequences are enough for."""
        return bisect_right(range(1, self.steps + 1), sequences, key=self.num_sequences)

    def sequences_of(self, step: int) -> Sequences:
        """The sequences of a step (0, 1, ...)."""
        first = self.num_sequences(step)
        return Sequences(first, self.num_sequences(step + 1) - first)

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def num_micro(self) -> int:
        """Micro-batches that each of `num_workers` runs in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_workers)
