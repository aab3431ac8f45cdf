"""transformers' own model of a configuration with random weights, and the same weights in ours.

Legend: B batch, S sequence.
All weights are random, router gates, biases and norm gains included, so that nothing agrees by being trivially zero.
"""

from functools import partial
from typing import Any

import torch
from transformers import AfmoeConfig as HfAfmoeConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.parity.dense import DenseExperts
from trinity.config import ModelConfig
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import build, write_config


def hf_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """transformers' own model, from the config.json that we write, with random weights."""
    tree = {key: value for key, value in write_config(config).items() if key not in ("architectures", "dtype")}
    made = partial(HfAfmoeConfig) if config.model_type == "afmoe" else partial(AutoConfig.for_model, tree["model_type"])
    hf_config = made(**{key: value for key, value in tree.items() if key not in ("model_type", "rope_theta")})
    hf_config._attn_implementation = ["eager", "sdpa"][seed % 2]
    model = AutoModelForCausalLM.from_config(hf_config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(weight.shape, generator=generator)
        if "inv_freq" in name:
            continue
        if name.endswith("bias"):
            weight.data.copy_(0.3 * noise)
        else:
            gain = name.endswith("norm.weight")
            weight.data.copy_(1 + 0.3 * noise if gain else noise * max(1, weight.shape[-1]) ** -0.5)
    return model


def twin(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, CausalLM, DenseExperts]:
    """The same random weights in transformers' model and in ours."""
    hf = hf_model(config, seed)
    experts = DenseExperts.from_hf(hf)
    ours = build(config, experts)
    theirs = {key: value for key, value in hf.state_dict().items() if ".mlp.experts." not in key}
    assert theirs.keys() == ours.tensors().keys()
    ours.load(theirs)
    return hf, ours, experts


def gradients(hf: PreTrainedModel, ours: CausalLM, experts: DenseExperts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and theirs by checkpoint key, after a backward of each; routed experts as `experts.{layer}.{0, 1, 2}`."""
    theirs = {name: p.grad for name, p in hf.named_parameters() if ".mlp.experts." not in name and p.requires_grad}
    mine: dict[str, Any] = {name: p.grad for name, p in ours.weights().items()}
    assert mine.keys() == theirs.keys()
    for layer, leaves in experts.weights.items():
        moe = hf.model.layers[layer].mlp.experts
        pairs = zip(leaves, (*moe.gate_up_proj.grad.chunk(2, dim=1), moe.down_proj.grad), strict=True)
        for i, (leaf, grad) in enumerate(pairs):
            mine[f"experts.{layer}.{i}"], theirs[f"experts.{layer}.{i}"] = leaf.grad, grad
    return mine, theirs


def our_logits(model: CausalLM, ids_BS: torch.Tensor) -> torch.Tensor:
    batch, seq = ids_BS.shape
    out = model(ids_BS.flatten(), packed_positions(batch, seq), PackedAttention(model.config, None, batch, seq))
    return model.logits(out.hidden_TD).unflatten(0, (batch, seq))


def diff(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()
