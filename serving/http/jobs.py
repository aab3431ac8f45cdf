"""Continuations to generate, and how large an answer of them may be before it is sent."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from serving.frontend import Frontend
from serving.http.openai import Choice
from serving.http.schema import ChatRequest
from trinity.engine.request import SamplingParams
from trinity.errors import InvalidRequest

INLINE_BYTES = 64 << 10  # some milliseconds of writing JSON
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to generate."""

    prompt_ids: list[int]
    params: SamplingParams


async def chat_job(front: Frontend, body: ChatRequest) -> tuple[list[int], SamplingParams]:
    """Token ids of the prompt that a chat makes, and the parameters of all its continuations."""
    ids = await front.encode_chat(body.chat, body.add_special_tokens)
    ids = front.truncated(ids, body.params(1 if body.limit is None else body.limit, None))
    limit = front.chat_limit(ids) if body.limit is None else body.limit
    return ids, body.bound(body.params(limit, body.num_logprobs()), front.answers.tool_format)


def check_size(front: Frontend, jobs: Sequence[GenerationRequest], is_streamed: bool) -> None:
    """Refuse an answer that is too large to be held before it is sent. Of a stream only routed experts are held."""
    tokens = [min(job.params.max_tokens, front.room(job.prompt_ids)) for job in jobs]
    held = [0 if is_streamed else Choice.most_bytes(n, j.params.logprobs) for n, j in zip(tokens, jobs, strict=True)]
    scored = [job for job in jobs if job.params.prompt_logprobs is not None and not is_streamed]
    held += [Choice.most_bytes(len(job.prompt_ids), job.params.prompt_logprobs) for job in scored]
    routed = [len(job.prompt_ids) + num for num, job in zip(tokens, jobs, strict=True) if job.params.trace]
    size = sum(held) + 4 * sum(routed) * front.info.routed_bytes // 3
    if size > (most := front.config.max_answer_bytes):
        raise InvalidRequest(
            f"the answer may have {size:,} bytes; serve.max_answer_bytes is {most:,}. Stream it, or ask for less: "
            "fewer max_tokens, logprobs, prompt_logprobs, n or prompts."
        )


async def chain(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event
