"""Sampled tokens from passes: flatten a batch of chunks, one forward pass, select, sample.

Legend: T tokens of all chunks, D model, B sequences that sample, V vocabulary, L MoE layers, K top-k.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity.config import EngineConfig, LayerCache, ModelConfig
from trinity.engine.attention import Flat, PagedAttention
from trinity.engine.grammars import MaskThread
from trinity.engine.kv_cache import KVCache
from trinity.engine.kv_pools import KVPools
from trinity.engine.request import Chunk, Sequence
from trinity.engine.sampler import Sampled, sample
from trinity.engine.scheduler import Pass
from trinity.engine.scoring import is_damaged, score
from trinity.engine.versions import Versions
from trinity.models.common.adapted import PassAdapters
from trinity.models.common.attention import Attend, is_plain
from trinity.models.common.decoder import CausalLM, Inputs, Output
from trinity.ops import batch_invariant
from trinity.utils.niceness import PATIENT


class Logits(NamedTuple):
    """Logits of the sequences whose last token a pass computed: N rows, of each its last token's and those of its draft."""

    first: Mapping[Sequence, int]  # rows
    all_NV: Tensor

    def after(self, sequences: list[Sequence], num: int) -> Tensor:
        """logits_BV of what follows the first `num` tokens of each one's draft."""
        rows = [self.first[sequence] + num for sequence in sequences]
        return self.all_NV if rows == list(range(len(self.all_NV))) else self.all_NV[rows]


class Result(NamedTuple):
    """Result of a pass: the next token of the sequences whose last token it computed, and the logits of their drafts; or the
    error that prevented it."""

    sampled: dict[Sequence, Sampled]
    error: Exception | None = None
    logits: Logits | None = None
    has_bad_scores: bool = False  # log-probabilities of prompts that are not finite

    @property
    def is_damaged(self) -> bool:
        """Say whether logits were not finite, other than of requests with an adapter: these say nothing of the weights."""
        bad = (sequence for sequence, each in self.sampled.items() if each.token_id is None)
        return self.has_bad_scores or any(sequence.adapter is None for sequence in bad)


class ModelRunner:
    """Owns the key and value tensors, of the models' device and dtype; nothing else outlives a pass."""

    def __init__(self, versions: Versions, config: ModelConfig, settings: EngineConfig, cache: KVCache):
        parameter = next(versions.model(versions.live).parameters())
        self._versions, self._config, self._settings, self._cache = versions, config, settings, cache
        self._device = parameter.device
        self._masks = MaskThread()
        self.gives_way = False  # to whoever else wants the shards' cores
        self._pools = KVPools(cache.layout, parameter.device, parameter.dtype)
        self._is_exact = config.batch_invariant and batch_invariant.is_for(parameter)
        self._is_exact &= all(is_plain(kept) for kept in cache.layout.kinds)
        if self._is_exact:
            from trinity.ops.batch_invariant.warm import warm_up

            warm_up(parameter.dtype, settings.kv_cache_dtype == "int8")

    def parts(self, kind: LayerCache) -> tuple[Tensor, ...]:
        """All that is stored of the layers of a kind, each [layers, slots, ...]; it stays the runner's."""
        return self._pools.parts(kind)

    def run(self, plan: list[Pass]) -> list[Result]:
        """Compute and sample each pass; what prevented one is its result, and nobody else's."""
        return [self._run(*each) for each in plan]

    def _run(self, version: int, chunks: list[Chunk]) -> Result:
        try:
            sampling = [chunk.sequence for chunk in in_order(chunks) if chunk.samples]
            masks = self._masks.start(sampling, self._config.vocab_size)
            model = self._versions.model(version)
            urgency = min(chunk.sequence.priority for chunk in chunks)
            model.experts.priority = PATIENT if self.gives_way else urgency
            logits = self.forward(model, chunks)
            assert list(logits.first) == sampling, "a mask is another sequence's"
            sampled = sample(logits.after(sampling, 0), sampling, None if masks is None else masks.result())
            is_bad = any(chunk.sequence.adapter is None and is_damaged(chunk) for chunk in chunks)
            return Result(dict(zip(sampling, sampled, strict=True)), None, logits, is_bad)
        except Exception as error:  # the edge between requests and weights: shards die, memory runs out
            return Result({}, error)

    def sample_drafts(self, result: Result, sequences: list[Sequence], at: int) -> list[Sampled]:
        """The tokens after the first `at` of these sequences' drafts, which are theirs by now."""
        masks = self._masks.start(sequences, self._config.vocab_size)
        assert result.logits is not None, "it was a draft's pass"
        logits_BV = result.logits.after(sequences, at)
        return sample(logits_BV, sequences, None if masks is None else masks.result())

    @torch.inference_mode()
    def forward(self, model: CausalLM, batch: list[Chunk]) -> Logits:
        """-> logits of the sequences whose last token this pass computed.

        Calling again after a failure is harmless for single tokens. A longer chunk may have gone round the ring of a sliding
        layer by then: it needs its sequence computed from the start.
        """
        parts = in_parts(in_order(batch), self._settings.num_overlapped_microbatches, self._settings.min_part_tokens)
        chunks = [chunk for part in parts for chunk in part]
        outputs = model.forward_all([self._inputs(part) for part in parts])
        hidden_TD = outputs[0].hidden_TD if len(outputs) == 1 else torch.cat([output.hidden_TD for output in outputs])
        if any(chunk.sequence.params.trace for chunk in chunks):
            trace(chunks, chosen(outputs, self._config.num_experts))
        if any(chunk.sequence.is_scored for chunk in chunks):
            self._score(model, chunks, hidden_TD)
        rows, first, end = list[int](), dict[Sequence, int](), 0
        for chunk in chunks:
            end += chunk.count
            if chunk.samples:
                first[chunk.sequence] = len(rows)
                rows += range(end - 1 - len(chunk.draft), end)
        logits_TV = outputs[0].logits_TV
        if logits_TV is None or len(rows) != len(logits_TV):
            logits_TV = model.logits(hidden_TD[self._to(np.array(rows, np.int64))])
        return Logits(first, logits_TV)

    def _score(self, model: CausalLM, chunks: list[Chunk], hidden_TD: Tensor) -> None:
        for chunk, own_TD in zip(chunks, hidden_TD.split([chunk.count for chunk in chunks]), strict=True):
            if chunk.sequence.is_scored:
                score(chunk, own_TD, self._config.vocab_size, model.logits)

    def _inputs(self, chunks: list[Chunk]) -> Inputs:
        flat = flatten(chunks)
        ids_T = np.array([*itertools.chain.from_iterable(chunk.token_ids for chunk in chunks)], np.int64)
        attend = self._attention()(self._pools, self._cache, flat)
        are_wanted = all(chunk.samples and chunk.count == 1 + len(chunk.draft) for chunk in chunks)
        return Inputs(self._to(ids_T), self._to(flat.position_T), attend, self._adapters(chunks), are_wanted)

    def _adapters(self, chunks: list[Chunk]) -> PassAdapters | None:
        own = [chunk.sequence.adapter for chunk in chunks]
        if not any(own):
            return None
        return PassAdapters([a for a, c in zip(own, chunks, strict=True) for _ in range(c.count)], self._device)

    def _attention(self) -> Callable[[KVPools, KVCache, Flat], Attend]:
        if not self._is_exact:
            return PagedAttention
        from trinity.engine.exact_attention import ExactAttention  # a compiler comes with it

        return ExactAttention

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def chosen(outputs: list[Output], num_experts: int) -> np.ndarray:
    """experts_TLK of the tokens of all passes, one after the other: int16, or uint8 where that is enough."""
    dtype = torch.uint8 if num_experts <= 256 else torch.int16
    passes = [[routing.ids_TK.to(dtype) for routing in output.routing] for output in outputs if output.routing]
    return torch.cat([torch.stack(layers, 1) for layers in passes]).cpu().numpy() if passes else np.empty((0, 0, 0))


def trace(chunks: list[Chunk], experts_TLK: np.ndarray) -> None:
    """Note with each sequence where its tokens went. After a preemption they are computed anew: the last time counts."""
    ends = np.cumsum([chunk.count for chunk in chunks])
    for chunk, rows in zip(chunks, np.split(experts_TLK, ends[:-1]), strict=True):
        if chunk.sequence.params.trace:
            chunk.sequence.experts[chunk.start : chunk.end] = rows


def in_order(batch: list[Chunk]) -> list[Chunk]:
    """Single tokens and their drafts first, longest context first, so that decodes of similar length are neighbours."""
    return sorted(batch, key=lambda chunk: (not chunk.is_single, -chunk.end))


def in_parts(chunks: list[Chunk], most: int, min_tokens: int) -> list[list[Chunk]]:
    """Cut the batch into up to `most` runs of about equal numbers of tokens, none (if there is a choice) below `min_tokens`."""
    num = max(1, min(most, sum(chunk.count for chunk in chunks) // min_tokens))
    if num == 1:
        return [chunks]
    ends = np.cumsum([chunk.count for chunk in chunks])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, num) / num) + 1
    bounds = sorted({0, len(chunks), *map(int, cuts)})
    return [chunks[first:end] for first, end in itertools.pairwise(bounds)]


def flatten(chunks: list[Chunk]) -> Flat:
    """A draft's tokens see what is before them as if each were alone: all keys of a layer are written before decodes read."""
    rows = [chunk.row for chunk in chunks]
    counts = [chunk.count for chunk in chunks]
    if len(chunks) == sum(counts):  # the same as below, for passes that are short
        start_T = np.array([chunk.start for chunk in chunks], np.int64)
        return Flat(start_T, np.array(rows, np.int64), start_T + 1, len(chunks), ())
    position_T = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
    end_T = np.repeat([chunk.end for chunk in chunks], counts)
    num_decodes = sum(chunk.count for chunk in chunks if chunk.is_single)
    end_T[:num_decodes] = position_T[:num_decodes] + 1
    return Flat(
        position_T=position_T,
        row_T=np.repeat(np.array(rows, np.int64), counts),
        end_T=end_T,
        num_decodes=num_decodes,
        prefills=tuple((row, c.start, c.end) for row, c in zip(rows, chunks, strict=True) if not c.is_single),
    )
