"""How often the host waits for the device in one decode pass and one training step, and which attention kernels run.

A report: it fails only where a pass does. On a CPU there is nothing to wait for, and the counts are 0.
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from engine import checkpoint_in, llm_on
from small_run import trainer_in
from torch.profiler import ProfilerActivity, profile

from trinity.engine.request import SamplingParams

ATTENTION = ("scaled_dot_product", "flash", "fmha", "cudnn", "efficient_attention", "sdpa")
ROOT = str(Path(__file__).parents[2])


def measure(run: Any) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        llm = llm_on(run.device, checkpoint_in(Path(folder, "engine")))
        for i in range(4):
            llm.engine.add(str(i), [20 + i, 30], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        for _ in range(3):
            llm.engine.step()
        yield {"pass": "decode, 4 sequences", **looked_at(llm.engine.step, run.device)}
        for dtype in ("float32", "bfloat16"):
            trainer = trainer_in(Path(folder, dtype), run.device, dtype, steps=8)
            trainer.step()
            yield {"pass": f"training step, {dtype}", **looked_at(trainer.step, run.device)}


def looked_at(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """One pass that counts waits, one that is profiled."""
    waits = _waits(step) if device == "cuda" else Counter[str]()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiled:
        step()
    counts = {event.key: event.count for event in profiled.key_averages()}
    return {
        "syncs": sum(waits.values()),
        "where": dict(waits.most_common(20)),
        "launches": sum(n for key, n in counts.items() if "LaunchKernel" in key),
        "operators": sum(n for key, n in counts.items() if key.startswith("aten::")),
        "attention": {key[:100]: n for key, n in counts.items() if any(word in key.lower() for word in ATTENTION)},
    }


def _waits(step: Callable[[], Any]) -> Counter[str]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [w for w in caught if "synchroniz" in str(w.message)]
    return Counter(f"{w.filename.removeprefix(ROOT + '/')}:{w.lineno}" for w in places)
