"""Questions to a server of the OpenAI API: so many at a time, again where it was full or away.

Decisions: what may pass (no connection, 408, 425, 429, 502, 503, 504) is asked again until the server has answered nobody for
`patience_s`; the pause doubles, with chance in it so that not all come back together, and is the server's where it says one. A
question that the server fails at (500, no answer in time, nonsense) is asked TRIES times, one that it refuses (4xx) once:
both are the row's failure. A key or a model that is refused ends the run, and so do FIRST_REFUSALS questions that were all
refused: then it is the settings. The same question has the same seed each time.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

from trinity.config import AskedConfig
from trinity.errors import ConfigError, ModelNotFound, Unauthenticated, Unavailable
from trinity.synthesis.styles import Question
from trinity.utils.terminal import say

PASSING = (408, 425, 429, 502, 503, 504)
TRIES = 3
FIRST_REFUSALS = 8
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
SAY_AFTER_S = 5.0
CONNECT_S = 10.0
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Answer(NamedTuple):
    """Words of a server. `facts` go into the row's provenance."""

    text: str
    finish: str | None
    facts: dict[str, Any]


class Failed(NamedTuple):
    """Reason why there is no answer to a question."""

    why: str


class Asker:
    """`async with Asker(...)`: at most `concurrency` questions at a time, of this process. Raises Unavailable, Unauthenticated
    and ModelNotFound, after which nothing more is to be asked."""

    def __init__(self, settings: AskedConfig, url: str, key: str | None, model: str, concurrency: int):
        self.settings, self.url, self.model = settings, url, model
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        timeout = httpx.Timeout(settings.timeout_s, connect=CONNECT_S)
        self._http = httpx.AsyncClient(base_url=url, headers=headers(key), timeout=timeout, limits=limits)
        self._room = asyncio.Semaphore(concurrency)
        self._away_since_s: float | None = None
        self._has_said = False
        self._num_refused = 0  # -1: it takes what we send

    async def __aenter__(self) -> "Asker":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, question: Question) -> Answer | Failed:
        async with self._room:
            body, pause_s, num_tries = self._body(question), FIRST_PAUSE_S, 0
            while True:
                found = await self._once(body)
                if isinstance(found, Answer):
                    return found
                if isinstance(found, Failed):
                    num_tries += 1
                    if num_tries == TRIES or found.why.startswith("refused"):
                        return found
                else:
                    self._wait_or_end(found)
                told_s = found.retry_after_s if isinstance(found, Unavailable) else None
                await asyncio.sleep(told_s or pause_s * random.uniform(0.5, 1))
                pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _body(self, question: Question) -> dict[str, Any]:
        template = question.template
        body = {
            "model": self.model,
            "temperature": template.temperature,
            "top_p": template.top_p,
            "seed": question.seed,
        }
        body |= {"max_tokens": template.max_tokens}
        if self.settings.priority is not None:
            body["priority"] = self.settings.priority
        told = [("system", question.system)] if question.system else []
        if self.settings.api == "chat":
            return body | {
                "messages": [{"role": role, "content": text} for role, text in (*told, ("user", question.prompt))]
            }
        return body | {"prompt": "\n\n".join(text for _, text in (*told, ("user", question.prompt)))}

    async def _once(self, body: Mapping[str, Any]) -> Answer | Failed | Unavailable:
        try:
            reply = await self._http.post(PATHS[self.settings.api], json=body)
        except httpx.TimeoutException as error:
            if not isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
                return Failed(f"no answer within {self.settings.timeout_s:g} s")
            return Unavailable(f"no connection within {CONNECT_S:g} s")
        except httpx.TransportError as error:
            return Unavailable(str(error) or type(error).__name__)
        return self._read(reply)

    def _read(self, reply: httpx.Response) -> Answer | Failed | Unavailable:
        if reply.status_code in PASSING:
            return Unavailable(f"it answers {reply.status_code}", retry_after_s=_retry_after_s(reply))
        self._heard()
        if reply.status_code == 200:
            self._num_refused = -1
            return _answer(reply, self.settings.api)
        self._end_if_all_are_refused(reply)
        return Failed(f"{'refused' if reply.status_code < 500 else 'failed'}: {reply.status_code} {_said(reply)}")

    def _heard(self) -> None:
        if self._has_said:
            say(f"the server at {self.url} answers again")
        self._away_since_s, self._has_said = None, False

    def _wait_or_end(self, why: Unavailable) -> None:
        """Say once that the server has been away for a while; raise Unavailable when it has been for too long."""
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
        away_s = time.monotonic() - self._away_since_s
        if away_s >= self.settings.patience_s:
            raise Unavailable(
                f"the server at {self.url} has answered nothing for {away_s:.0f} s ({why.message}); what is made is kept: when "
                "it is back, start the same command again (server.patience_s waits longer)"
            )
        if away_s >= SAY_AFTER_S and not self._has_said:
            self._has_said = True
            patience_s = f"{self.settings.patience_s:g} s"
            say(f"the server at {self.url} is away or full ({why.message}); waiting up to {patience_s} for it")

    def _end_if_all_are_refused(self, reply: httpx.Response) -> None:
        """Raise what ends the run: a key, a model, or settings that the server does not take."""
        if reply.status_code in (401, 403):
            raise Unauthenticated(f"the server at {self.url} refuses the key ({_said(reply)}); set server.api_key_file")
        if reply.status_code == 404:
            raise ModelNotFound(
                f"the server at {self.url} has no {self.model!r} at {PATHS[self.settings.api]} ({_said(reply)})"
            )
        if reply.status_code < 500 and self._num_refused >= 0:
            self._num_refused += 1
            if self._num_refused == FIRST_REFUSALS:
                hint = "; set server.priority: null" if "priority" in _said(reply) else ""
                raise ConfigError(
                    f"the server at {self.url} refuses every question: {reply.status_code} {_said(reply)}{hint}"
                )


def _answer(reply: httpx.Response, api: str) -> Answer | Failed:
    """The text of a reply, and what it says of itself; a failure where it is none of the API's."""
    try:
        body = reply.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") if api == "chat" else choice["text"]
        usage = body.get("usage") or {}
        facts = {"weights_versions": choice.get("weights_versions"), "fingerprint": body.get("system_fingerprint")}
        facts |= {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
        return Answer(str(text or ""), choice.get("finish_reason"), facts)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Failed(f"failed: no answer of the OpenAI API: {reply.text[:200]!r}")


def _said(reply: httpx.Response) -> str:
    """The server's own sentence."""
    try:
        return str(reply.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return reply.text[:300]


def _retry_after_s(reply: httpx.Response) -> float | None:
    told = reply.headers.get("retry-after", "")
    return min(float(told), LAST_PAUSE_S) if told.replace(".", "", 1).isdigit() else None


def headers(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


class Card(NamedTuple):
    """A model that a server lists, and how many tokens it takes, where the server says so."""

    name: str
    max_model_len: int | None


def card_at(url: str, name: str | None, key: str | None) -> Card:
    """The model of that name, or the first that the server lists; where it lists none, a name is believed. Raises Unavailable,
    Unauthenticated, ModelNotFound."""
    try:
        reply = httpx.get(f"{url}/v1/models", headers=headers(key), timeout=CONNECT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"no server at {url} ({error}); start one, or set server.checkpoint") from None
    if reply.status_code in (401, 403):
        raise Unauthenticated(f"the server at {url} refuses the key ({_said(reply)}); set server.api_key_file")
    cards = _cards(reply)
    if not cards and name is not None:
        return Card(name, None)
    found = next((card for card in cards if name in (None, card.name)), None)
    if found is None:
        raise ModelNotFound(
            f"model {name!r} is not served at {url}; there is {[card.name for card in cards]}: set server.model"
        )
    return found


def _cards(reply: httpx.Response) -> list[Card]:
    """Models that it lists; none where the reply is no list of models."""
    try:
        return [Card(str(card["id"]), card.get("max_model_len")) for card in reply.json()["data"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
