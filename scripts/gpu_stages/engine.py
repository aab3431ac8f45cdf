"""Greedy tokens of `tiny` from the engine on the device: in fp32 the CPU's.

Prompts come in chunks, the longest beyond the window.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from small_run import WINDOW, trainer_in

from trinity.config import EngineConfig
from trinity.engine.request import SamplingParams
from trinity.llm import LLM

CHUNK = 128


def llm_on(device: str, checkpoint: Path) -> LLM:
    settings = EngineConfig(max_model_len=1024, kv_cache_bytes=64 << 20, max_num_batched_tokens=CHUNK)
    return LLM(checkpoint, engine=settings, num_shards=2, device=device)


def checkpoint_in(folder: Path) -> Path:
    """Make one of a short run on the CPU, in fp32."""
    trainer = trainer_in(folder, "cpu", steps=2)
    trainer.step()
    return trainer.save()


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """Raises RuntimeError where tokens differ."""
    num_tokens = 16 if run.is_small else 64
    prompts = [[(7 * i + n) % 300 + 10 for i in range(n)] for n in (1, 17, WINDOW + 1, 3 * CHUNK + 5)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_in(Path(folder))
        want = llm_on("cpu", checkpoint).generate(prompts, params)
        got = llm_on(run.device, checkpoint).generate(prompts, params)
    equal = [_num_equal(a.token_ids, b.token_ids) for a, b in zip(got, want, strict=True)]
    yield {"prompts": [len(p) for p in prompts], "chunk": CHUNK, "window": WINDOW, "tokens": num_tokens, "equal": equal}
    if equal != [num_tokens] * len(prompts):
        raise RuntimeError(f"greedy tokens differ from the CPU's after {equal} of {num_tokens} tokens")


def _num_equal(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
