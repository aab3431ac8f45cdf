"""Floating-point operations of training, and how much of the devices' peak they are: MFU.

Legend: H query heads, d their size, S sequence length, ctx_l tokens that a token sees in layer l, on average.
Formula: a token costs 6 N_active + 12 H d sum_l ctx_l, forward and backward, with ctx_l = S / 2 of a full layer and
w - w^2 / (2 S) within a window of w. A multiplication and its addition are two operations.
Decisions: N_active are the parameters that a token is multiplied with. So the embedding is not among them, which is looked up
(published counts of active parameters include it), nor are norms and biases. The mask within documents is not looked at: a
sequence of many short ones is counted as one of its length, as everybody does.
"""

from typing import NamedTuple

from trinity.config import Config, ModelConfig
from trinity.models.registry import family_of

# Dense bf16 without sparsity, TFLOP/s, of the vendors' data sheets; a longer name before one that it begins with.
PEAK_TFLOPS = {
    "GB300": 2500.0, "GB200": 2500.0, "B300": 2250.0, "B200": 2250.0, "B100": 1800.0,
    "GH200": 989.4, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H800": 989.4, "H20": 148.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX PRO 6000": 503.8, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71.0,
    "MI355X": 2516.6, "MI350X": 2306.9, "MI325X": 1307.4, "MI300X": 1307.4, "MI250X": 383.0,
}  # fmt: skip


class FlopsPerToken(NamedTuple):
    """Operations of a token, forward and backward: with weights, and of attention's scores and sums."""

    weights: float
    attention: float

    @property
    def total(self) -> float:
        return self.weights + self.attention


def flops_per_token(model: ModelConfig, seq_len: int) -> FlopsPerToken:
    num_active = family_of(model).count_params(model).multiplied
    sizes = [(cache.key_dim + cache.value_dim, _context(cache.window, seq_len)) for cache in model.layer_caches]
    return FlopsPerToken(6.0 * num_active, 6.0 * model.num_query_heads * sum(dim * seen for dim, seen in sizes))


def _context(window: int | None, seq_len: int) -> float:
    """Tokens that a token of a sequence sees on average, itself counted as a half."""
    reach = min(window or seq_len, seq_len)
    return reach - reach**2 / (2 * seq_len)


def peak_flops(device_name: str) -> float | None:
    """Operations per second that a device of that name can do at most; None of one that is not known."""
    found = (tflops for name, tflops in PEAK_TFLOPS.items() if all(word in device_name for word in name.split()))
    return next((1e12 * tflops for tflops in found), None)


class Utilization:
    """Tokens per second and GPU of a job, and which part of the GPUs' peak that is."""

    def __init__(self, config: Config, num_workers: int, device_name: str | None):
        """`device_name` of a worker's GPU: all of the job are taken to be of its kind. None: workers compute on CPUs."""
        settings, placement = config.train, config.placement
        on_shards = placement.num_gpus_per_shard * placement.num_shards
        self.num_gpus = settings.num_gpus_per_worker * num_workers + on_shards if device_name else 0.0
        given = settings.peak_tflops_per_gpu
        self.peak = 1e12 * given if given else peak_flops(device_name) if device_name else None
        self.flops = flops_per_token(config.model, settings.seq_len).total if self.num_gpus else 0.0

    def of(self, tokens_per_s: float) -> dict[str, float]:
        """Values by the names of StepMetrics. MFU is the model's operations alone by the peak (arXiv 2204.02311, appendix B): what is
        computed twice to save memory does not count. It is left out where the peak is not known, all of it without GPUs."""
        if not self.num_gpus:
            return {}
        per_gpu = tokens_per_s / self.num_gpus
        return {"tokens_per_s_per_gpu": per_gpu, **({"mfu": per_gpu * self.flops / self.peak} if self.peak else {})}
