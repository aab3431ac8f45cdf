"""The process of one arm: an engine, ours or another's, that runs the loads which its parent sends.

    python -m trinity.bench.rivals.child     a JSON object of orders a line on stdin, a JSON object a line on stdout

Decisions: what the engine prints goes to stderr; processor time is all of this process's, its threads' included, so that
turning in circles while waiting counts. The same loops drive all engines. A rival's environment has no Ray and another torch:
nothing here may need them before an engine of ours is made.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trinity.bench.prefixes import Asked, Talk

KV_BYTES = 1 << 30


def engine(program: str, path: str, threads: int, size: dict[str, int], **more: Any) -> Any:
    """The engine that an arm names, loaded. `size`: max_num_seqs, max_model_len, max_num_batched_tokens."""
    if program == "llama.cpp":
        from trinity.bench.rivals.llama_cpp import LlamaCpp

        return LlamaCpp(Path(path), Path(more["libraries"]), threads, size["max_num_seqs"], size["max_model_len"])
    if program == "vLLM":
        from trinity.bench.rivals.vllm_cpu import VllmCpu

        return VllmCpu(Path(path), kv_cache_bytes=KV_BYTES, **{**more, **size})
    from trinity.config import EngineConfig
    from trinity.llm import LLM

    settings = EngineConfig.model_validate(
        {"num_threads": threads, "kv_cache_bytes": KV_BYTES, "max_draft_tokens": 0, **size}
    )
    return LLM(path, engine=settings, device="cpu", **more).engine


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def decode(engine: Any, prompts: Sequence[Sequence[int]], num_new: int, gaps: bool = False) -> dict[str, Any]:
    """Answer all prompts at once, greedily; -> tokens [B][N], and of the steps after all have a first one: how many, seconds,
    processor seconds and tokens. With `gaps`, how far apart the two likeliest tokens were each time, [B][N]."""
    from trinity.engine.request import SamplingParams

    params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True, logprobs=2 if gaps else None)
    tokens: list[list[int]] = [[] for _ in prompts]
    gaps_BN: list[list[float]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    num_steps = num_first = 0
    first = (0.0, 0.0)
    while engine.has_work:
        for delta in engine.step():
            tokens[int(delta.request_id)] += delta.token_ids
            gaps_BN[int(delta.request_id)] += [each.top[0][1] - each.top[1][1] for each in delta.logprobs or ()]
        num_steps += bool(num_first)
        if not num_first and all(tokens):
            first, num_first = (time.perf_counter(), cpu_s()), sum(map(len, tokens))
    spent = (time.perf_counter() - first[0], cpu_s() - first[1])
    return {
        "tokens": tokens, "gaps": gaps_BN, "num_steps": num_steps, "seconds": spent[0], "cpu_s": spent[1],
        "num_decoded": sum(map(len, tokens)) - num_first,
    }  # fmt: skip


class Heard(Asked):
    """Requests of a load, and of each how many of its tokens its engine had."""

    num_cached = 0

    def _take(self, delta: Any) -> None:
        self.num_cached += 0 if self.answers[delta.request_id] else delta.num_cached_tokens
        super()._take(delta)


def talks(engine: Any, talks: Sequence[dict[str, Any]], concurrency: int, output_len: int) -> dict[str, Any]:
    """A load of prefixes.py, asked greedily."""
    asked = Heard(engine, {"concurrency": concurrency, "output_len": output_len, "temperature": 0.0})
    cpu, began_s = cpu_s(), time.perf_counter()
    asked.run([Talk(**each) for each in talks])
    return {
        "cpu_s": cpu_s() - cpu, "seconds": time.perf_counter() - began_s, "ttft_s": asked.ttft_s,
        "num_cached": asked.num_cached, "prompts": asked.prompts, "answers": asked.answers,
    }  # fmt: skip


LOADS: dict[str, Callable[..., dict[str, Any]]] = {"decode": decode, "talks": talks}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    orders = json.loads(sys.stdin.readline())
    made = engine(**orders)
    print(json.dumps({"mode": getattr(made, "mode", "")}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(LOADS[order.pop("do")](made, **order)), file=answers)
    os._exit(0)  # threads of other people's engines would abort the usual way out


if __name__ == "__main__":
    main()
