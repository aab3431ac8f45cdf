"""Quantised checkpoints of compressed-tensors read by us, with the bits of its own decompression in bfloat16, as it stores
scales; and ours read by it.

The package is unmodified, in an environment of its own that sees ours below it: `make interop-compressed-tensors` makes it, and
runs this file there.
"""

import json

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: make interop-compressed-tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from tests.unit.checkpoint_files import plain, write
from tests.unit.quantised_files import KEPT, LINEAR, change
from trinity.checkpoint import open_checkpoint
from trinity.cli import main

pytestmark = pytest.mark.interop
INT, FLOAT = {"type": "int", "symmetric": True}, {"type": "float", "symmetric": True}
SCHEMES = {
    "int8-channel": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "int8-channel-zeros": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8-channel": ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "tensor"}),
    "fp8-block": ("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [8, 16]}),
    "int4": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 8}),
    "int4-zeros": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}),
    "int8-packed": ("pack-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "nvfp4": ("nvfp4-pack-quantized", {**FLOAT, "num_bits": 4, "strategy": "tensor_group", "group_size": 16,
                                       "scale_dtype": torch.float8_e4m3fn}),
}  # fmt: skip


def extremes(weight, args):
    """Least and greatest numbers of all that shares a scale."""
    n, k = weight.shape
    rows, columns = {
        "channel": (1, k), "tensor": (n, k), "block": tuple(args.block_structure or ()),
    }.get(args.strategy, (1, args.group_size))  # fmt: skip
    blocks = weight.view(n // rows, rows, k // columns, columns)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def compressed(weight, name, args):
    """-> the tensors that the package makes of a matrix, and what it reads out of them."""
    compressor, scheme = (
        BaseCompressor.get_value_from_registry(name),
        QuantizationScheme(targets=["Linear"], weights=args),
    )
    overall = None
    if name.startswith("nvfp4"):
        overall = (448 * 6 / weight.abs().max()).float().view(1)
    scale, zero = calculate_qparams(*extremes(weight, args), args, global_scale=overall)
    if args.strategy == "tensor":
        scale, zero = scale.view(1), zero.view(1)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    if overall is not None:
        state["weight_global_scale"] = overall
    made = compressor.compress(state, scheme)
    return made, compressor.decompress(made, scheme)["weight"]


@pytest.mark.parametrize("kind", SCHEMES)
def test_their_files_have_their_numbers(tmp_path, kind):
    name, said = SCHEMES[kind]
    args = QuantizationArgs(**said)
    folder, stored, truth = plain(write(tmp_path)[1]), {}, {}
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if not LINEAR.fullmatch(key):
                stored[key] = tensor
                continue
            made, truth[key] = compressed(tensor.bfloat16(), name, args)
            stored |= {f"{key.removesuffix('.weight')}.{part}": each.contiguous() for part, each in made.items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    group = QuantizationScheme(targets=["Linear"], weights=args).model_dump(mode="json")
    method = {"quant_method": "compressed-tensors", "format": name, "ignore": KEPT, "config_groups": {"group_0": group}}
    change(folder / "config.json", quantization_config=method)
    checkpoint = open_checkpoint(folder)
    for key, wanted in truth.items():
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(checkpoint.tensor(key).bfloat16(), wanted), key


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_our_files_have_our_numbers_there(tmp_path, form):
    source = write(tmp_path)[1]
    assert main(["convert", str(source), str(tmp_path / "q"), "--to", form]) == 0
    checkpoint, said = open_checkpoint(tmp_path / "q"), json.loads((tmp_path / "q" / "config.json").read_text())
    config = QuantizationConfig.model_validate(said["quantization_config"])
    [scheme], compressor = config.config_groups.values(), BaseCompressor.get_value_from_registry(config.format)
    assert infer_module_format(torch.nn.Linear, scheme).value == config.format  # what a server chooses by
    tensors = {key: each for file in (tmp_path / "q").glob("*.safetensors") for key, each in load_file(file).items()}
    found = [key.removesuffix("_scale") for key in tensors if key.endswith("_scale")]
    for key in found:
        state = {"weight": tensors[key], "weight_scale": tensors[f"{key}_scale"]}
        assert torch.equal(checkpoint.tensor(key), compressor.decompress(state, scheme)["weight"]), key
    assert sorted(found) == sorted(filter(LINEAR.fullmatch, tensors))
    assert set(checkpoint.weight_map) == tensors.keys()
