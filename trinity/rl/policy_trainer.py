"""A trainer that also learns from answers which were drawn from its weights, and how good each of them was.

What makes it GRPO (arXiv 2402.03300) is the advantage alone, `group_advantages`; the loss is in policy.py. A step runs through
the Trainer's own: micro-batches, dispatch, two-phase commit, balance of the experts. With `rl.replay`, tokens go to the experts
that the engine chose for them, with weights from the present scores: a tie that falls the other way in training would move
the ratio of a whole sequence (arXiv 2507.18071, 2510.11370).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trinity.errors import InvalidRequest
from trinity.observability.train_log import StepMetrics
from trinity.rl.policy import SAMPLED, Judged, PolicyObjective, policy_batch
from trinity.rl.rollout import Sample
from trinity.train.trainer import Trainer


def group_advantages(rewards: Sequence[float], group_size: int, scale_by_std: bool = True) -> list[float]:
    """(r - mean) / std of each run of `group_size` rewards: those of the answers to one prompt. 0 where all are alike.
    `scale_by_std` false: r - mean, as arXiv 2503.20783 has it."""
    if len(rewards) % group_size:
        raise InvalidRequest(f"{len(rewards)} rewards are no groups of {group_size}", param="rewards")
    groups = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if not scale_by_std:
        return centred.flatten().tolist()
    return (centred / (groups.std(1, correction=0, keepdim=True) + 1e-6)).flatten().tolist()


class PolicyTrainer(Trainer):
    """A Trainer whose `learn` takes samples where `step` takes text. Both count as steps and make the next version."""

    def new_objective(self) -> nn.Module:
        return PolicyObjective(self.model, self.config)

    def learn(self, samples: Sequence[Sample], advantages: Sequence[float]) -> StepMetrics:
        """One optimizer step on this worker's samples, in micro-batches as text is; `loss` is the surrogate's.

        Raises InvalidRequest unless there are global_batch_size / num_workers samples with an advantage each.
        """
        wanted = self.sequences.num // self.comm.world
        if not len(samples) == len(advantages) == wanted:
            raise InvalidRequest(
                f"{len(samples)} samples and {len(advantages)} advantages for a step of {wanted} "
                "(train.global_batch_size / train.num_workers); sample as many, or set it to what you sample"
            )
        return self.learn_from([Judged(*pair) for pair in zip(samples, advantages, strict=True)])

    def learn_from(self, judged: Sequence[Judged], told_M2: Tensor | None = None) -> StepMetrics:
        """The same, of samples of which some may not count; `told_M2`: sums and numbers of SAMPLED over these samples."""
        size = self.config.train.micro_batch_size
        told = [told_M2 if told_M2 is not None else torch.zeros(len(SAMPLED), 2)]
        starts = range(0, len(judged), size)
        told += [torch.zeros(len(SAMPLED), 2)] * (len(starts) - 1)
        batches = [policy_batch(judged[at : at + size], each) for at, each in zip(starts, told, strict=True)]
        return self.step(batches.__getitem__)
