"""Quantised checkpoints made by hand, from the layouts' definitions: bytes and scales are drawn, and what they mean is worked
out here number by number, with none of the code under test.

Legend: N outputs and K inputs of a matrix.
"""

import json
import re
import shutil
from math import ceil

import torch
from safetensors.torch import load_file, save_file

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LINEAR = re.compile(r"model\.layers\..*(proj)\.weight$")
KEPT = ["lm_head", "re:.*router[.]gate$"]  # what settings must name, as they stay
BLOCK = (8, 12)  # divides neither side of every matrix


def drawn_fp8(shape, rng, low=0):
    """Any e4m3 numbers but NaN; `low`: the least byte, above which all are positive."""
    found = torch.randint(low, 127 if low else 256, shape, generator=rng, dtype=torch.int16).to(torch.uint8)
    found[(found & 127) == 127] = 5
    return found.view(torch.float8_e4m3fn)


def drawn_scale(shape, rng, dtype=torch.float32):
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(120, 130, shape, generator=rng, dtype=torch.int16).to(torch.uint8).view(dtype)
    return (torch.rand(shape, generator=rng) * 0.02 + 0.001).to(dtype)


def spread(scale, n, k, block):
    return scale.float().repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]


def fp8(n, k, rng, name="weight_scale", block=BLOCK, dtype=torch.float32, shape=None):
    q = drawn_fp8((n, k), rng)
    scale = drawn_scale((ceil(n / block[0]), ceil(k / block[1])), rng, dtype)
    return {"weight": q, name: scale if shape is None else scale.view(shape)}, q.float() * spread(scale, n, k, block)


def int8(n, k, rng, zero=False):
    q = torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int16).to(torch.int8)
    scale, parts, from_n = drawn_scale((n, 1), rng, torch.bfloat16), {}, 0
    if zero:
        parts["weight_zero_point"] = torch.randint(-9, 9, (n, 1), generator=rng, dtype=torch.int16).to(torch.int8)
        from_n = parts["weight_zero_point"].float()
    return {"weight": q, "weight_scale": scale, **parts}, (q.float() - from_n) * scale.float()


def words(values, bits):
    """Rows of numbers >= 0, packed into int32 from the lowest bits on."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % per_word))
    found = (padded.view(len(values), -1, per_word) << (torch.arange(per_word) * bits)).sum(2)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def packed(n, k, rng, bits=4, group=8, zero=False):
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (n, k), generator=rng)
    scale, from_ns = drawn_scale((n, k // group), rng, torch.bfloat16), torch.zeros(n, k // group)
    parts = {"weight_packed": words(q + half, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if zero:
        from_ns = torch.randint(-half, half, from_ns.shape, generator=rng)
        parts["weight_zero_point"] = words(from_ns.T + half, bits).T.contiguous()
    return parts, (q - spread(from_ns, n, k, (1, group))) * spread(scale, n, k, (1, group))


def nvfp4(n, k, rng, modelopt=False):
    codes = torch.randint(0, 16, (n, k), generator=rng)
    scale, overall = drawn_fp8((n, k // 16), rng, low=1), torch.tensor([3.7])
    value = torch.tensor(E2M1 + [-x for x in E2M1])[codes]
    data = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    if modelopt:
        parts = {
            "weight": data,
            "weight_scale": scale,
            "weight_scale_2": overall[0] / 99,
            "input_scale": torch.tensor(2.0),
        }
        return parts, value * spread(scale.float() * (overall / 99), n, k, (1, 16))
    parts = {"weight_packed": data, "weight_scale": scale, "weight_global_scale": overall}
    return parts, value * spread(scale.float() / overall, n, k, (1, 16))


def compressed(kind, bits, strategy, **weights):
    args = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "ignore": KEPT,
        "quantization_status": "compressed",
    }


DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
BLOCKS = compressed("float", 8, "block", block_structure=list(BLOCK))
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*router*"]}
USUAL = (128, 128)
CHANNEL, WHOLE = (1, 64), (64, 64)  # no side is longer
LAYOUTS = {
    "fp8-block": (fp8, {}, BLOCKS),
    "fp8-block-e8m0": (fp8, {"dtype": torch.float8_e8m0fnu}, BLOCKS),
    "fp8-blocks": (fp8, {"block": USUAL}, compressed("float", 8, "block", block_structure=list(USUAL))),
    "fp8-deepseek": (fp8, {"name": "weight_scale_inv"}, DEEPSEEK),
    "fp8-channel": (fp8, {"block": CHANNEL}, compressed("float", 8, "channel")),
    "fp8-tensor": (fp8, {"block": WHOLE, "shape": (1,)}, compressed("float", 8, "tensor")),
    "fp8-unsaid": (fp8, {"block": CHANNEL}, None),
    "int8-channel": (int8, {}, compressed("int", 8, "channel")),
    "int8-zeros": (int8, {"zero": True}, compressed("int", 8, "channel", symmetric=False)),
    "int4": (packed, {}, compressed("int", 4, "group", group_size=8)),
    "int4-zeros": (packed, {"zero": True}, compressed("int", 4, "group", group_size=8, symmetric=False)),
    "int8-packed": (packed, {"bits": 8}, compressed("int", 8, "group", group_size=8)),
    "nvfp4": (nvfp4, {}, compressed("float", 4, "tensor_group", group_size=16)),
    "nvfp4-modelopt": (nvfp4, {"modelopt": True}, MODELOPT),
}


def write_quantised(plain, folder, layout, seed=0):
    """Make `folder` from a plain checkpoint, its matrices drawn anew; -> what they mean, and all other tensors, by key."""
    make, settings, said = LAYOUTS[layout]
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json", "training"))
    rng, truth, stored = torch.Generator().manual_seed(seed), {}, {}
    for file in sorted(plain.glob("*.safetensors")):
        truth |= load_file(file)
    for key, tensor in truth.items():
        if LINEAR.fullmatch(key):
            parts, truth[key] = make(*tensor.shape, rng, **settings)
            stored |= {f"{key.removesuffix('.weight')}.{part}": found for part, found in parts.items()}
        else:
            stored[key] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", quantization_config=said)
    return truth


def change(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edited(folder, edit):
    """Change the tensors of a folder in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
