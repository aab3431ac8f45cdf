"""An engine that says what it was told to say, a token at a time, and ends by itself unless it is cut."""

import asyncio

from fake import FakeEngine

from trinity.engine.request import Delta
from trinity.text.detokenizer import IncrementalDecoder


class ScriptedEngine(FakeEngine):
    """Each request gets the next of the `scripts`, `per_step` tokens at a time. `prompts` are what was asked, as text."""

    def __init__(self, *scripts, per_step=1, **options):
        super().__init__(**{"max_model_len": 4096, **options})
        self.scripts, self.per_step, self.prompts = list(scripts), per_step, list[str]()

    async def generate(self, request_id, prompt_ids, params=None, deadline_s=None, client=None, adapter=None):
        self.prompts.append(self.tokenizer.decode(prompt_ids))
        self.seen.append(params)
        ids = [*self.tokenizer.encode(self.scripts.pop(0)), self.tokenizer.eos_id]
        cut = ids[: params.max_tokens]
        decoder = IncrementalDecoder(self.tokenizer, skip_special=True)
        for start in range(0, len(cut), self.per_step):
            await asyncio.sleep(0)
            now, end = tuple(cut[start : start + self.per_step]), start + self.per_step
            reason = "stop" if len(cut) == len(ids) else "length"
            yield Delta(
                request_id,
                "".join(map(decoder.push, now)) + (decoder.flush() if end >= len(cut) else ""),
                now,
                finish_reason=reason if end >= len(cut) else None,
                num_prompt_tokens=len(prompt_ids),
                num_generated_tokens=min(end, len(cut)),
            )
