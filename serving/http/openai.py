"""Answers in OpenAI's shapes: whole ones and server-sent chunks, for completions and chat completions.

Pure functions over collected Deltas; no I/O. Token texts come from the tokenizer's byte table, because a token may hold
part of a character. `system_fingerprint` tells the version of the weights, which may change between two requests, and what
they are computed in. Where the version changed within one, its choice says so: a chunk has `weights_version`, a whole choice
`weights_versions`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.http import schema
from serving.http.logprobs import Echo, Offsets, in_parts, joined_lists, namer, openai_lists, prompt_entries
from trinity.engine.numerics import Numerics
from trinity.engine.prompt_logprobs import PromptLogprobs
from trinity.engine.request import Delta, TokenLogprobs
from trinity.text.answers import Parser, read
from trinity.text.detokenizer import token_bytes
from trinity.text.tokenizer import Tokenizer
from trinity.text.tool_calls.events import CallArguments, CallBegan, Event, Reasoning, Text, answer_of

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
    scores: PromptLogprobs | None = None
    last: Delta | None = None

    @property
    def size(self) -> int:
        """About as many bytes as it will have."""
        routed = 0 if self.experts_TLK is None else self.experts_TLK.nbytes
        prompt = 0 if self.scores is None else len(self.scores) * (1 + self.scores.top_ids_SN.shape[1])
        listed = prompt + sum(1 + len(position.top) for position in self.logprobs)
        return len(self.text) + routed + LOGPROB_BYTES * listed

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
        self.scores = self.scores or delta.prompt_logprobs
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
    numerics: Numerics

    def wrap(self, kind: str, choices: list[dict[str, Any]], version: int, **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        head |= {"system_fingerprint": self.numerics.fingerprint(version), **self.numerics.told}
        return {**head, "choices": choices, **more}


class CompletionFormat:
    """`text_completion`. `echoes` has, for each choice, the prompt to put before it. Choices keep an offset into the text."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, body: schema.CompletionRequest, echoes: Sequence[Echo | None]):
        self.tokenizer, self.echoes, self._name = tokenizer, echoes, namer(tokenizer, body.return_tokens_as_token_ids)
        self.num_logprobs, self.num_prompt_logprobs = body.logprobs, body.sampling.prompt_logprobs
        starts, skips = (len(echo.text) if echo else 0 for echo in echoes), body.sampling.skip_special_tokens
        self._offsets = [Offsets(tokenizer, start, skip_special=skips) for start in starts]

    def openings(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        for part in self._before(index, delta.prompt_logprobs):
            yield {"choices": [{"index": index, **part, **_finish(None)}]}

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        logprobs = self._logprobs(index, delta.logprobs or ())
        return [{"index": index, "text": delta.text, "logprobs": logprobs, **_end(delta)}]

    def full(self, choice: Choice) -> dict[str, Any]:
        index, before = choice.index, list(self._before(choice.index, choice.scores))
        listed = self._logprobs(index, choice.logprobs)
        if listed is not None:
            listed = joined_lists([*(part["logprobs"] for part in before), listed])
        text = "".join(part["text"] for part in before) + choice.text
        scores = [entry for part in before for entry in part.get("prompt_logprobs", ())]
        more = {} if self.num_prompt_logprobs is None else {"prompt_logprobs": scores}
        return {"index": index, "text": text, "logprobs": listed, **more} | choice.finish

    def more(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Fields of the whole answer beside its choices."""
        return {}

    def _before(self, index: int, scores: PromptLogprobs | None) -> Iterator[dict[str, Any]]:
        """Parts of what comes before the answer: the prompt's text, and how likely its tokens are."""
        echo = self.echoes[index]
        text = echo.text if echo else ""
        if scores is None and text:
            yield {"text": text, "logprobs": None}
        if scores is None:
            return
        offsets = Offsets(self.tokenizer, echo.start if echo else 0, end=len(text))
        for ids, positions in in_parts(scores):
            part: dict[str, Any] = {"text": text, "logprobs": None}
            if echo and self.num_logprobs is not None:
                part["logprobs"] = openai_lists(self._name, ids, positions, self.num_logprobs, offsets)
            if self.num_prompt_logprobs is not None:
                part["prompt_logprobs"] = prompt_entries(self.tokenizer, positions, self.num_prompt_logprobs)
            yield part
            text = ""

    def usage_details(self) -> dict[str, Any]:
        return {}

    def _logprobs(self, index: int, positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self.num_logprobs is None:
            return None
        ids = [position.token_id for position in positions]
        return openai_lists(self._name, ids, positions, self.num_logprobs, self._offsets[index])


class ChatFormat:
    """`chat.completion` and its chunks; the first chunk of a choice has its role. Each choice has its parser.

    A chunk holds text, or reasoning, or a piece of one call: clients take what they look for first. Reasoning has both names
    that clients know; calls are left out where there are none, because an empty list counts as some.
    """

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: schema.ChatRequest,
        parsers: Sequence[Parser],
        includes_reasoning: bool | None = None,
    ):
        """`includes_reasoning`: None where the model has none."""
        self.tokenizer, self._name = tokenizer, namer(tokenizer, body.return_tokens_as_token_ids)
        self.with_logprobs, self.num_prompt_logprobs = body.logprobs, body.sampling.prompt_logprobs
        self.parsers, self.includes_reasoning = parsers, includes_reasoning
        self._is_named = not isinstance(body.tool_choice, str)

    def openings(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The role, and once for all choices how likely the prompt's tokens are, in parts."""
        first = {"role": "assistant", "content": ""}
        yield {"choices": [{"index": index, "delta": first, "logprobs": None, **_finish(None)}]}
        empty = {"index": index, "delta": {}, "logprobs": None, **_finish(None)}
        for part in self._prompt(delta.prompt_logprobs if index == 0 else None):
            yield {"choices": [empty], "prompt_logprobs": part}

    def pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        events = read(self.parsers[index], delta.token_ids, delta.text, delta.finish_reason is not None)
        found = list(filter(None, map(self._piece, events))) or [{}]
        middle = {"logprobs": None, **_finish(None), "weights_version": delta.version}
        choices = [{"index": index, "delta": piece, **middle} for piece in found]
        choices[0] |= {"logprobs": self._logprobs(delta.logprobs or ())}
        choices[-1] |= self._ending(index, _end(delta))
        return choices

    def full(self, choice: Choice) -> dict[str, Any]:
        answer = answer_of(read(self.parsers[choice.index], choice.token_ids, choice.text, is_last=True))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text or (None if answer.calls else ""),
            "refusal": None,
        }
        if self.includes_reasoning is not None:
            message |= _reasoning(answer.reasoning or None if self.includes_reasoning else None)
        if answer.calls:
            message["tool_calls"] = [_call(call.id, call.name, call.arguments) for call in answer.calls]
        logprobs = self._logprobs(choice.logprobs)
        ending = self._ending(choice.index, choice.finish)
        return {"index": choice.index, "message": message, "logprobs": logprobs} | ending

    def usage_details(self) -> dict[str, Any]:
        thought = sum(parser.num_reasoning_tokens for parser in self.parsers)
        return {"completion_tokens_details": {"reasoning_tokens": thought}}

    def _piece(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Text(text):
                return {"content": text}
            case Reasoning(text) if self.includes_reasoning:
                return _reasoning(text)
            case CallBegan(index, call_id, name):
                return {"tool_calls": [{"index": index, **_call(call_id, name, "")}]}
            case CallArguments(index, piece):
                return {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
        return None

    def _ending(self, index: int, ending: dict[str, Any]) -> dict[str, Any]:
        """A stop after calls is theirs, unless one was asked for by name (OpenAI's rule); clients act on them, and look for
        some."""
        calls = ending["finish_reason"] == "stop" and self.parsers[index].num_calls > 0 and not self._is_named
        return ending | ({"finish_reason": "tool_calls"} if calls else {})

    def more(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Fields of the whole answer beside its choices."""
        if self.num_prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": [entry for part in self._prompt(choices[0].scores) for entry in part]}

    def _prompt(self, scores: PromptLogprobs | None) -> Iterator[list[dict[str, Any] | None]]:
        if scores is not None and self.num_prompt_logprobs is not None:
            for _, positions in in_parts(scores):
                yield prompt_entries(self.tokenizer, positions, self.num_prompt_logprobs)

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {"content": [self._position(position) for position in positions], "refusal": None}

    def _position(self, position: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(i, value) for i, value in position.top]
        return self._token(position.token_id, position.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(token_bytes(self.tokenizer, token_id))}


def _reasoning(text: str | None) -> dict[str, Any]:
    return {"reasoning": text, "reasoning_content": text}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


Format = CompletionFormat | ChatFormat


def usage(last: Sequence[Delta], n: int) -> dict[str, Any]:
    """Token counts from the last Delta of each choice; a prompt with n continuations counts once, and what was computed for one
    of them was not cached."""
    prompt = sum(delta.num_prompt_tokens for delta in last[::n])
    generated = sum(delta.num_generated_tokens for delta in last)
    cached = sum(min(delta.num_cached_tokens for delta in last[i : i + n]) for i in range(0, len(last), n))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _end(delta: Delta) -> dict[str, Any]:
    """The end of a chunk."""
    return {**_finish(delta), "weights_version": delta.version}


def _finish(last: Delta | None) -> dict[str, Any]:
    reason = last.finish_reason if last else None
    return {"finish_reason": reason, "stop_reason": last.stop_reason if last else None}
