"""A trainer that learns from answers which are preferred, wanted or not: those of its data, or pairs of a program."""

from collections.abc import Sequence

from torch import nn

from trinity.config import Config
from trinity.data.answers import PackedAnswers
from trinity.data.dataset import Batch
from trinity.errors import ConfigError, InvalidRequest
from trinity.observability.train_log import StepMetrics
from trinity.rl.preferences import AnswerObjective, LabelObjective, Pair, PairObjective, pair_batch
from trinity.rl.reference import reference_scores
from trinity.train.microbatches import plain
from trinity.train.trainer import Trainer


def check(config: Config) -> None:
    """Raise ConfigError for settings that say nothing together."""
    if config.data.format == "labels" and not config.preferences.reference:
        raise ConfigError("labels are learned against a reference: leave preferences.reference true, or give pairs")


class PreferenceTrainer(Trainer):
    """A Trainer whose `step` takes the answers of its data (data.format pairs or labels), and whose `prefer` takes pairs: in
    a step train.global_batch_size of either."""

    def new_objective(self) -> nn.Module:
        kind = LabelObjective if self.config.data.format == "labels" else PairObjective
        return kind(self.model, self.config)

    def start(self) -> None:
        """Get the weights, and the reference scores of the data's answers."""
        super().start()
        for part in (self.data.train, self.data.val):
            if isinstance(part, PackedAnswers) and self.config.preferences.reference:
                part.reference_N2 = reference_scores(self, part)

    def referenced(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with the scores that the present weights give them: to be asked before the first step."""
        self.dispatcher.use(self.version)
        found, objective = list[Pair](), plain(self.objective)
        assert isinstance(objective, AnswerObjective)
        for start in range(0, len(pairs), self.config.train.micro_batch_size):
            part = pairs[start : start + self.config.train.micro_batch_size]
            batch = self.micro_batches.on_device(pair_batch(part))
            scores_P2 = objective.scores(Batch(*batch[:3])).view(-1, 2)
            found += [pair._replace(reference=(c, r)) for pair, (c, r) in zip(part, scores_P2.tolist(), strict=True)]
        return found

    def prefer(self, pairs: Sequence[Pair]) -> StepMetrics:
        """One optimizer step on this worker's pairs, which have their reference scores; `loss` is DPO's.

        Raises InvalidRequest unless there are global_batch_size / num_workers of them."""
        settings, wanted = self.config.train, self.sequences.num // self.comm.world
        if len(pairs) != wanted or any(pair.reference is None for pair in pairs):
            raise InvalidRequest(
                f"{len(pairs)} pairs for a step of {wanted} (train.global_batch_size / train.num_workers); give as many, each "
                "with its reference scores (`referenced`)",
                param="pairs",
            )
        starts = range(0, wanted, settings.micro_batch_size)
        batches = [pair_batch(pairs[at : at + settings.micro_batch_size]) for at in starts]
        return self.step(batches.__getitem__)
