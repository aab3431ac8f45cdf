"""LLM: a checkpoint as a Python object, offline. The same engine as the server's, driven until all prompts are done."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trinity.checkpoint import located, open_checkpoint
from trinity.config import EngineConfig, ModelConfig, PlacementConfig, section
from trinity.engine.defaults import GenerationConfig, read_defaults
from trinity.engine.engine import Engine
from trinity.engine.memory import memory_of, plan_memory
from trinity.engine.request import Delta, FinishReason, SamplingParams, TokenLogprobs, truncated
from trinity.engine.samples import best, each
from trinity.engine.weights import FixedWeights, WeightSource
from trinity.errors import InvalidRequest, TrinityError
from trinity.models.registry import weight_bytes
from trinity.pool.memory import experts_bytes
from trinity.rpc.messages import Load
from trinity.text.answers import AnswerFormat, Parser, read
from trinity.text.conversation import Chat, render
from trinity.text.tool_calls.events import Call, Event, answer_of

if TYPE_CHECKING:
    from trinity.models.common.experts import ExpertLayer

log = logging.getLogger(__name__)
STREAM = "stream"
Params = SamplingParams | Seq[SamplingParams] | None


@dataclass(frozen=True)
class Completion:
    """Result of one prompt. `finish_reason` is "stop" or "length"; an error is raised instead.

    `token_versions`: of the weights that gave each token. `experts_TLK` is there with `SamplingParams.trace` (see Delta).
    `versions`: of the weights behind the first token, and of those behind the last. `prompt_logprobs`, with
    `SamplingParams.prompt_logprobs`: one for each token of the prompt, None for its first. `num_cached_tokens`: of the prompt,
    that were not computed for it. Of a chat, `text` is the answer without `reasoning` and `tool_calls`.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    versions: tuple[int, int]
    token_versions: tuple[int, ...]
    experts_TLK: np.ndarray | None = field(default=None, repr=False, compare=False)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached_tokens: int = field(default=0, compare=False)
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()


@dataclass
class _Draft:
    prompt_ids: list[int]
    params: SamplingParams
    deltas: list[Delta] = field(default_factory=list)

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return tuple(lp for d in self.deltas for lp in d.logprobs or ())

    def completion(self, shows_logprobs: bool) -> Completion:
        last = self.deltas[-1]
        assert last.finish_reason is not None
        scores = self.deltas[0].prompt_logprobs
        return Completion(
            text="".join(d.text for d in self.deltas),
            token_ids=tuple(t for d in self.deltas for t in d.token_ids),
            logprobs=self.logprobs if shows_logprobs else None,
            finish_reason=last.finish_reason,
            prompt_token_ids=tuple(self.prompt_ids),
            token_versions=tuple(d.version for d in self.deltas for _ in d.token_ids),
            experts_TLK=last.experts_TLK,
            versions=(last.first_version, last.version),
            num_cached_tokens=last.num_cached_tokens,
            prompt_logprobs=None if scores is None else tuple(scores.positions()),
        )


class LLM:
    """`LLM("runs/train/step-000300", max_model_len=4096).generate("def add(", SamplingParams(temperature=0))`; a folder, or a
    model's name on the Hugging Face Hub: `LLM("arcee-ai/Trinity-Nano-Preview")`, `LLM("ORG/NAME@REVISION")`.

    Settings of EngineConfig are given by their names, over those of `engine`; memory that nobody names is chosen by what is
    free. `experts` are the routed experts to call (a dispatcher); without them, shards are made in this process on `device`
    ("auto": the GPU if there is one) with expert `backend`, experts computed as `expert_dtype`. What sampling parameters do
    not set has the values of the checkpoint's generation_config.json, unless `generation_config` is "none". Raises
    CheckpointError or ConfigError, and before a weight is read or fetched where it could not fit into memory.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        *,
        engine: EngineConfig | None = None,
        experts: "ExpertLayer | None" = None,
        backend: str = "auto",
        num_shards: int = 1,
        device: str = "auto",
        expert_dtype: str | Seq[str] | None = None,
        generation_config: GenerationConfig = "checkpoint",
        **settings: Any,
    ):
        wanted = section(EngineConfig, "engine", (engine or EngineConfig()).model_dump() | settings)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        checkpoint = open_checkpoint(located(checkpoint_path))
        placement = section(PlacementConfig, "placement", {"backend": backend, "expert_dtype": expert_dtype})
        own = _fitted(wanted, checkpoint.config, device, None if experts is not None else placement.expert_dtype)
        torch.set_num_threads(own.num_threads)
        checkpoint.fetch()
        if experts is None:
            from trinity.pool.local import local_pool  # only here: the composition of an offline program

            load = Load(checkpoint.name, training=False)
            placed = {"num_shards": num_shards, "backend": backend, "device": device, "expert_dtype": expert_dtype}
            pool = local_pool(checkpoint.config, load, **placed)  # type: ignore[arg-type]
            experts = pool.dispatcher(checkpoint.version)
        self.tokenizer = checkpoint.tokenizer
        self.weights: WeightSource = FixedWeights(
            checkpoint.load_model(experts, device, own.weight_dtype), checkpoint.version
        )
        tree = checkpoint.generation if generation_config == "checkpoint" else None
        defaults = read_defaults(tree, checkpoint.path)
        for line in defaults.sentences():
            log.info("%s", line)
        self.engine = Engine(self.weights, checkpoint.config, own, self.tokenizer, defaults=defaults)

    @classmethod
    def over(cls, engine: Engine, weights: WeightSource) -> "LLM":
        """Around an engine that somebody else has made, with these weights."""
        llm = cls.__new__(cls)
        llm.tokenizer, llm.weights, llm.engine = engine.tokenizer, weights, engine
        return llm

    @property
    def default_params(self) -> SamplingParams:
        """Parameters of a request that sets none: the checkpoint's, and else OpenAI's."""
        return self.engine.defaults.params

    def generate(self, prompts: str | Seq[str] | Seq[Seq[int]], params: Params = None) -> list[Completion]:
        """Completions in the order of the prompts (texts, or token ids), `n` for each; `params` for all or one for each.

        Raises InvalidRequest before anything runs if any prompt or parameter is wrong, and the TrinityError of the
        first request that fails; either way nothing stays in the engine.
        """
        ids = [self._ids(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
        wanted = [self.engine.defaults.fill(p) for p in _one_each(params, len(ids))]
        groups = [self._drafts(*pair) for pair in zip(ids, wanted, strict=True)]
        drafts = [draft for group in groups for draft in group]
        for draft in drafts:
            self.engine.validate(draft.prompt_ids, draft.params)
        try:
            self._run({str(i): draft for i, draft in enumerate(drafts)})
        finally:
            for i in range(len(drafts)):
                self.engine.abort(str(i))
        return [completion for pair in zip(wanted, groups, strict=True) for completion in _answer(*pair)]

    def stream(self, prompt: str | Seq[int], params: SamplingParams | None = None) -> Iterator[str]:
        """One prompt's text in the pieces in which it comes. Raises as `generate` does; a caller who stops early ends it."""
        for delta in self._deltas(self._ids(prompt), params):
            yield delta.text

    def chat(
        self,
        messages: Seq[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Seq[dict[str, Any]] = (),
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Completion:
        """The assistant's answer to a conversation of OpenAI's messages, by the checkpoint's chat template. `tools` are what
        it may call, as OpenAI's; the template gets `template_arguments` by name. Raises InvalidRequest."""
        prompt_ids, parser = self._chat(Chat(messages, tools, arguments=template_arguments or {}))
        completion = self.generate([prompt_ids], params)[0]
        answer = answer_of(read(parser, completion.token_ids, completion.text, is_last=True))
        return replace(completion, text=answer.text, reasoning=answer.reasoning, tool_calls=answer.calls)

    def stream_chat(
        self, messages: Seq[Mapping[str, Any]], params: SamplingParams | None = None, tools: Seq[dict[str, Any]] = ()
    ) -> Iterator[Event]:
        """The same answer as it comes: pieces of text, of reasoning and of calls (trinity/text/tool_calls/events.py)."""
        prompt_ids, parser = self._chat(Chat(messages, tools))
        for delta in self._deltas(prompt_ids, params):
            yield from read(parser, delta.token_ids, delta.text, delta.finish_reason is not None)

    def _chat(self, chat: Chat) -> tuple[list[int], Parser]:
        """The prompt that the chat template makes of it, and what reads the answer."""
        answers = AnswerFormat.of(self.tokenizer)
        answers.check_tools(chat.tools)
        prompt_ids = self.tokenizer.encode(render(chat, self.tokenizer))
        return prompt_ids, answers.parser(prompt_ids, chat.tools)

    def _deltas(self, prompt_ids: list[int], params: SamplingParams | None) -> Iterator[Delta]:
        self.engine.add(STREAM, prompt_ids, params)
        try:
            while self.engine.has_work:
                for delta in self.engine.step():
                    yield _sound(delta)
        finally:
            self.engine.abort(STREAM)

    def _ids(self, prompt: str | Seq[int]) -> list[int]:
        return self.tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else list(prompt)

    def _drafts(self, prompt_ids: list[int], params: SamplingParams) -> list[_Draft]:
        keep = params.truncate_prompt_tokens
        prompt_ids = list(truncated(prompt_ids, keep, params.max_tokens, self.engine.max_model_len))
        return [_Draft(prompt_ids, one) for one in each(params)]

    def _run(self, drafts: dict[str, _Draft]) -> None:
        """Keep the engine fed without overfilling its queue."""
        later = deque(drafts.items())
        while later or self.engine.has_work:
            while later and self.engine.stats().num_waiting < self.engine.settings.max_num_waiting:
                request_id, draft = later.popleft()
                self.engine.add(request_id, draft.prompt_ids, draft.params)
            for delta in self.engine.step():
                drafts[delta.request_id].deltas.append(_sound(delta))


def _sound(delta: Delta) -> Delta:
    """`delta`, unless its request failed: then raise why."""
    if delta.finish_reason == "error":
        raise delta.cause or TrinityError(delta.error or "the request failed")
    return delta


def _answer(params: SamplingParams, drawn: list[_Draft]) -> list[Completion]:
    chosen = best(params, [draft.logprobs for draft in drawn])
    return [drawn[i].completion(params.logprobs is not None) for i in chosen]


def _fitted(
    settings: EngineConfig, model: ModelConfig, device: str, expert_dtype: tuple[str, ...] | None
) -> EngineConfig:
    """The settings with the memory of the cache chosen beside weights that are still to be loaded; experts, too, in those
    forms, unless None."""
    weights, _ = weight_bytes(model, settings.weight_dtype)
    if expert_dtype is not None:
        weights += experts_bytes(model, None, expert_dtype).values
    memory = memory_of(device, weights=weights)
    plan = plan_memory(model, settings, model.itemsize, memory)
    log.info("%s", plan.line)
    return plan.fixed(settings)


def _one_each(params: Params, num: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num
    if len(params) != num:
        raise InvalidRequest(
            f"{len(params)} sampling parameters for {num} prompts; give one, or one each", param="params"
        )
    return list(params)
