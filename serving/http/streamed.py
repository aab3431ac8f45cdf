"""Answers that are sent while they are made: a piece at a time, so that none keeps the streams of others waiting, and no faster
than they are read."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

PIECE = 1024  # numbers in one


class Streamed(Response):
    """The source is closed however the sending ends."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self.pieces = pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self.pieces) as pieces:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def with_text(name: str, texts: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
    """The JSON of `{name: the texts as one}`."""
    yield f'{{"{name}":"'.encode()
    async with aclosing(texts):
        async for text in texts:
            yield json.dumps(text, ensure_ascii=False)[1:-1].encode()
    yield b'"}'


async def with_numbers(name: str, numbers: Sequence[int], rest: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """The JSON of `{name: numbers, **rest}`."""
    yield f'{{"{name}":['.encode()
    for start in range(0, len(numbers), PIECE):
        yield ("," * (start > 0) + ",".join(map(str, numbers[start : start + PIECE]))).encode()
        await asyncio.sleep(0)
    yield f"],{json.dumps(rest, separators=(',', ':'))[1:]}".encode()
