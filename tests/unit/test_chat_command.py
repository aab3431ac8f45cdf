"""`trinity chat`: what it shows of an answer, and what goes back with the next message."""

import argparse
import json

import httpx
import pytest

from trinity.commands import chat

DELTAS = [
    {"role": "assistant", "content": ""},
    {"reasoning": "Hm", "reasoning_content": "Hm"},
    {"reasoning_content": "m."},
    {"content": "Yes"},
    {"content": "."},
    {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
]


def server(seen):
    def answer(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        seen.append(json.loads(request.content)["messages"])
        events = [{"choices": [{"delta": delta}]} for delta in DELTAS]
        return httpx.Response(
            200, text="".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        )

    return httpx.MockTransport(answer)


@pytest.mark.parametrize(
    ("in_color", "shown"), [(False, 'Hmm.\n\nYes.\n\n\nnow{"a": 1}\n'), (True, "\033[2mHm\033[0m")]
)
def test_reasoning_and_calls_are_shown_apart(monkeypatch, capsys, in_color, shown):
    seen, asked = [], iter(["one", "two", ""])
    make = httpx.Client
    monkeypatch.setattr(chat.httpx, "Client", lambda **options: make(**options, transport=server(seen)))
    monkeypatch.setattr(chat, "_ask", lambda: next(asked))
    monkeypatch.setattr("sys.stdout.isatty", lambda: in_color, raising=False)
    given = {
        "url": "http://test",
        "api_key_file": None,
        "system": None,
        "model": None,
        "max_tokens": 9,
        "temperature": 1.0,
        "local": False,
    }
    assert chat.run(argparse.Namespace(**given), []) == 0
    assert capsys.readouterr().out.startswith(shown)
    assert seen[1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Yes.", "reasoning": "Hmm."},
        {"role": "user", "content": "two"},
    ]
