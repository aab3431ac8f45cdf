"""A FakeEngine that answers with a script of tokens, whatever it is asked, and tells something else of each of them.

The weights change in the middle of the script. No token gets out beyond `num_free` before `go`.
"""

from contextlib import aclosing

import numpy as np
from fake import HeldEngine

from trinity.engine.request import Delta, TokenLogprobs
from trinity.text.detokenizer import IncrementalDecoder


class TellingEngine(HeldEngine):
    def __init__(self, text="", ends=True, num_free=1 << 30, **options):
        """`text` may hold special tokens; with `ends` the last token is that of the end."""
        super().__init__(num_free, **{"max_model_len": 1 << 20, **options})
        self.script = self.tokenizer.encode(text, add_special=False) + [self.tokenizer.eos_id] * ends
        decoder = IncrementalDecoder(self.tokenizer, skip_special=True)
        self.texts = [decoder.push(token) for token in self.script]
        self.words = list(dict.fromkeys(self.tokenizer.encode(" the quick brown fox jumps over lazy dog def function")))
        self.prompts = []

    async def generate(self, request_id, prompt_ids, params, *more):
        self.prompts.append(list(prompt_ids))
        short = params.model_copy(update={"max_tokens": min(params.max_tokens, len(self.script))})
        async with aclosing(super().generate(request_id, prompt_ids, short, *more)) as deltas:
            async for delta in deltas:
                yield delta

    def _delta(self, request_id, prompt_ids, params, at, last):
        if at == self.fail_after:
            raise self.error
        ended = "stop" if at + 1 == len(self.script) else "length"
        return Delta(
            request_id,
            text=self.texts[at],
            token_ids=(self.script[at],),
            logprobs=None if params.logprobs is None else (self.told(at, params.logprobs),),
            finish_reason=ended if last else None,
            num_prompt_tokens=len(prompt_ids),
            num_generated_tokens=at + 1,
            version=7 + (at >= len(self.script) // 2),
            first_version=7,
            experts_TLK=routing(len(prompt_ids) + at) if params.trace and last else None,
        )

    def told(self, at, num):
        """Every third token is not the likeliest; every fifth is not among the alternatives."""
        logprob = -0.06 * (at * 7 % 61)
        words = [word for word in self.words if word != self.script[at]]
        others = [(words[i], logprob - 0.5 * i - 0.25 + (at % 3 == 2) * 0.5) for i in range(num)]
        top = others if at % 5 == 4 else sorted([(self.script[at], logprob), *others[1:]], key=lambda one: -one[1])
        return TokenLogprobs(self.script[at], logprob, tuple(top[:num]))


def routing(num):
    """[T, 3, 2]"""
    t, layer, k = np.indices((num, 3, 2))
    return ((5 * t + 7 * layer + 3 * k) % 16).astype(np.uint8)
