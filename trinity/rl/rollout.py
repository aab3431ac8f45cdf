"""Rollouts: answers of live weights with all that reinforcement learning needs, and log-probabilities for distillation.

Legend: N generated tokens, T tokens of prompt and answer without the last (which no pass sees), C candidates, V vocabulary,
L MoE layers, K top-k, B = 1 and S of a packed batch.
Decisions: the engine is the server's, so rollouts batch, page and preempt as a server does. `Rollout.following(trainer)`
computes with the trainer's own weights and the same shards: what a step commits is what the next pass uses, and every
token says of which version it is. Several sequences of a scoring pass lie end to end, each a document of its own, as in
training, so that no padding meets a router.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trinity.config import EngineConfig
from trinity.data.dataset import Batch
from trinity.engine.engine import Engine
from trinity.engine.request import FinishReason, SamplingParams
from trinity.engine.runner import chosen
from trinity.errors import InvalidRequest, VersionGone
from trinity.llm import LLM, Completion, Params
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import build
from trinity.train.backbone import load_values
from trinity.train.loss import CHUNK, packed_inputs

if TYPE_CHECKING:
    from trinity.train.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Sample:
    """One answer, and what a trainer needs of it. Log-probabilities are natural; the tensors are the receiver's own."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason  # "stop" or "length"
    logprobs_N: Tensor  # float32, of the model's raw distribution
    drawn_N: Tensor  # float32, of the distribution each token was drawn from: after penalties, temperature and filters
    versions: tuple[int, ...]  # of the weights that gave each token
    experts_TLK: Tensor  # uint8, or int16 from 257 experts on: where each token went in each MoE layer
    is_own_N: Tensor | None = None  # bool: whether the model drew the token, of a conversation with an environment
    num_turns: int = 1
    reward: float | None = None  # an environment's

    @property
    def num_own(self) -> int:
        """Tokens that the model drew."""
        return len(self.token_ids) if self.is_own_N is None else int(self.is_own_N.sum())


@dataclass(frozen=True, eq=False)
class Score:
    """Scores of given tokens by the weights of `version`: all but the first, each in the light of those before it."""

    token_ids: tuple[int, ...]
    version: int
    logprobs_T: Tensor  # float32, of token_ids[1:]
    top_ids_TC: Tensor  # int64, the most likely in the same places, best first
    top_logprobs_TC: Tensor
    experts_TLK: Tensor


class Rollout:
    """`Rollout.following(trainer)` for weights that train in this process, `Rollout(LLM(path))` for a checkpoint's, and
    `Rollout(LLM(path, experts=pool.dispatcher(version)))` for those that live in a connected pool. Not thread-safe."""

    def __init__(self, llm: LLM):
        self.llm = llm

    @classmethod
    def following(cls, trainer: "Trainer", engine: EngineConfig | None = None) -> "Rollout":
        """Make one of a trainer that has started. Between two steps, this samples from what the last one committed."""
        live, config = TrainerWeights(trainer), trainer.config
        return cls(LLM.over(Engine(live, config.model, engine or config.engine, trainer.data.tokenizer), live))

    @property
    def version(self) -> int:
        """Version of the weights that the next pass will use."""
        return self.llm.weights.newest()

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], params: Params = None, num_samples: int = 1
    ) -> list[Sample]:
        """`num_samples` answers to each prompt, side by side, in the order of the prompts. Raises as LLM.generate does.

        A seed in `params` is that of a prompt's first answer; the others count on from it.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else params
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one, or one each")
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        traced = [_traced(one, i) for one in each for i in range(num_samples)]
        return [_sample(done) for done in self.llm.generate(repeated, traced)]  # type: ignore[arg-type]

    def score(self, sequences: Sequence[Sequence[int]], top: int = 0) -> list[Score]:
        """Log-probabilities of given tokens (at least two in each sequence), and of the `top` most likely in each place.

        The numbers are those that the trainer would compute. Raises InvalidRequest or PromptTooLong before it begins.
        """
        engine, version = self.llm.engine, self.version
        vocab, limit = engine.config.vocab_size, engine.settings.max_num_batched_tokens
        if not 0 <= top <= vocab:
            raise InvalidRequest(f"top is {top}; 0 to {vocab} are taken", param="top")
        for ids in sequences:
            for part in (ids[:-1], ids[-1:]):
                engine.validate(part, SamplingParams())
        return [score for group in in_groups(sequences, limit) for score in self._scores(group, top, version)]

    @torch.inference_mode()
    def _scores(self, sequences: list[tuple[int, ...]], top: int, version: int) -> list[Score]:
        model = self.llm.weights.model(version)
        batch = Batch(*(tensor.to(model.lm_head.weight.device) for tensor in packed(sequences)))
        out = model(*packed_inputs(model.config, batch.ids_BS, batch.docs_BS))
        cut = zip(out.hidden_TD.split(CHUNK), batch.targets_BS[0].split(CHUNK), strict=True)
        found = [_likelihoods(model.logits(hidden_CD), targets_C, top) for hidden_CD, targets_C in cut]
        columns = [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]
        columns.append(torch.from_numpy(chosen([out], model.config.num_experts)))
        lengths = [len(ids) - 1 for ids in sequences]
        rows = zip(*([part.clone() for part in column.split(lengths)] for column in columns), strict=True)
        return [Score(ids, version, *row) for ids, row in zip(sequences, rows, strict=True)]


class _Unheld:
    """A WeightSource's verbs about versions that are held, for one that has a single version at a time."""

    def hold(self, version: int) -> None:
        """Nothing: there is one version."""

    def release(self, version: int) -> None:
        """Nothing, either."""

    def quarantine(self, version: int) -> None:
        """Nothing: there is no other version."""


class TrainerWeights(_Unheld):
    """A WeightSource: what a trainer in this process has committed last, with a dispatcher of its own.

    The trainer's backbone is fp32. A model of that type shares its tensors; another gets a copy in its own type, made
    anew for each version, which is what the trainer's objective computes with, too. Only the newest version is ever here.
    """

    def __init__(self, trainer: "Trainer"):
        self._trainer, config = trainer, trainer.config.model
        self._experts = trainer.pool.dispatcher(trainer.version)
        self._copied: int | None = None
        self._is_shared = config.dtype == "float32"
        shared = trainer.model.with_experts(self._experts)
        self._model = shared if self._is_shared else build(config, self._experts, device=trainer.device)

    def newest(self) -> int:
        return self._trainer.version

    def model(self, version: int) -> CausalLM:
        if version != self._trainer.version:
            raise VersionGone(f"version {version} has been trained on: it is {self._trainer.version} now")
        self._experts.version = version
        if not self._is_shared and version != self._copied:
            load_values(self._model, self._trainer.backbone.store.current)
            self._copied = version
        return self._model


class PinnedWeights(_Unheld):
    """A WeightSource beside a trainer that goes on: a version that it keeps, in a model and with a dispatcher of its own.

    For one thread, which says by `aim` which version that is; whoever keeps the version sees to it that it stays."""

    def __init__(self, trainer: "Trainer"):
        self._store = trainer.backbone.store
        self._experts = trainer.pool.dispatcher(trainer.version)
        self._model = build(trainer.config.model, self._experts, device=trainer.device).eval()
        self._version, self._loaded = trainer.version, -1

    def has(self, version: int) -> bool:
        """Say whether the trainer keeps it."""
        return version in self._store.versions

    def aim(self, version: int) -> None:
        """Compute with that version from now on."""
        self._version = version

    def newest(self) -> int:
        return self._version

    def model(self, version: int) -> CausalLM:
        if version != self._loaded:
            load_values(self._model, self._store.get(version))
            self._loaded = version
        self._experts.version = version
        return self._model


def packed(sequences: Sequence[Sequence[int]]) -> Batch:
    """The sequences end to end as one of S = sum(length - 1) inputs, each a document of its own."""
    inputs = [token for ids in sequences for token in ids[:-1]]
    targets = [token for ids in sequences for token in ids[1:]]
    docs = [i for i, ids in enumerate(sequences) for _ in ids[1:]]
    return Batch(*(torch.tensor([row], dtype=torch.int64) for row in (inputs, targets, docs)))


def in_groups(sequences: Sequence[Sequence[int]], limit: int) -> Iterator[list[tuple[int, ...]]]:
    """Runs of sequences, in order, of at most `limit` inputs together, or of one longer sequence."""
    group: list[tuple[int, ...]] = []
    for ids in sequences:
        if group and sum(len(each) - 1 for each in group) + len(ids) - 1 > limit:
            yield group
            group = []
        group.append(tuple(ids))
    if group:
        yield group


def _likelihoods(logits_TV: Tensor, targets_T: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The targets' log-probabilities, and the ids and log-probabilities of the `top` most likely tokens."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    best = logprobs_TV.topk(top)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0], best.indices, best.values


def _traced(params: SamplingParams, nth: int) -> SamplingParams:
    seed = None if params.seed is None else params.seed + nth
    return params.model_copy(update={"trace": True, "logprobs": params.logprobs or 0, "seed": seed})


def _sample(done: Completion) -> Sample:
    assert done.logprobs is not None
    assert done.experts_TLK is not None
    return Sample(
        prompt_ids=done.prompt_token_ids,
        token_ids=done.token_ids,
        text=done.text,
        finish_reason=done.finish_reason,
        logprobs_N=torch.tensor([position.logprob for position in done.logprobs]),
        drawn_N=torch.tensor([position.drawn for position in done.logprobs]),
        versions=done.token_versions,
        experts_TLK=torch.from_numpy(done.experts_TLK),
    )
