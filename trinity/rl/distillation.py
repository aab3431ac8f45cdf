"""Distillation of a teacher on text or chats: the student learns what else could have followed, not only what did.

Legend: B = 1 or more sequences of S tokens, T = B S, K most likely tokens of the teacher, C tokens of a chunk, V vocabulary.
The loss of a token is sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest): the forward divergence over the teacher's K most
likely tokens and one bucket for all others, so that it is a divergence whatever K is; plus `distill.ce` times the usual
cross-entropy.
Decisions: the teacher is a checkpoint with the same tokenizer, held in each worker; it scores a micro-batch when that is next,
as it lies, in one pass. Validation is the student's own cross-entropy.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trinity.config import Config
from trinity.data.dataset import IGNORE, Batch
from trinity.errors import ConfigError
from trinity.models.common.decoder import Output
from trinity.models.common.layers import product
from trinity.rl.judges import frozen
from trinity.train.loss import CHUNK, Losses, Objective, Whole, in_chunks, packed_inputs
from trinity.train.trainer import Trainer

LEAST = 1e-6  # of a bucket's probability, in logarithms


class TaughtBatch(NamedTuple):
    """A batch, and the teacher's most likely tokens in the place of each target."""

    ids_BS: Tensor
    targets_BS: Tensor
    docs_BS: Tensor
    top_ids_TK: Tensor
    top_logprobs_TK: Tensor

    @property
    def num_trained(self) -> int:
        return int((self.targets_BS != IGNORE).sum())


def divergence(logprobs_CV: Tensor, top_ids_CK: Tensor, top_logprobs_CK: Tensor) -> Tensor:
    """float32 [C]: of the student's distribution from the teacher's, in nats."""
    q_CK, p_CK = logprobs_CV.gather(1, top_ids_CK), top_logprobs_CK.exp()
    p_rest_C = (1 - p_CK.sum(1)).clamp_min(0)
    q_rest_C = (1 - q_CK.exp().sum(1)).clamp_min(LEAST)
    rest_C = p_rest_C * (p_rest_C.clamp_min(LEAST).log() - q_rest_C.log())
    return (p_CK * (top_logprobs_CK - q_CK)).sum(1) + rest_C


class DistillationObjective(Objective):
    """Objective of batches without a teacher, and of taught ones: `ce` of these is the divergence, with `distill.ce`."""

    measures = ("teacher_divergence",)

    def _losses(self, head_VD: Tensor, batch: Any, out: Output, whole: Whole) -> Losses:
        found = super()._losses(head_VD, batch, out, whole)
        if not isinstance(batch, TaughtBatch):
            return found
        kept_T = batch.targets_BS.flatten() != IGNORE
        columns = out.hidden_TD[kept_T], batch.top_ids_TK[kept_T], batch.top_logprobs_TK[kept_T]
        parts = in_chunks(_divergences, head_VD, columns, self.config.model.batch_invariant)
        total = torch.cat(parts).sum() if len(columns[0]) else found.ce * 0
        told = torch.stack([total, kept_T.sum().to(total.dtype)])[None].detach().float()
        loss = total / whole.num_tokens + self.config.distill.ce * found.ce
        return found._replace(ce=loss, mean=total.detach() / kept_T.sum().clamp_min(1), measures=told)


def _divergences(head_VD: Tensor, hidden_CD: Tensor, ids_CK: Tensor, logprobs_CK: Tensor, is_exact: bool) -> Tensor:
    return divergence(product(hidden_CD, head_VD, is_exact).float().log_softmax(-1), ids_CK, logprobs_CK)


class DistillationTrainer(Trainer):
    """A Trainer whose micro-batches come with what `distill.teacher` says of them."""

    def new_objective(self) -> nn.Module:
        return DistillationObjective(self.model, self.config)

    def start(self) -> None:
        """Get the weights, and the teacher. Raises ConfigError for one with another tokenizer."""
        assert self.config.distill.teacher is not None
        self.teacher = frozen(self.config.distill.teacher, self.config.engine, str(self.device))
        if self.teacher.llm.tokenizer.to_json() != self.data.tokenizer.to_json():
            raise ConfigError(
                f"distill.teacher {self.config.distill.teacher} has another tokenizer; a teacher shares it"
            )
        super().start()

    def _next_batch(self, micro: int) -> Any:
        return self.taught(super()._next_batch(micro))

    @torch.no_grad()
    def taught(self, batch: Batch) -> TaughtBatch:
        """The batch with the teacher's scores, on its device."""
        weights = self.teacher.llm.weights
        model, batch = weights.model(weights.newest()), self.micro_batches.on_device(batch)
        docs_BS = batch.docs_BS if self.config.data.intra_document_mask or self.config.data.is_flat else None
        hidden_TD = model(*packed_inputs(model.config, batch.ids_BS, docs_BS)).hidden_TD
        best = [
            model.logits(h_CD).float().log_softmax(-1).topk(self.config.distill.top_k)
            for h_CD in hidden_TD.split(CHUNK)
        ]
        return TaughtBatch(*batch, torch.cat([b.indices for b in best]), torch.cat([b.values for b in best]))


def check(config: Config) -> None:
    """Raise ConfigError for settings that no step could be taken with."""
    if config.data.format not in ("text", "chats"):
        raise ConfigError(
            f"distill.teacher teaches text and chats, not data.format {config.data.format}; rl.teacher judges answers"
        )
    if config.distill.top_k > config.model.vocab_size:
        raise ConfigError(
            f"distill.top_k is {config.distill.top_k}; the vocabulary has {config.model.vocab_size} tokens"
        )
