"""Requests: what a caller asks for, what the engine keeps about it, and what comes back.

Host code, without torch. A sequence's state is named counts, not flags: `token_ids` grows, `num_computed` says how many
of them have their keys and values in the cache. Everything else (prefilling, decoding, preempted) follows from these.
Decision: text is a function of the tokens alone, so what a request gets does not depend on batching or preemption.
"""

import math
import secrets
import time
from collections.abc import Collection
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, InstanceOf, ValidationError, ValidationInfo, field_serializer, field_validator

from trinity.config import ANYBODY, Client, Frozen
from trinity.engine.block_table import NO_TIPS, Tips
from trinity.errors import InvalidRequest, PromptTooLong, TrinityError
from trinity.text.detokenizer import TextStream
from trinity.text.grammar.constraint import Constraint
from trinity.utils.lines import named

if TYPE_CHECKING:
    from trinity.text.grammar.progress import Progress

if TYPE_CHECKING:
    from trinity.engine.prompt_logprobs import PromptLogprobs
    from trinity.engine.token_rules import TokenRules
    from trinity.models.common.adapted import BackboneAdapter

FinishReason = Literal["stop", "length", "abort", "error"]
VersionPolicy = Literal["live", "pinned"]
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 128
MAX_LISTED_TOKENS = 1024  # logit_bias, allowed_token_ids
MAX_BAD_WORDS, MAX_BAD_CHARS = 1000, 1000
MAX_N = 128
MAX_SALT_CHARS = 1024
INT64 = 1 << 63
GREEDY_BELOW = 1e-5  # a temperature under this is greedy decoding: logits / T would overflow


class SamplingParams(Frozen, strict=True):
    """Options of how to continue a prompt. Every bound is checked here, types strictly ("1", true and NaN are refused).

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch that filter off. The order is vLLM's: penalties and
    bias, temperature, min_p, top_k, top_p. `seed` makes a request reproducible on any engine. `logprobs` asks for the
    log-probability of each token and of that many most likely ones, before any of the above; `prompt_logprobs` for the same of
    the prompt's tokens. With max_tokens 0 nothing is generated: the answer is about the prompt. `version_policy`: weights that
    change while the request runs are taken up at once ("live") or not at all ("pinned": those of its first pass, to its end).
    `trace` records what a trainer replays (trinity/rl/): the experts of each token, and with `logprobs` how likely the
    draw was after all of the above.
    Until there are `min_tokens`, neither the end of text nor a stop token can be drawn; stop strings end a text at any time.
    `bad_words` can never be completed, `allowed_token_ids` are the only ones that can be drawn (trinity/engine/token_rules.py).
    `truncate_prompt_tokens` keeps the last so many tokens of a prompt; -1: those that leave room for `max_tokens`.
    After `thinking_token_budget` tokens of reasoning </think> comes; a model without that token does not think.
    `n` continuations are drawn, each with a seed of its own, or `best_of`, of which the n most likely by token are the answer
    (trinity/engine/samples.py). `priority`: lower is earlier, strictly: in the engine's queue, where less urgent ones give way,
    in its passes, and in the shards' queues.
    `structured_outputs` is a grammar that the answer follows: {"json": a JSON Schema}, {"regex": ...}, {"choice": [...]},
    {"grammar": in Lark's notation} or {"json_object": True}; text is cut only by max_tokens and stop strings, and ends when no
    more can follow.
    `cache_salt`: only requests of the same client with the same text see that the beginning of this one is cached.
    """

    max_tokens: int = Field(default=16, ge=0, le=1 << 31)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_k: int = Field(default=0, ge=0, le=1 << 31)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Annotated[tuple[str, ...], Field(fail_fast=True)] = Field(default=(), max_length=MAX_STOP_STRINGS)
    stop_token_ids: Annotated[tuple[int, ...], Field(fail_fast=True)] = Field(default=(), max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=1 << 31)
    bad_words: Annotated[tuple[str, ...], Field(fail_fast=True)] = Field(default=(), max_length=MAX_BAD_WORDS)
    allowed_token_ids: Annotated[tuple[int, ...], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, max_length=MAX_LISTED_TOKENS
    )
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=1 << 31)
    thinking_token_budget: int | None = Field(default=None, ge=0, le=1 << 31)
    n: int = Field(default=1, ge=1, le=MAX_N)
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)
    priority: int = Field(default=0, ge=-INT64, lt=INT64)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    trace: bool = False
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    version_policy: VersionPolicy = "live"
    structured_outputs: InstanceOf[Constraint] | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_SALT_CHARS)

    @field_validator("structured_outputs", mode="before")
    @classmethod
    def _to_constraint(cls, value: Any) -> Any:
        return Constraint.of(value) if isinstance(value, dict) else value

    @field_serializer("structured_outputs")
    def _constraint_tree(self, value: Constraint | None) -> dict[str, Any] | None:
        return None if value is None else value.tree()

    @field_validator("stop", "stop_token_ids", "bad_words", "allowed_token_ids", mode="before")
    @classmethod
    def _to_tuple(cls, value: Any) -> Any:
        """One stop string may come alone; lists are what JSON has."""
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        """Refuse too many before any is looked at."""
        if isinstance(value, dict) and len(value) > MAX_LISTED_TOKENS:
            raise ValueError(f"{len(value)} biases; up to {MAX_LISTED_TOKENS} are taken")
        return value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise ValueError(f"a stop string has {len(text)} characters; 1 to {MAX_STOP_CHARS} are taken")
        return value

    @field_validator("bad_words")
    @classmethod
    def _check_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not 1 <= len(text) <= MAX_BAD_CHARS:
                raise ValueError(f"a bad word has {len(text)} characters; 1 to {MAX_BAD_CHARS} are taken")
            if text.encode("utf-8", "ignore").decode() != text:
                raise ValueError("a bad word has half of a surrogate pair, which is no character")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("0 would leave no prompt; give the number of tokens to keep, or -1 for all that fit")
        return value

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("n", 1):
            raise ValueError(f"the best {info.data['n']} (n) of {value} cannot be chosen; give at least n")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[int, float]) -> dict[int, float]:
        for token_id, bias in value.items():
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise ValueError(f"the bias of token {token_id} is {bias}; -100 to 100 are taken")
        return value

    @classmethod
    def parse(cls, **fields: Any) -> "SamplingParams":
        """Like the constructor, but raises InvalidRequest (with `param`) instead of pydantic's ValidationError."""
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            param = str(first["loc"][0]) if first["loc"] else None
            raise InvalidRequest(f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param) from None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def listed_ids(self) -> dict[str, Collection[int]]:
        """Token ids that it names, by field."""
        allowed = self.allowed_token_ids or ()
        return {"stop_token_ids": self.stop_token_ids, "logit_bias": self.logit_bias, "allowed_token_ids": allowed}

    @property
    def num_drawn(self) -> int:
        """Continuations that are drawn, of which `n` are the answer."""
        return self.best_of or self.n

    @property
    def penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


def check_length(prompt_ids: Collection[int], max_model_len: int) -> None:
    """Raise InvalidRequest for no token, PromptTooLong where none could follow."""
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    if len(prompt_ids) >= max_model_len:
        raise PromptTooLong(
            f"{len(prompt_ids)} prompt tokens; this model takes {max_model_len - 1} and one generated. "
            "Shorten the prompt or serve with a larger engine.max_model_len.",
            param="prompt",
        )


def check_numbers(params: SamplingParams) -> None:
    """Raise InvalidRequest where the least number of tokens is above the most."""
    if params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}; lower it, or raise max_tokens",
            param="min_tokens",
        )


def truncated(prompt_ids: Ids[int], keep: int | None, max_tokens: int, max_model_len: int) -> Ids[int]:
    """The last `keep` tokens (`truncate_prompt_tokens`); -1: those that leave room for `max_tokens`, or for one where these
    would fill the context."""
    if keep == -1:
        keep = max_model_len - (max_tokens if max_tokens < max_model_len else 1)
    return prompt_ids if keep is None else prompt_ids[-keep:]


class TokenLogprobs(NamedTuple):
    """Log-probabilities (natural, of the model's raw distribution) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely (token id, logprob), best first
    drawn: float | None = None  # of the distribution it was drawn from, where the request is traced
    rank: int | None = None  # of a prompt's token: 1 for the most likely


@dataclass(frozen=True)
class Delta:
    """Addition of one step to one request: a token, or several where drafts came true. The last one, and only that, has a
    finish_reason.

    `text` may lag behind `token_ids`: incomplete characters and what may begin a stop string are held back, and come
    with a later Delta. `version` is that of the weights of this step, `first_version` that of the oldest weights behind any
    token so far: from there to here the answer's versions reach. Both are steps, of a `line` (trinity/utils/lines.py).
    `num_cached_tokens`: of the prompt, that were not computed for it. `queue_s`: until it was first in a batch. `cause` is the
    typed error behind `error`.
    The last one of a traced request has `experts_TLK`: those that each token of prompt and answer was sent to in the MoE
    layers, in order (uint8, or int16 from 257 experts on), but for the last token, which no pass has seen.
    The first one of a request with `prompt_logprobs` has them; it may be the last one, too.
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    version: int = 0
    first_version: int = 0
    num_cached_tokens: int = 0
    queue_s: float = field(default=0.0, compare=False)
    experts_TLK: np.ndarray | None = field(default=None, repr=False, compare=False)
    prompt_logprobs: "PromptLogprobs | None" = field(default=None, repr=False, compare=False)
    cause: TrinityError | None = field(default=None, repr=False)
    line: int = 0

    @property
    def weights(self) -> int:
        """The name of its version, by which it is held."""
        return named(self.line, self.version)


@dataclass(eq=False)
class Sequence:
    """A request inside the engine. Owned by the scheduler; `row` is its line in the cache's tables while it runs.

    What is cached was computed with versions from `oldest` to `version`; `pinned` is the version it holds, if it does. All of
    them go by their names (trinity/utils/lines.py).
    `adapter`: what is computed beside the weights for it, and for nobody else in its batch.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    text: TextStream
    client: Client = ANYBODY
    rules: "TokenRules | None" = None
    seed: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    row: int | None = None
    experts: list[np.ndarray] = field(default_factory=list)  # [L, K] of each token, where `params.trace`
    prompt_logprobs: "PromptLogprobs | None" = None  # as far as passes have come
    oldest: int = 0
    version: int = 0
    first_version: int = 0
    pinned: int | None = None
    added_s: float = field(default_factory=time.monotonic)
    queue_s: float | None = None  # until it was first in a batch
    progress: "Progress | None" = None  # in its grammar, where it has one
    num_repeats: int = 0  # passes since its last token that came to nothing for want of a version
    adapter: "BackboneAdapter | None" = None
    held_s: float = 0.0  # so long the version that it was pinned to is held after its end
    until_s: float = math.inf  # time.monotonic() after which nobody waits for it
    root: bytes = b""  # of the keys of its blocks (prefix_keys.py)
    keys: list[bytes] = field(default_factory=list)
    tips: Tips = NO_TIPS  # blocks before which windows are kept for others
    num_cached: int | None = None  # tokens of its prompt that were not computed for it, once it has begun
    awaits: "tuple[Sequence, int] | None" = None  # another one, until it has computed so many tokens

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def priority(self) -> int:
        return self.params.priority

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def experts_TLK(self) -> np.ndarray | None:
        return np.stack(self.experts)[: len(self.token_ids) - 1] if self.experts else None

    @property
    def is_waiting_for_another(self) -> bool:
        if self.awaits is None:
            return False
        other, num_tokens = self.awaits
        return other.row is not None and other.num_computed < num_tokens

    @property
    def is_scored(self) -> bool:
        """Shall the passes of its prompt say how likely the tokens are? Not again once its first Delta has told."""
        return self.params.prompt_logprobs is not None and not self.num_generated

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def admitted(self) -> None:
        """It is in a batch now; only the first time counts."""
        if self.queue_s is None:
            self.queue_s = time.monotonic() - self.added_s

    def computed(self, start: int, end: int, version: int) -> None:
        """A pass of that version has put the tokens [start, end) into the cache."""
        self.num_computed, self.version = end, version
        if start == 0:
            self.oldest = version
        self.first_version = min(self.first_version, self.oldest) if self.num_generated else self.oldest

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens of one sequence in one forward pass: positions [start, start + count), the last of them a draft of what may
    follow its own."""

    sequence: Sequence
    start: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def row(self) -> int:
        assert self.sequence.row is not None, "a scheduled sequence has a row"
        return self.sequence.row

    @property
    def num_own(self) -> int:
        """Tokens that are the sequence's."""
        return self.count - len(self.draft)

    @property
    def own(self) -> "Chunk":
        """The chunk without its draft."""
        return Chunk(self.sequence, self.start, self.num_own) if self.draft else self

    def drafted(self, at: int) -> "Chunk":
        """A token of the draft, alone."""
        return Chunk(self.sequence, self.start + self.num_own + at, 1)

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.token_ids[self.start : self.start + self.num_own], *self.draft]

    @property
    def is_single(self) -> bool:
        """Say whether it is one token, with or without a draft."""
        return self.num_own == 1

    @property
    def is_prefill(self) -> bool:
        """Say whether it is of a prompt, or of what is computed again."""
        return not self.is_single or not self.sequence.num_generated

    @property
    def samples(self) -> bool:
        """Does this pass come to the sequence's last token, so that its logits give the next one?"""
        return self.start + self.num_own == len(self.sequence.token_ids)
