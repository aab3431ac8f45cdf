"""The grammars of an engine's requests: compiled once each, and what they leave of the logits.

Legend: B sequences, R some of their rows, V vocabulary.
Decisions. A constraint is admitted and compiled in threads, so that no pass waits for it: they wait for a process, and for the
library without Python's lock. The last ones are kept, refused ones too, for whoever asked: the time to the first token would
tell others that somebody has asked for the same. The masks of a pass are made in a thread while the pass runs, and added after
penalties and bias, which is faster than filling. Where those leave nothing that the grammar allows, the grammar alone counts.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence as Ids
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from trinity.config import ANYBODY, Client
from trinity.engine.request import SamplingParams, Sequence
from trinity.errors import InvalidRequest
from trinity.text.grammar.admission import NUM_WORKERS, admit, refusal
from trinity.text.grammar.compiler import matcher
from trinity.text.grammar.constraint import Constraint
from trinity.text.grammar.progress import Progress, reasoning_end
from trinity.text.grammar.vocabulary import Vocabulary
from trinity.text.reasoning import MARKERS

if TYPE_CHECKING:
    from trinity.text.tokenizer import Tokenizer

MAX_KEPT = 64  # compiled grammars
Owner = tuple[str, str | None]  # a client's name, and its salt
ANYONE: Owner = (ANYBODY.name, None)


def owner_of(params: SamplingParams, client: Client) -> Owner:
    """Whoever may notice that a request's grammar is compiled already."""
    return client.name, params.cache_salt


class Grammars:
    """Owns them. `eos_ids` end a text, of a model with `vocab_size` tokens. Safe to share between threads."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, eos_ids: Ids[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, tuple(eos_ids)
        self._compiled: OrderedDict[tuple[Owner, Constraint], Future[LLMatcher | str]] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_WORKERS, "trinity-grammar")

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        own = self._tokenizer
        return Vocabulary.of(own.token_bytes, own.added_ids.values(), self._eos_ids, self._vocab_size)

    def compiled(self, constraint: Constraint, owner: Owner = ANYONE) -> Future[LLMatcher | str]:
        """A matcher at the beginning of an answer, or why there is none: what `matcher` waits for."""
        key = owner, constraint
        with self._lock:
            kept = self._compiled.get(key)
            if kept is None or (kept.done() and kept.exception() is not None):
                kept = self._compiled[key] = self._threads.submit(self._compile, constraint)
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
            return kept

    def _compile(self, constraint: Constraint) -> LLMatcher | str:
        with self._lock:
            vocabulary = self._vocabulary
        try:
            return matcher(admit(constraint, vocabulary), vocabulary)
        except ValueError as error:
            return str(error)

    def matcher(self, constraint: Constraint, owner: Owner = ANYONE) -> LLMatcher:
        """At the beginning of an answer; to be copied. Blocks until it is compiled. Raises InvalidRequest."""
        found = self.compiled(constraint, owner).result()
        if isinstance(found, str):
            raise refusal(found)
        return found

    def progress(self, constraint: Constraint, prompt_ids: Ids[int], owner: Owner = ANYONE) -> Progress:
        """An answer to this prompt, at its beginning; where the prompt leaves reasoning open, the grammar waits for its end.
        Blocks, and raises, as `matcher`."""
        begins, ends = map(self._tokenizer.id_of, MARKERS)
        after = reasoning_end(prompt_ids, begins, ends, self._eos_ids)
        return Progress(self.matcher(constraint, owner), self._vocabulary, after)


class MaskThread:
    """Makes the masks of one pass after the other. A mask is taken before the next is begun: they lie in the same memory."""

    def __init__(self) -> None:
        self._mask_BV = np.empty((0, 0), np.float32)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "trinity-masks")

    def start(self, sequences: list[Sequence], vocab_size: int) -> Future[Tensor] | None:
        """Begin what is added to the logits of these: mask_BV, 0 for what may come next and -inf for all else. None where none
        has a grammar."""
        if all(sequence.progress is None for sequence in sequences):
            return None
        return self._thread.submit(self._fill, sequences, vocab_size)

    def _fill(self, sequences: list[Sequence], vocab_size: int) -> Tensor:
        if self._mask_BV.shape[0] < len(sequences):
            self._mask_BV = np.empty((len(sequences), vocab_size), np.float32)
        mask_BV = self._mask_BV[: len(sequences)]
        for row_V, sequence in zip(mask_BV, sequences, strict=True):
            allowed_V = None if sequence.progress is None else sequence.progress.allowed_V()
            row_V[:] = 0 if allowed_V is None else np.where(allowed_V, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(mask_BV)


def within_grammars(steered_BV: Tensor, raw_BV: Tensor, mask_BV: Tensor) -> Tensor:
    """The logits with -inf for what a grammar forbids; a copy. `raw_BV` replaces a row of which nothing would be left."""
    mask_BV = mask_BV.to(steered_BV.device, non_blocking=True)
    out_BV = steered_BV + mask_BV
    if steered_BV is not raw_BV:
        lost_R = (out_BV.amax(-1) == -torch.inf).nonzero()[:, 0]
        out_BV[lost_R] = raw_BV[lost_R] + mask_BV[lost_R]
    return out_BV


def advance(sequence: Sequence, token: int) -> InvalidRequest | None:
    """Take the token in its grammar, if it has one; -> the error that keeps it from going on: it was too costly in the end."""
    if sequence.progress is None:
        return None
    sequence.progress.take(token)
    why = sequence.progress.error
    return refusal(f"after {sequence.num_generated} tokens: {why}") if why else None
