"""The engine: continuous batching of many requests over one model. Synchronous, one thread, no network.

Legend: B sequences that get a token in this step, V vocabulary.
Each step is: choose the tokens, run them, sample, and tell every request what it got. A request ends exactly once: by
a Delta of `step` or by the one that `abort` returns. A forward pass that fails (a dead shard, no memory) ends the
requests that were in it and no others.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trinity.config import EngineConfig, ModelConfig
from trinity.engine.kv_cache import KVCache, plan_layout
from trinity.engine.request import Chunk, Delta, FinishReason, SamplingParams, Sequence
from trinity.engine.runner import Runner
from trinity.engine.sampler import Sampled, sample
from trinity.engine.scheduler import Scheduler
from trinity.engine.text import TextStream
from trinity.errors import InvalidRequest, Overloaded, PromptTooLong, TrinityError
from trinity.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from trinity.model.afmoe import Afmoe
    from trinity.tokenizer import Tokenizer

log = logging.getLogger(__name__)
RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class EngineStats:
    """Sequences and cache blocks now; preemptions and tokens since the start."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_dispatch_retries: int = 0
    dispatch_seconds: Mapping[str, tuple[list[int], float]] = field(default_factory=dict)  # as in trinity/metrics.py


class Engine:
    """Owns the KV cache and the requests; the model's weights stay their owner's. Not thread-safe: see AsyncEngine.

    `version` is called once before each forward pass, which sees one version of all weights: an owner that follows a
    trainer takes up the new ones there. `dispatch` says what the experts' dispatcher has counted: retries, and seconds by
    phase. Raises ConfigError if the KV cache cannot hold one longest sequence.
    """

    def __init__(
        self,
        model: "Afmoe",
        config: ModelConfig,
        settings: EngineConfig,
        tokenizer: "Tokenizer",
        version: Callable[[], int] = lambda: 0,
        dispatch: Callable[[], tuple[int, Mapping[str, tuple[list[int], float]]]] = lambda: (0, {}),
    ):
        layout = plan_layout(config, settings, next(model.parameters()).element_size())
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self.max_model_len = layout.max_model_len
        self._version, self._dispatch = version, dispatch  # callables
        self._cache = KVCache(layout, settings.max_num_seqs)
        self._scheduler = Scheduler(self._cache, settings.max_num_seqs, settings.max_num_batched_tokens)
        self._runner = Runner(model, config, settings, self._cache)
        self._sequences: dict[str, Sequence] = {}
        self._num_prompt_tokens = self._num_generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def version(self) -> int:
        """Of the weights that the next pass will use."""
        return self._version()

    def add(self, request_id: str, prompt_ids: Ids[int], params: SamplingParams | None = None) -> None:
        """Queue a request. Raises InvalidRequest, PromptTooLong or Overloaded, and then has changed nothing."""
        params = params or SamplingParams()
        self.validate(prompt_ids, params)
        if request_id in self._sequences:
            raise InvalidRequest(f"request id {request_id!r} is in use; choose another", param="request_id")
        if len(self._scheduler.waiting) >= self.settings.max_num_waiting:
            raise Overloaded(
                f"{len(self._scheduler.waiting)} requests are waiting, engine.max_num_waiting is "
                f"{self.settings.max_num_waiting}; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        text = TextStream(IncrementalDecoder(self.tokenizer, skip_special=True), params.stop)
        sequence = self._sequences[request_id] = Sequence(request_id, tuple(prompt_ids), params, text)
        self._scheduler.add(sequence)
        self._num_prompt_tokens += sequence.num_prompt

    def validate(self, prompt_ids: Ids[int], params: SamplingParams) -> None:
        """Raise what `add` would raise for this request on an idle engine. Touches no state: safe from any thread."""
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        if len(prompt_ids) + 1 > self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens; this engine takes {self.max_model_len - 1} "
                "(engine.max_model_len less one to generate); shorten the prompt or serve with a larger limit",
                param="prompt",
            )
        self._check_ids(prompt_ids, "prompt")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        self._check_ids(params.logit_bias, "logit_bias")

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        vocab = self.config.vocab_size
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab:
                raise InvalidRequest(
                    f"{param} has token id {token_id!r}; ids are integers from 0 to {vocab - 1}", param=param
                )

    def abort(self, request_id: str) -> Delta | None:
        """End a request now and free its blocks; its last Delta, or None if it is not (any more) here."""
        sequence = self._sequences.get(request_id)
        return self._end(sequence, "abort") if sequence else None

    def step(self) -> list[Delta]:
        """One forward pass; what each request got from it. Nothing happens when there is no work."""
        batch = self._scheduler.next_batch()
        if not batch:
            return []
        try:
            version = self._version()
            sequences, logits_BV = self._runner.forward(batch)
            sampled = sample(logits_BV, sequences)
        except Exception as error:  # the edge between requests and weights: shards die, memory runs out
            return self._fail(batch, error)
        for chunk in batch:
            chunk.sequence.num_computed = chunk.end
        return [self._accept(*pair, version) for pair in zip(sequences, sampled, strict=True)]

    def _accept(self, sequence: Sequence, sampled: Sampled, version: int) -> Delta:
        """Append the sampled token and decide whether the sequence ends with it."""
        if sampled.token_id is None:
            error = TrinityError("the model's logits are not finite; its weights are damaged")
            return self._end(sequence, "error", error=error.message, cause=error, version=version)
        token = sampled.token_id
        sequence.token_ids.append(token)
        self._num_generated_tokens += 1
        ends = token in sequence.params.stop_token_ids or self._is_eos(sequence, token)
        text = "" if ends else sequence.text.push(token)
        full = sequence.num_generated >= sequence.params.max_tokens or len(sequence.token_ids) >= self.max_model_len
        if ends or full:
            text += sequence.text.finish()
        got = {
            "text": text,
            "token_ids": (token,),
            "logprobs": sampled.logprobs and (sampled.logprobs,),
            "version": version,
        }
        if sequence.text.stopped_by is not None:
            return self._end(sequence, "stop", stop_reason=sequence.text.stopped_by, **got)
        if ends:
            return self._end(sequence, "stop", stop_reason=None if self._is_eos(sequence, token) else token, **got)
        return self._end(sequence, "length", **got) if full else self._delta(sequence, **got)

    def _is_eos(self, sequence: Sequence, token: int) -> bool:
        return token == self.config.eos_token_id and not sequence.params.ignore_eos

    def _fail(self, batch: list[Chunk], error: Exception) -> list[Delta]:
        if isinstance(error, TrinityError):
            cause = error
            log.warning("a forward pass of %d requests failed: %s", len(batch), error)
        else:
            cause = TrinityError("internal error in a forward pass")
            log.error("a forward pass of %d requests failed", len(batch), exc_info=error)
        return [self._end(chunk.sequence, "error", error=cause.message, cause=cause) for chunk in batch]

    def _end(self, sequence: Sequence, reason: FinishReason, **fields) -> Delta:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        return self._delta(sequence, finish_reason=reason, experts_TLK=sequence.experts_TLK, **fields)

    def _delta(self, sequence: Sequence, **fields) -> Delta:
        return Delta(
            sequence.request_id,
            num_prompt_tokens=sequence.num_prompt,
            num_generated_tokens=sequence.num_generated,
            **fields,
        )

    def stats(self) -> EngineStats:
        """Safe from any thread: plain reads."""
        retries, seconds = self._dispatch()
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_free_blocks=self._cache.num_free_blocks,
            num_total_blocks=self._cache.num_total_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_dispatch_retries=retries,
            dispatch_seconds=seconds,
        )

    def check(self) -> None:
        """Assert the invariants: free + used == total for each kind of block, and only running sequences hold any."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        self._cache.check([s.row for s in running if s.row is not None])
        assert all(s.row is not None for s in running), "a running sequence has no row"
        assert all(s.row is None and s.num_computed == 0 for s in waiting), "a waiting sequence holds a row"
        assert {id(s) for s in [*running, *waiting]} == {id(s) for s in self._sequences.values()}, "a sequence is lost"
