"""Three optimizer steps of `tiny` with backbone and shards on the device: losses as on the CPU."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from small_run import trainer_in

BOUND = 1e-2


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """Raises RuntimeError where a loss is not the CPU's to 1e-2."""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("bfloat16", "float32"):
            losses, seconds = {}, {}
            for device in dict.fromkeys(("cpu", run.device)):
                trainer, started = trainer_in(Path(folder, device), device, dtype), time.perf_counter()
                losses[device] = [trainer.step().loss for _ in range(3)]
                seconds[device] = time.perf_counter() - started
            apart = max(abs(a / b - 1) for a, b in zip(losses[run.device], losses["cpu"], strict=True))
            yield {"dtype": dtype, "losses": losses, "relative error": apart, "bound": BOUND, "three steps, s": seconds}
            if not apart <= BOUND:
                raise RuntimeError(f"{dtype}: losses {losses} are {apart:.2g} apart, more than {BOUND}")
