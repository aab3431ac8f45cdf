"""Forms that matrices are written in by `trinity convert --to`, as compressed-tensors lays them out and others load them.

Legend: N outputs and K inputs of a matrix.

    int8    weight I8 [N, K], weight_scale F32 [N, 1]                     rows of activations are rounded the same way
    fp8     weight F8_E4M3 [N, K], weight_scale F32 [N / 128, K / 128]    activations in groups of 128
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from trinity.ops import formats

BLOCK = (128, 128)  # of fp8: rows and columns that share a scale


@dataclass(frozen=True)
class Form:
    """A form by its name. `made`: the stored matrix and its scales; the rest is what compressed-tensors calls it."""

    name: str
    made: Callable[[Tensor], tuple[Tensor, Tensor]]
    format: str
    weights: dict[str, Any]
    activations: dict[str, Any]

    def settings(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config` of a model in that form. `ignore`: linear layers that are not."""
        usual = {"num_bits": 8, "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**usual, "dynamic": False, **self.weights},
            "input_activations": {**usual, "dynamic": True, **self.activations},
            "output_activations": None,
            "format": self.format,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }


INT8 = Form(
    "int8",
    formats.to_int8,
    "int-quantized",
    {"type": "int", "strategy": "channel"},
    {"type": "int", "strategy": "token"},
)
FP8 = Form(
    "fp8",
    partial(formats.to_fp8, block=BLOCK),
    "float-quantized",
    {"type": "float", "strategy": "block", "block_structure": list(BLOCK)},
    {"type": "float", "strategy": "group", "group_size": BLOCK[1]},
)
FORMS = {form.name: form for form in (INT8, FP8)}
