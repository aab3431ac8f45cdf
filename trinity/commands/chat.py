"""`trinity chat URL`: a conversation with any OpenAI-compatible server, streamed to the terminal."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from trinity.config import api_key
from trinity.errors import ConfigError, ModelNotFound, TrinityError, Unavailable


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    key = _read_key(Path(arguments.api_key_file).expanduser()) if arguments.api_key_file else api_key()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    failed = False
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=httpx.Timeout(600, connect=5)) as client:
        model = arguments.model or _first_model(client)
        print(f"{model} at {arguments.url}; an empty line or Ctrl-D ends", file=sys.stderr)
        while text := _ask():
            messages.append({"role": "user", "content": text})
            asked = {"model": model, "messages": messages, "stream": True}
            limits = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
            try:
                answer = _print(_stream(client, {**asked, **limits}), sys.stdout.isatty())
            except TrinityError as error:
                print(f"{error.message}\n(your last message is dropped; an empty line ends)", file=sys.stderr)
                messages.pop()
                failed = True
                continue
            except httpx.HTTPError as error:
                raise Unavailable(f"the server at {arguments.url} was lost: {error}") from None
            messages.append({"role": "assistant", **answer})
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


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
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


def _pieces(delta: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        yield "call", (f"\n{function['name']}" if function.get("name") else "") + (function.get("arguments") or "")
    yield "reasoning", delta.get("reasoning") or delta.get("reasoning_content") or ""
    yield "content", delta.get("content") or ""


def _print(pieces: Iterator[tuple[str, str]], in_color: bool) -> dict[str, str]:
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
