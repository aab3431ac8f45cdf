"""Talk to a server over HTTP with nothing but httpx: list the model, complete at once, complete as a stream.

    .venv/bin/python examples/http_client.py http://127.0.0.1:8000 "def main("

The key, where the server wants one, is in TRINITY_API_KEY. OpenAI's own clients work as well, with `base_url=URL/v1`.
"""

import argparse
import json
import os
from collections.abc import Iterator

import httpx


def client(url: str) -> httpx.Client:
    key = os.environ.get("TRINITY_API_KEY")
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=60)


def checked(answer: httpx.Response) -> httpx.Response:
    """Errors are sentences: show what the server says, not only its status."""
    if answer.is_error:
        raise SystemExit(f"{answer.status_code}: {json.loads(answer.read())['error']['message']}")
    return answer


def complete(http: httpx.Client, body: dict) -> str:
    return checked(http.post("/v1/completions", json=body)).json()["choices"][0]["text"]


def stream(http: httpx.Client, body: dict) -> Iterator[str]:
    """Pieces of the text as they are made. An error after the first token is an event of its own."""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for line in checked(answer).iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise SystemExit(event["error"]["message"])
                yield event["choices"][0]["text"]


def main(arguments: list[str] | None = None) -> tuple[str, str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    with client(given.url) as http:
        model = checked(http.get("/v1/models")).json()["data"][0]["id"]
        body = {"model": model, "prompt": given.prompt, "max_tokens": given.max_tokens, "temperature": 0}
        whole = complete(http, body)
        print(f"{model} says {whole!r}; and once more as a stream:")
        pieces = []
        for piece in stream(http, body):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
    return whole, "".join(pieces)


if __name__ == "__main__":
    main()
