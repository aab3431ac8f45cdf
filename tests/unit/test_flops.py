"""Operations of a token are those that torch counts, and the published figures; MFU is there where there are GPUs."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trinity.config import Config, preset
from trinity.dispatch.transport import Done
from trinity.models.common.attention import PackedAttention, causal_mask, packed_positions
from trinity.models.registry import build, family_of
from trinity.train.flops import Utilization, flops_per_token, peak_flops

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.mark.parametrize(
    ("name", "seq_len", "weights", "attention"),
    [("large", 8192, 80.2, 14.7), ("mini", 4096, 20.8, 2.6), ("nano", 4096, 6.1, 1.15)],
)
def test_published_figures(name, seq_len, weights, attention):
    """They count the embedding and the norms as if tokens were multiplied with them."""
    model = preset(name)
    counts, found = family_of(model).count_params(model), flops_per_token(model, seq_len)
    looked_up = 6 * (counts.by_role["embedding"] + counts.by_role["norm"])
    assert (found.weights + looked_up) / 1e9 == pytest.approx(weights, abs=0.06)
    assert found.attention / 1e9 == pytest.approx(attention, abs=0.06)
    assert found.weights + looked_up == 6 * counts.active


class TopK(torch.nn.Module):
    """Routed experts of the right size, as many as a token goes to."""

    def __init__(self, config):
        super().__init__()
        dim, inner = config.hidden_size, config.moe_intermediate_size
        self.up, self.gate = (torch.nn.Parameter(torch.randn(inner, dim)) for _ in range(2))
        self.down = torch.nn.Parameter(torch.randn(dim, inner))

    def begin(self, layer, x_TD, ids_TK, weights_TK):
        slots = [(torch.sigmoid(x_TD @ self.gate.T) * (x_TD @ self.up.T)) @ self.down.T for _ in ids_TK.T]
        return Done(sum(weight_T[:, None] * y_TD for weight_T, y_TD in zip(weights_TK.T, slots, strict=True)))


@pytest.mark.parametrize("name", ["tiny", "glm-4.5-air"])
def test_operations_are_those_that_torch_counts(name):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "vocab_size": 256, "head_dim": 16}
    few = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
    tree = {"preset": name, **sizes, **few, "num_experts_per_tok": 2, "batch_invariant": False, "dtype": "float32"}
    config = Config.from_tree({"model": tree}).model
    model = build(config, TopK(config))
    for weight in model.weights().values():
        torch.nn.init.normal_(weight, std=0.02)
    batch, seq = 2, 24
    ids_T, attend = torch.zeros(batch * seq, dtype=torch.long), PackedAttention(config, None, batch, seq)
    with FlopCounterMode(display=False) as counter:
        out = model(ids_T, packed_positions(batch, seq), attend)
        model.logits(out.hidden_TD).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(number for kind, number in counted.items() if kind in PRODUCTS)
    assert products == batch * seq * flops_per_token(config, seq).weights


@pytest.mark.parametrize(("name", "seq_len"), [("tiny", 32), ("tiny", 256), ("mini", 2048), ("mini", 3000)])
def test_attention_sees_what_the_masks_show(name, seq_len):
    config = preset(name)
    windows = Counter(cache.window for cache in config.layer_caches)
    shown = sum(num * int(causal_mask(seq_len, w, None, torch.device("cpu")).sum()) for w, num in windows.items())
    want = 12 * config.num_attention_heads * config.head_dim * shown / seq_len
    assert flops_per_token(config, seq_len).attention == pytest.approx(
        want, rel=2 / min(seq_len, config.sliding_window)
    )


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA GH200 480GB", 989.4), ("Quadro X", None),
    ],
)  # fmt: skip
def test_peaks_go_by_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else 1e12 * tflops)


def job(shards=0.0, **train):
    return Config.from_tree(
        {"model": "tiny", "train": train, "placement": {"num_shards": 4, "num_gpus_per_shard": shards}}
    )


def test_gpus_of_workers_and_shards_count():
    config = job(num_gpus_per_worker=1, shards=0.5, num_workers=2)
    found = Utilization(config, 2, "NVIDIA H100 80GB HBM3").of(1e6)
    flops = flops_per_token(config.model, config.train.seq_len).total
    assert found["tokens_per_s_per_gpu"] == 1e6 / 4
    assert found["mfu"] == pytest.approx(1e6 * flops / (4 * 989.4e12))


def test_the_peak_may_be_given_and_must_be_known():
    given = Utilization(job(num_gpus_per_worker=1, peak_tflops_per_gpu=100), 1, "a new one").of(1e6)
    usual = Utilization(job(num_gpus_per_worker=1, peak_tflops_per_gpu=989.4), 1, "a new one").of(1e6)
    assert given["mfu"] == pytest.approx(9.894 * usual["mfu"])
    assert Utilization(job(num_gpus_per_worker=1), 1, "a new one").of(5.0) == {"tokens_per_s_per_gpu": 5}


def test_cpus_have_no_mfu():
    assert Utilization(job(peak_tflops_per_gpu=1), 2, None).of(1e6) == {}
