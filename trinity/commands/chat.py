"""`trinity chat URL`: a conversation with any OpenAI-compatible server, streamed to the terminal.

`trinity chat CHECKPOINT --local` talks to a checkpoint in this process.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from trinity.config import api_key
from trinity.errors import ConfigError, ModelNotFound, TrinityError, Unavailable

if TYPE_CHECKING:
    from trinity.text.tool_calls.events import Event

Piece = tuple[str, str]  # of "content", "reasoning", or a "call"
Answer = Callable[[list[dict[str, str]]], Iterator[Piece]]


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    if arguments.local:
        return _here(arguments, flags)
    if flags:
        raise ConfigError(f"{flags[0]}: a running server has its own settings; with --local they are this command's")
    key = _read_key(Path(arguments.api_key_file).expanduser()) if arguments.api_key_file else api_key()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=httpx.Timeout(600, connect=5)) as client:
        model = arguments.model or _first_model(client)
        limits = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}

        def answer(messages: list[dict[str, str]]) -> Iterator[Piece]:
            try:
                yield from _stream(client, {"model": model, "messages": messages, "stream": True, **limits})
            except httpx.HTTPError as error:
                raise Lost(f"the server at {arguments.url} was lost: {error}") from None

        return _converse(answer, f"{model} at {arguments.url}", arguments.system)


def _here(arguments: argparse.Namespace, flags: list[str]) -> int:
    """Talk to a checkpoint in this process."""
    from trinity.commands.offline import offline
    from trinity.engine.request import SamplingParams

    given = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    llm = offline(arguments.url, flags)

    def answer(messages: list[dict[str, str]]) -> Iterator[Piece]:
        yield from map(_piece, llm.stream_chat(messages, params))

    return _converse(answer, arguments.url, arguments.system)


def _piece(event: "Event") -> Piece:
    from trinity.text.tool_calls.events import CallArguments, CallBegan, Reasoning, Text

    match event:
        case Text(text):
            return "content", text
        case Reasoning(text):
            return "reasoning", text
        case CallBegan(_, _, name):
            return "call", f"\n{name}"
        case CallArguments(_, piece):
            return "call", piece
    return "content", ""


class Lost(Unavailable):
    """The server has gone: the conversation ends."""


def _converse(answer: Answer, who: str, system: str | None) -> int:
    """Ask and print until an empty line; -> exit code: 2 where a message was refused."""
    failed = False
    messages = [{"role": "system", "content": system}] if system else []
    print(f"{who}; an empty line or Ctrl-D ends", file=sys.stderr)
    while text := _ask():
        messages.append({"role": "user", "content": text})
        try:
            said = _print(answer(messages), sys.stdout.isatty())
        except Lost:
            raise
        except TrinityError as error:
            print(f"{error.message}\n(your last message is dropped; an empty line ends)", file=sys.stderr)
            messages.pop()
            failed = True
            continue
        messages.append({"role": "assistant", **said})
    return 2 if failed else 0


def _read_key(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"key file {path} does not exist")
    return path.read_text().strip()


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _first_model(client: httpx.Client) -> str:
    try:
        models = client.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"no server at {client.base_url} ({error}); start one with `trinity serve`") from None
    if models.status_code != 200:
        raise TrinityError(f"the server answered {models.status_code}: {_message(models.text)}")
    listed = models.json()["data"]
    if not listed:
        raise ModelNotFound("the server lists no model")
    return str(listed[0]["id"])


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[Piece]:
    """Pieces as they come: of "content", "reasoning", or a "call". Raises TrinityError with the server's words where it
    refuses or fails."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise TrinityError(f"the server answered {response.status_code}: {_message(response.read().decode())}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise TrinityError(event["error"]["message"])
            for choice in event["choices"]:
                yield from _pieces(choice["delta"])


def _pieces(delta: dict[str, Any]) -> Iterator[Piece]:
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        yield "call", (f"\n{function['name']}" if function.get("name") else "") + (function.get("arguments") or "")
    yield "reasoning", delta.get("reasoning") or delta.get("reasoning_content") or ""
    yield "content", delta.get("content") or ""


def _print(pieces: Iterator[Piece], in_color: bool) -> dict[str, str]:
    """Show reasoning dimly and calls in another color, each in its own lines; -> what goes back with the next message."""
    said, before = defaultdict[str, str](str), ""
    for kind, text in pieces:
        if text:
            print("\n\n" * (before not in ("", kind)), _dyed(kind, text, in_color), sep="", end="", flush=True)
            said[kind] += text
            before = kind
    print()
    return {"content": said["content"], **({"reasoning": said["reasoning"]} if said["reasoning"] else {})}


def _dyed(kind: str, text: str, in_color: bool) -> str:
    color = {"reasoning": "2", "call": "36"}.get(kind)
    return f"\033[{color}m{text}\033[0m" if in_color and color else text


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]
