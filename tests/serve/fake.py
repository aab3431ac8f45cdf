"""A stand-in for AsyncEngine: same API, no model. It answers a prompt with the prompt's own tokens, over and over.

`delay_s` is the time of a token; `held` counts what a real engine would hold in its cache; `fail_after` makes request
streams raise after so many tokens. With `obeys`, words of the prompt make it refuse or fail (see `_obey`). With a
folder as `gate`, a prompt with the word "stay" has a file in it, and gets no token while the file "shut" is there, too.
"""

import asyncio
import functools
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trinity.config import AdapterRef, Client
from trinity.engine.defaults import SamplingDefaults
from trinity.engine.key_log import KeyChanges
from trinity.engine.prefix_keys import KeyBase
from trinity.engine.prompt_logprobs import PromptLogprobs
from trinity.engine.request import Delta, SamplingParams, TokenLogprobs
from trinity.errors import Overloaded, Unavailable
from trinity.text.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog; 0123456789 def function(argument): return None\n" * 40


@functools.cache
def fake_tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([TEXT]), vocab_size=300)


@dataclass(frozen=True)
class Stats:
    num_running: int
    num_waiting: int = 0


NONE = SamplingDefaults()


class Begun:
    """A request that its engine's `generate` answers, as AsyncEngine.submit has it."""

    def __init__(self, stream, put):
        self._task = asyncio.create_task(self._run(stream, put))

    def close(self):
        self._task.cancel()

    async def _run(self, stream, put):
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    put(delta)
        except Exception as error:
            put(error)


class FakeEngine:
    def __init__(
        self, max_model_len=128, delay_s=0.0, fail_after=None, error=None, obeys=False, gate=None, defaults=NONE
    ):
        self.max_model_len, self.delay_s, self.obeys, self.gate = max_model_len, delay_s, obeys, gate
        self.fail_after, self.error = fail_after, error or Unavailable("a shard is gone")
        self.held: set[str] = set()
        self.seen: list[SamplingParams] = []
        self.clients: list[Client | None] = []
        self.adapters: list[AdapterRef | None] = []
        self.healthy, self.version = True, 7
        self.num_cached = self.num_resets = 0
        self.key_base, self.gives_way, self.prompts, self.prefilled = None, False, [], []
        self.defaults, self.routed_bytes, self.moe_layers = defaults, 6, (2, 3, 4)
        self.tokenizer = fake_tokenizer()

    async def generate(
        self,
        request_id,
        prompt_ids,
        params=None,
        deadline_s=None,
        client=None,
        adapter=None,
        begun=None,
        prefilled=None,
    ):
        self.prefilled.append(prefilled)
        done = len(begun.token_ids) if begun else 0
        self.seen.append(params)
        self.prompts.append(prompt_ids)
        self.clients.append(client)
        self.adapters.append(adapter)
        self.held.add(request_id)
        room = min(params.max_tokens, self.max_model_len - len(prompt_ids))
        try:
            if self.gate and "stay" in self.tokenizer.decode(prompt_ids):
                await self._stay(self.gate / request_id)
            if not room:
                yield self._scored(
                    Delta(request_id, "", (), None, "length", num_prompt_tokens=len(prompt_ids)), prompt_ids, params
                )
            for at in range(done, room):
                await asyncio.sleep(self.delay_s)
                yield self._delta(request_id, prompt_ids, params, at, at + 1 == room)
        finally:
            self.held.discard(request_id)

    def submit(self, put, *asked, **more):
        return Begun(self.generate(*asked, **more), put)

    async def _stay(self, sign):
        sign.touch()
        try:
            while (self.gate / "shut").exists():
                await asyncio.sleep(0.01)
        finally:
            sign.unlink()

    def _delta(self, request_id, prompt_ids, params, at, last):
        if at == self.fail_after:
            raise self.error
        if self.obeys:
            self._obey(self.tokenizer.decode(prompt_ids))
        token = prompt_ids[at % len(prompt_ids)]
        top = tuple((i, -1.0 - i) for i in range(params.logprobs or 0))
        delta = Delta(
            request_id,
            text=self.tokenizer.decode([token], skip_special=True),
            token_ids=(token,),
            logprobs=None if params.logprobs is None else (TokenLogprobs(token, -0.5, top),),
            finish_reason="length" if last else None,
            num_prompt_tokens=len(prompt_ids),
            num_generated_tokens=at + 1,
            version=7 + at,
            first_version=7,
            num_cached_tokens=self.num_cached,
            experts_TLK=np.zeros((len(prompt_ids) + at, 3, 2), np.uint8) if params.trace and last else None,
        )
        return delta if at else self._scored(delta, prompt_ids, params)

    def _scored(self, delta, prompt_ids, params):
        """The token at position p has the log-probability -p / 2 and rank 2; the alternatives are the ids from 0 on."""
        if params.prompt_logprobs is None:
            return delta
        scores = PromptLogprobs.empty(prompt_ids, params.prompt_logprobs)
        scores.logprob_S[:] = -np.arange(1, len(prompt_ids)) / 2
        scores.rank_S[:] = 2
        scores.top_ids_SN[:] = np.arange(params.prompt_logprobs)
        scores.top_logprobs_SN[:] = -1.0 - np.arange(params.prompt_logprobs)
        return replace(delta, prompt_logprobs=scores)

    def _obey(self, text):
        if "refuse" in text:
            raise Overloaded("the queue is full", retry_after_s=2.5)
        if "fail" in text:
            raise RuntimeError("/secret/path")

    async def prefill(self, request_id, prompt_ids, *rest):
        self.prompts.append(prompt_ids)
        if self.gate:
            (self.gate.parent / "prefilled").touch()
        return f"blocks of {request_id}"

    def key_changes(self, since):
        return KeyChanges(0, True, b"", b"")

    def give_way(self, gives_way):
        self.gives_way = gives_way

    def reset_prefix_cache(self):
        self.num_resets += 1

    def stats(self):
        return Stats(len(self.held))

    def close(self):
        self.healthy = False


class HeldEngine(FakeEngine):
    """No request gets more than `num_free` tokens before `go`."""

    def __init__(self, num_free=0, **options):
        super().__init__(**options)
        self.num_free, self.go = num_free, asyncio.Event()

    async def generate(self, *request):
        async with aclosing(super().generate(*request)) as deltas:
            async for delta in deltas:
                if delta.num_generated_tokens > self.num_free:
                    await self.go.wait()
                yield delta


def build(checkpoint: str, config_json: str):
    """The engine factory of the Ray tests: the checkpoint is a folder, the model's name and the gate. While there is a file
    "never" beside it, engines are not done, and "building" is there, too."""
    gate = Path(checkpoint)
    while (gate.parent / "never").exists():
        (gate.parent / "building").touch()
        time.sleep(0.05)
    engine = FakeEngine(max_model_len=4096, delay_s=0.01, obeys=True, gate=gate)
    engine.key_base = KeyBase("fake", 16)
    return engine, fake_tokenizer(), gate.name
