"""The life of shards on the device, as tests/unit/test_device.py tells it, against the same life on the CPU.

Three shards with two replicas of every expert, their memory in a folder: load, infer, backward, prepare with the peers'
gradients arriving in host memory, stage, commit, an expert moved and pruned; twice.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.unit.test_device import life
from trinity.config import preset

# Of answers and of norms. A step is held to it in fp32 only: Muon makes of rounding in bf16 another update.
BOUNDS = {"float32": 1e-3, "bfloat16": 3e-2}


def measure(run: Any) -> Iterator[dict[str, Any]]:
    """Raises RuntimeError where the device fails, or differs by more than rounding."""
    faults = []
    for dtype, backend in (("float32", "torch"), ("bfloat16", "torch"), ("bfloat16", "auto")):
        model = preset("tiny").model_copy(update={"dtype": dtype})
        try:
            with tempfile.TemporaryDirectory() as folder:
                got = life(run.device, Path(folder), model, backend)
        except Exception as error:  # the next combination may well work: there is one visit to a GPU
            yield {"dtype": dtype, "backend": backend, "error": repr(error)[:500]}
            faults.append(f"{dtype} {backend} failed with {type(error).__name__}")
            continue
        want = life("cpu", None, model, "torch")
        errors = {kind: max(map(difference, got[kind], want[kind])) for kind in want}
        yield {"dtype": dtype, "backend": backend, "bound": BOUNDS[dtype], "largest relative errors": errors}
        held_to = errors if dtype == "float32" else {"answers": errors["answers"]}
        faults += [f"{dtype} {backend} {kind}: {e:.2g}" for kind, e in held_to.items() if not e <= BOUNDS[dtype]]
    if faults:
        raise RuntimeError(f"the device is not as the CPU: {'; '.join(faults)}")


def difference(got: Any, want: Any) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))
