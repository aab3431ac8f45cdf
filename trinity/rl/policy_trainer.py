"""Policy gradients on the live pool: a trainer that also learns from rollouts and their advantages.

Legend: B = 1 and S of a packed batch, T = S tokens, L MoE layers, K top-k, V vocabulary, D model.
Decisions: the loss is the clipped surrogate of PPO (arXiv 1707.06347) over tokens, -sum w min(r A, clip(r) A), r = p / p_drawn.
On samples of the present version r is 1 and its gradient that of REINFORCE; what makes it GRPO (arXiv 2402.03300) is the
advantage alone, `group_advantages`. Answers are weighted by the token (arXiv 2503.14476): each counts 1 / all of the step's.
A step runs through the Trainer's own: micro-batches, dispatch, two-phase commit, balance of the experts.
With `replay`, tokens go to the experts that the engine chose for them, with weights from the present scores: a tie that
falls the other way in training would move the ratio of a whole sequence (arXiv 2507.18071, 2510.11370).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity.config import Config
from trinity.data.dataset import Batch
from trinity.data.prepare import Prepared
from trinity.errors import InvalidRequest
from trinity.models.common.decoder import CausalLM, Inputs, Output
from trinity.models.common.losses import document_balance_loss
from trinity.models.common.router import Routing
from trinity.observability.train_log import StepMetrics
from trinity.pool.pool import ExpertPool
from trinity.rl.rollout import Sample, packed
from trinity.state.versioned_store import Store
from trinity.train.collectives import Comm
from trinity.train.loss import Losses, Objective, Whole, packed_inputs, target_logprobs
from trinity.train.trainer import Trainer


class PolicyBatch(NamedTuple):
    """Samples end to end, each a document of its own (B = 1), and how much to make each target more likely."""

    ids_BS: Tensor  # int64
    targets_BS: Tensor  # int64
    docs_BS: Tensor  # int64
    weights_BS: Tensor  # float32: the target's advantage / the tokens generated for the step; 0 in prompts
    logprobs_BS: Tensor  # float32: the target's when it was sampled; 0 in prompts
    experts_BSLK: Tensor  # of each input, as the engine chose them

    @property
    def num_trained(self) -> int:
        return int((self.weights_BS != 0).sum())


def group_advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """(r - mean) / std of each run of `group_size` rewards: those of the answers to one prompt. 0 where all are alike."""
    if len(rewards) % group_size:
        raise InvalidRequest(f"{len(rewards)} rewards are no groups of {group_size}", param="rewards")
    groups = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + 1e-6)).flatten().tolist()


class PolicyObjective(Objective):
    """Objective of text batches, and of policy batches besides; `ce` of a policy batch is its surrogate loss."""

    def __init__(self, model: CausalLM, config: Config, clip: float, replay: bool):
        super().__init__(model, config)
        self.clip, self.replay = clip, replay

    def forward(self, batches: Sequence[Any], num_tokens: int, num_sequences: int | None = None) -> list[Losses]:
        old = [batch.experts_BSLK[0] for batch in batches if isinstance(batch, PolicyBatch)]
        with replayed(self.model, old) if old and self.replay else nullcontext():
            return super().forward(batches, num_tokens, num_sequences)

    def _inputs(self, batch: Any) -> Inputs:
        if not isinstance(batch, PolicyBatch):
            return super()._inputs(batch)
        return packed_inputs(self.config.model, batch.ids_BS, batch.docs_BS)

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, whole: Whole) -> Losses:
        if not isinstance(batch, PolicyBatch):  # the weights of one have their share in them
            return super()._losses(head_VD, batch, out, whole)
        logprobs_T = target_logprobs(head_VD, out.hidden_TD, batch.targets_BS[0], self.config.model.batch_invariant)
        loss = surrogate(logprobs_T, batch.logprobs_BS[0], batch.weights_BS[0], self.clip)
        num, coef = int(batch.docs_BS.max()) + 1, self.config.optim.balance_loss
        weights_D = torch.full((num,), 1 / self.config.train.global_batch_size, device=loss.device)
        balance = document_balance_loss(out.routing, self.config.model, batch.docs_BS[0], weights_D, coef)
        return Losses(loss, torch.zeros_like(loss), balance, self._counts(out), loss.detach())


def surrogate(logprobs_T: Tensor, old_T: Tensor, weights_T: Tensor, clip: float) -> Tensor:
    """-sum of min(ratio w, clipped ratio w): no gradient where the ratio has left [1 - clip, 1 + clip] the way w points."""
    ratio_T = (logprobs_T - old_T).where(weights_T != 0, 0).exp()
    return -torch.minimum(ratio_T * weights_T, ratio_T.clamp(1 - clip, 1 + clip) * weights_T).sum()


@contextmanager
def replayed(model: CausalLM, passes: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the routers take their choices from `passes`, experts_TLK of each pass of one `forward_all`, in its order."""
    hooks = []
    for at, router in enumerate(model.routers.values()):
        turns = iter([experts_TLK[:, at].long() for experts_TLK in passes])
        hooks.append(router.register_forward_hook(partial(_chosen_before, turns)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _chosen_before(turns: Iterator[Tensor], router: Any, inputs: tuple[Any, ...], routing: Routing) -> Routing:
    ids_TK = next(turns)
    return routing._replace(ids_TK=ids_TK, weights_TK=router.weights(routing.scores_TE, ids_TK))


class PolicyTrainer(Trainer):
    """A Trainer whose `learn` takes samples where `step` takes text. Both count as steps and make the next version."""

    def __init__(
        self,
        config: Config,
        pool: ExpertPool,
        data: Prepared,
        comm: Comm,
        device: str = "cpu",
        store: Store | None = None,
        *,
        clip: float = 0.2,
        replay: bool = False,
    ):
        objective = partial(PolicyObjective, clip=clip, replay=replay)
        super().__init__(config, pool, data, comm, device, store, objective)

    def learn(self, samples: Sequence[Sample], advantages: Sequence[float]) -> StepMetrics:
        """One optimizer step on this worker's samples, in micro-batches as text is; `loss` is the surrogate's.

        Raises InvalidRequest unless there are global_batch_size / num_workers samples with an advantage each.
        """
        settings = self.config.train
        wanted = settings.global_batch_size // self.comm.world
        if not len(samples) == len(advantages) == wanted:
            raise InvalidRequest(
                f"{len(samples)} samples and {len(advantages)} advantages for a step of {wanted} "
                "(train.global_batch_size / train.num_workers); sample as many, or set it to what you sample"
            )
        num = self.comm.all_reduce(torch.tensor([float(sum(len(sample.token_ids) for sample in samples))]))
        weights = [advantage / float(num) for advantage in advantages]
        micros = range(0, wanted, settings.micro_batch_size)
        cuts = [slice(first, first + settings.micro_batch_size) for first in micros]
        batches = [policy_batch(samples[cut], weights[cut]) for cut in cuts]
        return self.step(batches.__getitem__)


def policy_batch(samples: Sequence[Sample], weights: Sequence[float]) -> PolicyBatch:
    """`weights` of each sample's generated tokens."""
    batch: Batch = packed([(*sample.prompt_ids, *sample.token_ids) for sample in samples])
    prompts = [torch.zeros(len(sample.prompt_ids) - 1) for sample in samples]
    each = zip(prompts, samples, weights, strict=True)
    weights_S = torch.cat([part for zeros, s, w in each for part in (zeros, torch.full_like(s.logprobs_N, w))])
    pairs = zip(prompts, samples, strict=True)
    logprobs_S = torch.cat([part for zeros, sample in pairs for part in (zeros, sample.logprobs_N)])
    experts_SLK = torch.cat([sample.experts_TLK for sample in samples])
    return PolicyBatch(*batch, weights_S[None], logprobs_S[None], experts_SLK[None])
