"""The two ceilings: bytes per second of a copy (read and written), FLOP/s of a bf16 product.

Of random values: zeros run faster.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timing import median_s


def measure(run: Any) -> Iterator[dict[str, Any]]:
    num_bytes, size, rounds = (1 << 24, 256, 3) if run.is_small else (4 << 30, 8192, 20)
    source = torch.randint(0, 127, (num_bytes,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy_s = median_s(partial(target.copy_, source), run.device, rounds)
    yield {"what": "copy", "bytes": num_bytes, "TB/s": 2 * num_bytes / copy_s / 1e12}
    a, b = torch.randn(2, size, size, device=run.device, dtype=torch.bfloat16)
    product_s = median_s(lambda: a @ b, run.device, rounds)
    yield {"what": "bf16 product", "size": size, "TFLOP/s": 2 * size**3 / product_s / 1e12}
