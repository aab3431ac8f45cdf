"""The engine: continuous batching of many requests over one model. Synchronous, one thread, no network.

Legend: B sequences that get a token in this step, V vocabulary.
Each step is: choose the tokens and their weights, run them, and tell every request what it got. A request ends exactly once: by
a Delta of `step` or by the one that `abort` returns. A forward pass that fails (a dead shard, no memory) ends the
requests that were in it and no others. A pass whose weights have gone or are damaged is repeated with others: its requests
are left as they were, and the next step schedules them again.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Ids
from functools import partial
from typing import TYPE_CHECKING, Any

from trinity.config import ANYBODY, Client, EngineConfig, ModelConfig
from trinity.engine.adapters import AdapterStore
from trinity.engine.begun import NOT_HANDED, Begun, Handed, resume
from trinity.engine.defaults import SamplingDefaults
from trinity.engine.deltas import by_request
from trinity.engine.grammars import Grammars, advance, owner_of
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_layout import plan_layout
from trinity.engine.kv_tier import KVTier, TierPlace
from trinity.engine.memory import settled
from trinity.engine.pace import Pace
from trinity.engine.prefix_cache import PrefixCache
from trinity.engine.repeats import Repeats
from trinity.engine.request import (
    Chunk,
    Delta,
    FinishReason,
    SamplingParams,
    Sequence,
    check_length,
    check_numbers,
    truncated,
)
from trinity.engine.runner import ModelRunner, Result
from trinity.engine.sampler import Sampled
from trinity.engine.scheduler import Pass, Scheduler, overloaded
from trinity.engine.speculation import Speculation
from trinity.engine.stats import EngineStats
from trinity.engine.token_rules import BadWords, read_words, rules_of, thinking_budget
from trinity.engine.versions import Versions
from trinity.engine.weights import WeightSource
from trinity.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    StepConflict,
    TrinityError,
    Unavailable,
    VersionGone,
    WrongEpoch,
)
from trinity.text.detokenizer import IncrementalDecoder, TextStream
from trinity.utils.lines import line_of, step_of
from trinity.utils.trying import tried

if TYPE_CHECKING:
    from trinity.models.common.adapted import BackboneAdapter
    from trinity.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
LATE = "the next token would come after the deadline, even if nothing else were computed; allow more time"


class Engine:
    """Owns the KV cache and the requests; the weights stay their source's. Not thread-safe: see AsyncEngine.

    Each forward pass sees one version of all weights. `dispatch` says what the experts' dispatcher has counted: retries, and
    seconds by phase. `defaults` are those of fields that a request does not set; `adapters` is where AsyncEngine finds those of
    requests; `tier`, where the node keeps what engines have cached. Raises ConfigError if the KV cache cannot hold one longest
    sequence or there can be no such tier, and what `source.model` raises.
    """

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        settings: EngineConfig,
        tokenizer: "Tokenizer",
        dispatch: Callable[[], tuple[int, Mapping[str, tuple[list[int], float]]]] = lambda: (0, {}),
        defaults: SamplingDefaults | None = None,
        adapters: AdapterStore | None = None,
        tier: TierPlace | None = None,
    ):
        self.adapters = adapters
        self.defaults = defaults or SamplingDefaults()
        self._versions = versions = Versions(source, settings.max_versions, settings.max_age)
        model = versions.model(versions.live)
        if settings.weight_dtype not in ("auto", config.dtype, model.weight_dtype):
            raise ConfigError(
                f"engine.weight_dtype {settings.weight_dtype}: the source of this engine's weights gives them as they are "
                "trained; leave it out"
            )
        weight = next(model.parameters())
        settings = settled(config, settings, weight.element_size(), str(weight.device))
        layout = plan_layout(config, settings, weight.element_size())
        self.config, self.settings, self.tokenizer = config, settings, tokenizer
        self.max_model_len = layout.max_model_len
        self._dispatch = dispatch
        self._cache = KVCache(layout, settings.max_num_seqs)
        self._pace = Pace(settings.max_num_batched_tokens, settings.max_pass_s)
        kept = f"{config!r} {weight.dtype} {settings.kv_cache_dtype} {model.weight_dtype}"
        self.prefixes = PrefixCache(self._cache, versions, settings.prefix_cache, kept)
        max_running = min(settings.max_num_seqs, settings.max_num_batched_tokens)  # a decode has a place in each pass
        self._drafts = Speculation(settings.max_draft_tokens)
        self._scheduler = Scheduler(self._cache, versions, self.prefixes, max_running, self._pace, self._drafts)
        self._runner = ModelRunner(versions, config, settings, self._cache)
        if tier is not None:
            self.prefixes.tier = KVTier(tier, self._cache, self._runner.parts, versions.is_withdrawn)
        self._repeats = Repeats(versions)
        self.grammars = Grammars(tokenizer, config.vocab_size, config.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._num_prompt_tokens = self._num_generated_tokens = self._num_computed_tokens = 0
        self._refused: list[Delta] = []  # the last of requests whose place others took, for the next step to give

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._refused or self.prefixes.has_unsaved)

    @property
    def version(self) -> int:
        """Version of the weights that the last step used for live requests, by its name. Safe from any thread."""
        return self._versions.live

    def add(
        self,
        request_id: str,
        prompt_ids: Ids[int],
        params: SamplingParams | None = None,
        client: Client = ANYBODY,
        words: BadWords | None = None,
        until_s: float = math.inf,
        adapter: "BackboneAdapter | None" = None,
        begun: Begun | None = None,
        handed: Handed = NOT_HANDED,
    ) -> None:
        """Queue a request of that client; `words` is what `bad_words` gave for it, if that was asked before. After `until_s`
        on time.monotonic() nobody waits for it. `adapter`: what is computed beside the weights for it, whatever their version.
        An answer that has `begun` elsewhere goes on here after its last token. `handed`: its prompt is handed over.

        Raises InvalidRequest, PromptTooLong or Overloaded, and then has changed nothing. Where the queue is full an urgent
        request takes the place of the last of a less urgent priority."""
        params = self.defaults.fill(params or SamplingParams())
        prompt_ids = truncated(prompt_ids, params.truncate_prompt_tokens, params.max_tokens, self.max_model_len)
        self.validate(prompt_ids, params, client)
        if request_id in self._sequences:
            raise InvalidRequest(f"request id {request_id!r} is in use; choose another", param="request_id")
        crowded_out = self._scheduler.room_for(params.priority, self.settings.max_num_waiting)
        decoder = IncrementalDecoder(self.tokenizer, params.skip_special_tokens)
        text = TextStream(decoder, params.stop, params.include_stop_str_in_output)
        words = self.bad_words(params) if words is None else words
        thinking = thinking_budget(params, prompt_ids, self.tokenizer, self.config.eos_token_ids)
        rules = rules_of(params, self.config.eos_token_ids, words, self.config.vocab_size, thinking)
        bound = params.structured_outputs
        progress = self.grammars.progress(bound, prompt_ids, owner_of(params, client)) if bound else None
        about: dict[str, Any] = {"progress": progress, "until_s": until_s, "adapter": adapter}
        sequence = Sequence(request_id, tuple(prompt_ids), params, text, client, rules, **about)
        if begun is not None and begun.token_ids:
            self._resume(sequence, begun)
        else:
            self._take_over(sequence, handed)
        if crowded_out is not None:
            full = overloaded(self.settings.max_num_waiting)
            self._refused.append(self._end(crowded_out, "error", error=full.message, cause=full))
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)
        self._num_prompt_tokens += sequence.num_prompt

    def _take_over(self, sequence: Sequence, handed: Handed) -> None:
        sequence.held_s, sequence.num_cached = handed.held_s, handed.num_cached
        if handed.version is not None and sequence.params.version_policy == "pinned":
            # It has no token yet: any other version will do.
            tried(partial(self._versions.pin_to, sequence, handed.version), Overloaded)

    def _resume(self, sequence: Sequence, begun: Begun) -> None:
        length = sequence.num_prompt + len(begun.token_ids)
        if length >= self.max_model_len:
            raise Unavailable(
                f"prompt and answer have {length} tokens so far; this engine takes {self.max_model_len}, less than the one "
                "that began: give all of them the same engine.max_model_len"
            )
        self._check_ids(begun.token_ids, "begun")
        if sequence.params.version_policy == "pinned":
            self._versions.pin_to(sequence, begun.version)
        resume(sequence, begun)

    def validate(self, prompt_ids: Ids[int], params: SamplingParams, client: Client = ANYBODY) -> None:
        """Raise what `add` would raise for this request on an idle engine. Touches no state: safe from any thread."""
        check_length(prompt_ids, self.max_model_len)
        self._check_ids(prompt_ids, "prompt")
        check_numbers(params)
        for name, ids in params.listed_ids.items():
            self._check_ids(ids, name)
        if params.num_drawn > 1:
            raise InvalidRequest(
                "an engine draws one continuation a request; add what trinity.engine.samples.each gives"
            )
        if params.structured_outputs is not None:
            self.grammars.matcher(params.structured_outputs, owner_of(params, client))

    def bad_words(self, params: SamplingParams) -> BadWords:
        """The request's bad words as tokens. Safe from any thread; takes long where they are many."""
        return read_words(params.bad_words, self.tokenizer)

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
        """Compute one forward pass, or one for each version that requests use; -> what each request got from it.

        Without work it only looks which version is the newest.
        """
        ended, self._refused = self._refused + self._end_late(), []
        self._drafts.begin(self._scheduler.running, self._pace.last_s)
        plan, started_s = self._scheduler.schedule(), time.perf_counter()
        results = self._runner.run(plan)
        run_s, chunks = time.perf_counter() - started_s, [chunk for each in plan for chunk in each.chunks]
        deltas = ended + self.accept(plan, results)
        if not any(result.error for result in results):  # what failed says nothing about what a pass takes
            self._pace.took(sum(chunk.count for chunk in chunks), run_s)
            self._drafts.took(chunks, time.perf_counter() - started_s)
        self.prefixes.save(self._pace.last_s if self._sequences else None)
        return deltas

    def _end_late(self) -> list[Delta]:
        """End the waiting requests that can no longer make it, before they cost a pass."""
        return [self._end(each, "error", error=LATE, cause=DeadlineExceeded(LATE)) for each in self._scheduler.late()]

    def accept(self, plan: list[Pass], results: list[Result]) -> list[Delta]:
        """Give each request what its pass computed. Requests whose pass came to nothing are scheduled again, or end."""
        return [delta for each, result in zip(plan, results, strict=True) for delta in self._accept_pass(each, result)]

    def _accept_pass(self, each: Pass, result: Result) -> list[Delta]:
        if isinstance(result.error, VersionGone | StepConflict | WrongEpoch):
            over = self._repeats.after_loss(each.chunks, result.error)
            gone = VersionGone(f"the weights that this request uses have gone: {result.error}")
            return self._fail(over, gone) if over else []
        if result.error is not None:
            return self._fail(each.chunks, result.error)
        counts = self._repeats.after_damage(*each) if result.is_damaged else each.chunks
        for chunk in counts:
            self._computed(chunk.own, each.version)
            self._num_computed_tokens += chunk.count
        sampled = [chunk for chunk in counts if chunk.sequence in result.sampled]
        deltas = [self._accept(chunk.sequence, result.sampled[chunk.sequence]) for chunk in sampled]
        drafted = [chunk for chunk in sampled if chunk.draft]
        return by_request(deltas + self._accept_drafts(drafted, each.version, result)) if drafted else deltas

    def _computed(self, chunk: Chunk, version: int) -> None:
        chunk.sequence.computed(chunk.start, chunk.end, version)
        self.prefixes.computed(chunk)

    def _accept_drafts(self, chunks: list[Chunk], version: int, result: Result) -> list[Delta]:
        """Take the tokens of drafts as far as they are what was sampled, and one more of each."""
        deltas, going, at = list[Delta](), chunks, 0
        accepted = Counter[Sequence]()
        while going := [chunk for chunk in going if self._came_true(chunk, at)]:
            for chunk in going:
                self._computed(chunk.drafted(at), version)
                accepted[chunk.sequence] += 1
            at += 1
            sampled = self._runner.sample_drafts(result, [chunk.sequence for chunk in going], at)
            pairs = zip(going, sampled, strict=True)
            good = [(chunk, each) for chunk, each in pairs if each.token_id is not None]  # else the next pass tells
            deltas += [self._accept(chunk.sequence, each) for chunk, each in good]
            going = [chunk for chunk, _ in good]
        for chunk in chunks:
            self._drafts.note(chunk, accepted[chunk.sequence])
        return deltas

    def _came_true(self, chunk: Chunk, at: int) -> bool:
        sequence = chunk.sequence
        is_here = self._sequences.get(sequence.request_id) is sequence
        return is_here and at < len(chunk.draft) and sequence.token_ids[-1] == chunk.draft[at]

    def _accept(self, sequence: Sequence, sampled: Sampled) -> Delta:
        """Append the sampled token and decide whether the sequence ends with it."""
        scores, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        if sampled.token_id is None or (scores is not None and not scores.is_finite()):
            return self._end_damaged(sequence)
        if not sequence.params.max_tokens:
            return self._end(sequence, "length", prompt_logprobs=scores)
        token = sampled.token_id
        sequence.token_ids.append(token)
        sequence.num_repeats = 0
        if (stuck := advance(sequence, token)) is not None:
            return self._end(sequence, "error", error=stuck.message, cause=stuck)
        self._num_generated_tokens += 1
        ends = token in sequence.params.stop_token_ids or self._is_eos(sequence, token)
        text = "" if ends and not sequence.params.include_stop_str_in_output else sequence.text.push(token)
        full = sequence.num_generated >= sequence.params.max_tokens or len(sequence.token_ids) >= self.max_model_len
        complete = sequence.progress is not None and sequence.progress.is_complete
        if ends or full or complete:
            text += sequence.text.finish()
        got = {
            "text": text,
            "token_ids": (token,),
            "logprobs": sampled.logprobs and (sampled.logprobs,),
            "prompt_logprobs": scores,
        }
        if sequence.text.stopped_by is not None:
            return self._end(sequence, "stop", stop_reason=sequence.text.stopped_by, **got)
        if ends:
            return self._end(sequence, "stop", stop_reason=None if self._is_eos(sequence, token) else token, **got)
        if complete:
            return self._end(sequence, "stop", **got)
        return self._end(sequence, "length", **got) if full else self._delta(sequence, **got)

    def _end_damaged(self, sequence: Sequence) -> Delta:
        self.prefixes.forget(sequence)
        own = sequence.adapter
        whose = "the model's logits" if own is None else f"the logits of adapter {own.ref.name!r}"
        error = TrinityError(f"{whose} are not finite; its weights are damaged")
        return self._end(sequence, "error", error=error.message, cause=error)

    def _is_eos(self, sequence: Sequence, token: int) -> bool:
        return token in self.config.eos_token_ids and not sequence.params.ignore_eos

    def _fail(self, batch: list[Chunk], error: Exception) -> list[Delta]:
        if isinstance(error, TrinityError):
            cause = error
            log.warning("a forward pass of %d requests failed: %s", len(batch), error)
        else:
            cause = TrinityError("internal error in a forward pass")
            log.error("a forward pass of %d requests failed", len(batch), exc_info=error)
        return [self._end(chunk.sequence, "error", error=cause.message, cause=cause) for chunk in batch]

    def _end(self, sequence: Sequence, reason: FinishReason, **fields: Any) -> Delta:
        self._scheduler.remove(sequence)
        self._drafts.end(sequence)
        self._versions.release(sequence, sequence.held_s)
        del self._sequences[sequence.request_id]
        return self._delta(sequence, finish_reason=reason, experts_TLK=sequence.experts_TLK, **fields)

    def _delta(self, sequence: Sequence, **fields: Any) -> Delta:
        return Delta(
            sequence.request_id,
            num_prompt_tokens=sequence.num_prompt,
            num_generated_tokens=sequence.num_generated,
            version=step_of(sequence.version),
            first_version=step_of(sequence.first_version),
            line=line_of(sequence.version),
            num_cached_tokens=sequence.num_cached or 0,
            queue_s=sequence.queue_s or 0.0,
            **fields,
        )

    def reset_prefix_cache(self) -> None:
        """Forget everything that is cached, but for what running requests have."""
        self.prefixes.drop(lambda oldest, newest: True)

    def give_way(self, gives_way: bool) -> None:
        """Have shards compute its rows with what others leave of their cores, or as usual again. Safe from any thread."""
        self._runner.gives_way = gives_way

    def stats(self) -> EngineStats:
        """Safe from any thread: plain reads."""
        retries, seconds = self._dispatch()
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._cache.num_free_blocks,
            num_total_blocks=self._cache.num_total_blocks,
            num_preemptions=self._scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            **self.prefixes.counts(),
            num_idle_blocks=self._cache.num_idle_blocks,
            num_computed_tokens=self._num_computed_tokens,
            num_versions_held=self._versions.num_held,
            num_quarantined=self._versions.num_quarantined,
            num_repeats=self._repeats.num,
            num_drafted=self._drafts.num_drafted,
            num_accepted=self._drafts.num_accepted,
            switch_seconds=self._versions.switch_s,
            longest_pass_seconds=self._pace.longest_s,
            num_dispatch_retries=retries,
            dispatch_seconds=seconds,
        )

    def check(self) -> None:
        """Assert the invariants: each block is free, idle or held, only running sequences hold any, and versions are held for
        just those requests that are pinned to them."""
        running, waiting = self._scheduler.running, [*self._scheduler.following, *self._scheduler.waiting]
        self._cache.check([s.row for s in running if s.row is not None])
        assert all(s.row is not None for s in running), "a running sequence has no row"
        assert all(s.row is None and s.num_computed == 0 for s in waiting), "a waiting sequence holds a row"
        assert {id(s) for s in [*running, *waiting]} == {id(s) for s in self._sequences.values()}, "a sequence is lost"
        self._versions.check(self._sequences.values())
