"""Answers in OpenAI's shapes: whole ones and server-sent chunks, for completions and chat completions.

Pure functions over collected Deltas; no I/O. Token texts come from the tokenizer's byte table, because a token may hold
part of a character. `system_fingerprint` tells the version of the weights, which may change between two requests. Where it
changed within one, its choice says so: a chunk has `weights_version`, a whole choice `weights_versions`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from trinity.engine.request import Delta, TokenLogprobs
from trinity.text.detokenizer import token_bytes, token_text
from trinity.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
NESTED = 4  # the answer, its choices, one of them, its log-probabilities: below these lie the long lists
LISTED = 64
TOKEN_BYTES, LOGPROB_BYTES = 8, 64  # about


def sse(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def encoded(tree: dict[str, Any]) -> bytes:
    """The JSON of a whole answer, a piece at a time: no call into C keeps other threads from running for long."""
    return "".join(_pieces(tree, NESTED)).encode()


def _pieces(tree: Any, depth: int) -> Iterator[str]:
    if not tree or not isinstance(tree, dict | list):
        yield _json(tree)
    elif depth and isinstance(tree, dict):
        for i, (key, value) in enumerate(tree.items()):
            yield f"{',' if i else '{'}{_json(key)}:"
            yield from _pieces(value, depth - 1)
        yield "}"
    elif depth:
        for i, value in enumerate(tree):
            yield "," if i else "["
            yield from _pieces(value, depth - 1)
        yield "]"
    elif isinstance(tree, list):
        for i in range(0, len(tree), LISTED):
            yield ("," if i else "[") + _json(tree[i : i + LISTED])[1:-1]
        yield "]"
    else:
        yield _json(tree)


def _json(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass
class Choice:
    """Parts of one continuation that have arrived."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: Delta | None = None

    @property
    def size(self) -> int:
        """About as many bytes as it will have."""
        routed = 0 if self.experts_TLK is None else self.experts_TLK.nbytes
        return len(self.text) + routed + LOGPROB_BYTES * sum(1 + len(position.top) for position in self.logprobs)

    @property
    def experts_TLK(self) -> np.ndarray | None:
        return None if self.last is None else self.last.experts_TLK

    @staticmethod
    def most_bytes(num_tokens: int, num_logprobs: int | None) -> int:
        """About as many bytes as one of so many tokens may have, whose texts are some characters each."""
        return num_tokens * (TOKEN_BYTES + (0 if num_logprobs is None else LOGPROB_BYTES * (1 + num_logprobs)))

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.last = delta

    @property
    def finish(self) -> dict[str, Any]:
        assert self.last is not None, "a stream ends with its finish reason or raises"
        versions = {"first": self.last.first_version, "last": self.last.version}
        return {**_finish(self.last), "weights_versions": versions}


@dataclass(frozen=True)
class Envelope:
    """Fields that all parts of one answer repeat."""

    id: str
    created: int
    model: str

    def wrap(self, kind: str, choices: list[dict[str, Any]], version: int, **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": f"weights-{version}", "choices": choices, **more}


class CompletionFormat:
    """`text_completion`. `echoes` has, for each choice, the text to put before it. Choices keep an offset into the text."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, with_logprobs: bool, echoes: Sequence[str], as_ids: bool = False):
        self.tokenizer, self.with_logprobs, self.echoes = tokenizer, with_logprobs, echoes
        self._name = namer(tokenizer, as_ids)
        self._offsets = [0] * len(echoes)

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self.echoes[index]
        return {"index": index, "text": echo, "logprobs": None, **_finish(None)} if echo else None

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(index, delta.logprobs or ())
        return {"index": index, "text": delta.text, "logprobs": logprobs, **_end(delta)}

    def full(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.index, choice.logprobs)
        return {
            "index": choice.index,
            "text": self.echoes[choice.index] + choice.text,
            "logprobs": logprobs,
        } | choice.finish

    def _logprobs(self, index: int, positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        tokens = [self._name(position.token_id) for position in positions]
        offsets = []
        for position in positions:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token_text(self.tokenizer, position.token_id))
        top = [{self._name(i): value for i, value in position.top} for position in positions]
        values = [position.logprob for position in positions]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


class ChatFormat:
    """`chat.completion` and its chunks; the first chunk of a choice has its role."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, with_logprobs: bool, as_ids: bool = False):
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self._name = namer(tokenizer, as_ids)

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, **_finish(None)}

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return {"index": index, "delta": content, "logprobs": self._logprobs(delta.logprobs or ()), **_end(delta)}

    def full(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.logprobs)
        return {"index": choice.index, "message": message, "logprobs": logprobs} | choice.finish

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {"content": [self._position(position) for position in positions], "refusal": None}

    def _position(self, position: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(i, value) for i, value in position.top]
        return self._token(position.token_id, position.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(token_bytes(self.tokenizer, token_id))}


Format = CompletionFormat | ChatFormat


def namer(tokenizer: Tokenizer, as_ids: bool) -> Callable[[int], str]:
    """What log-probabilities call a token: its text, which others may have too, or `token_id:123`."""
    return "token_id:{}".format if as_ids else partial(token_text, tokenizer)


def usage(last: Sequence[Delta], n: int) -> dict[str, int]:
    """Token counts from the last Delta of each choice; a prompt with n continuations counts once."""
    prompt = sum(delta.num_prompt_tokens for delta in last[::n])
    generated = sum(delta.num_generated_tokens for delta in last)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _end(delta: Delta) -> dict[str, Any]:
    """The end of a chunk."""
    return {**_finish(delta), "weights_version": delta.version}


def _finish(last: Delta | None) -> dict[str, Any]:
    reason = last.finish_reason if last else None
    return {"finish_reason": reason, "stop_reason": last.stop_reason if last else None}
