"""Episodes: conversations of the model with an environment, as samples of which some tokens are not the model's.

Legend: N tokens after the prompt.
Decisions: all conversations take a turn, then all that go on the next. Where `rl.max_tokens` or train.seq_len cut an answer or
the environment's word off, a conversation ends as cut off; `rl.max_turns` ends it as it stands. One whose environment fails has
no reward, and is left out of its group.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from trinity.config import Config
from trinity.data.prompts import Prompt, chat_of
from trinity.engine.request import FinishReason, SamplingParams
from trinity.errors import InvalidRequest
from trinity.rl.environment import Environment, Message, Turn
from trinity.rl.rollout import Rollout, Sample
from trinity.rl.turns import between
from trinity.text.answers import AnswerFormat, read
from trinity.text.conversation import Chat
from trinity.text.tokenizer import Tokenizer
from trinity.text.tool_calls.events import answer_of
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
ParamsOf = Callable[[int, int, int], SamplingParams]  # of (number of the conversation, turn, tokens so far)


@dataclass
class Episode:
    """One conversation. `ids` are all its tokens so far; those of `said` are not yet part of a sample."""

    prompt: Prompt
    chat: Chat | None
    ids: list[int]
    answers: list[Sample] = field(default_factory=list)
    said: list[list[int]] = field(default_factory=list)  # before each answer but the first
    messages: list[Message] = field(default_factory=list)
    reward: float | None = None
    is_over: bool = False
    is_cut: bool = False

    def end(self, reward: float | None, is_cut: bool = False) -> None:
        self.is_over, self.reward, self.is_cut = True, reward, is_cut

    def sample(self) -> Sample:
        """All turns as one answer to the prompt."""
        first, last = self.answers[0], self.answers[-1]
        parts = list(zip([[], *self.said], self.answers, strict=True))
        finish: FinishReason = "length" if self.is_cut else last.finish_reason
        return replace(
            last,
            prompt_ids=first.prompt_ids,
            token_ids=tuple(token for said, answer in parts for token in (*said, *answer.token_ids)),
            finish_reason=finish,
            logprobs_N=torch.cat(
                [each for said, answer in parts for each in (torch.zeros(len(said)), answer.logprobs_N)]
            ),
            drawn_N=torch.cat([each for said, answer in parts for each in (torch.zeros(len(said)), answer.drawn_N)]),
            versions=tuple(v for said, answer in parts for v in (*answer.versions[:1] * len(said), *answer.versions)),
            is_own_N=torch.tensor([own for said, answer in parts for own in _own(said, answer)]),
            num_turns=len(self.answers),
            reward=self.reward,
        )


def _own(said: Sequence[int], answer: Sample) -> Iterator[bool]:
    yield from [False] * len(said)
    yield from [True] * len(answer.token_ids)


class Episodes:
    """Plays them, with the environment of the settings."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.settings, self.room, self.tokenizer = config.rl, config.train.seq_len + 1, tokenizer
        self.environment, self.format = Environment(config.rl), AnswerFormat.of(tokenizer)

    def play(self, rollout: Rollout, prompts: Sequence[Prompt], params_of: ParamsOf) -> list[Sample]:
        """A conversation for each prompt, in their order."""
        episodes = [Episode(prompt, chat_of(prompt.row, "the row of a prompt"), [*prompt.ids]) for prompt in prompts]
        for turn in range(self.settings.max_turns):
            going = [(number, each) for number, each in enumerate(episodes) if not each.is_over]
            params = [params_of(number, turn, len(each.ids)) for number, each in going]
            answers = rollout.generate([each.ids for _, each in going], params) if going else []
            for (_, episode), answer in zip(going, answers, strict=True):
                self._note(episode, answer)
            self._go_on([each for _, each in going], is_last=turn + 1 == self.settings.max_turns)
        return [each.sample() for each in episodes]

    def _note(self, episode: Episode, answer: Sample) -> None:
        tools = episode.chat.tools if episode.chat else ()
        parser = self.format.parser(episode.ids, tools)
        told = answer_of(read(parser, answer.token_ids, answer.text, is_last=True))
        calls = [
            {"id": f"call_{at}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for at, call in enumerate(told.calls)
        ]
        more = {name: value for name, value in (("reasoning", told.reasoning), ("tool_calls", calls)) if value}
        episode.messages.append({"role": "assistant", "content": told.text, **more})
        episode.answers.append(answer)
        episode.ids += answer.token_ids

    def _go_on(self, episodes: Sequence[Episode], is_last: bool) -> None:
        turns = self.environment.turns([(each.messages, each.prompt.row) for each in episodes])
        failed = Counter[str]()
        for episode, turn in zip(episodes, turns, strict=True):
            error = tried(partial(self._next, episode, turn, is_last), InvalidRequest)
            if isinstance(error, InvalidRequest):
                failed[error.message] += 1
                episode.end(None)
        for why, num in failed.items():
            log.warning("%d of %d conversations have no reward and are left out: %s", num, len(episodes), why)

    def _next(self, episode: Episode, turn: Turn | None, is_last: bool) -> None:
        is_cut = episode.answers[-1].finish_reason == "length"
        if turn is None or not turn.messages or is_last or is_cut:
            return episode.end(turn and turn.reward, is_cut)
        ids = between(self.tokenizer, episode.chat, turn.messages)
        if len(episode.ids) + len(ids) >= self.room:
            return episode.end(turn.reward, is_cut=True)
        episode.messages += turn.messages
        episode.said.append(ids)
        episode.ids += ids
