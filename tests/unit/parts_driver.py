"""Two processes that shard a model with fully_shard, by parts and by blocks: run by test_parts.py with a port. The second is
forked from the first, so that one import serves both.

Each computes its half of a batch; the summed gradients must be those of one process with the whole of it.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.parity.configs import FAMILIES, random_config, random_ids
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.models.common.family import Family
from trinity.models.registry import build, family_of


class Plain:
    """Routed experts without state, the same in every process: a token's weighted sum of x, scaled by the expert's number."""

    def begin(self, layer, x_TD, ids_TK, weights_TK):
        return Answer(x_TD * (weights_TK * (1 + ids_TK)).sum(-1, keepdim=True))


class Answer:
    def __init__(self, y_TD):
        self.y_TD = y_TD

    def result(self):
        return self.y_TD


def model_of(family: str):
    config = random_config(family, 7)
    model, known = build(config, Plain()), family_of(config)
    assert isinstance(known, Family)
    known.init_weights(model, 0)
    return model


def loss_of(model, ids_BS) -> torch.Tensor:
    batch, seq = ids_BS.shape
    out = model(ids_BS.flatten(), packed_positions(batch, seq), PackedAttention(model.config, None, batch, seq))
    return model.logits(out.hidden_TD).square().sum()


def parts(model):
    """Those with weights."""
    for block in model.blocks():
        found = (part for part in (block.pre, block.local, block.post) if part is not None)
        yield from (part for part in found if any(weight.numel() for weight in part.parameters()))


def blocks(model):
    """Whole ones, and then the decoder around them."""
    yield from model.blocks()
    yield model.model


def check_gradients(sharded, want):
    num_sharded = 0
    for key, weight in sharded.weights().items():
        if not weight.numel():
            continue
        if isinstance(weight.grad, DTensor):  # averaged over the two processes
            num_sharded += 1
            got = 2 * weight.grad.full_tensor()
        else:
            got = weight.grad.clone()
            dist.all_reduce(got)
        torch.testing.assert_close(got, want[key], rtol=1e-4, atol=1e-5)
    assert num_sharded > len(want) / 2


def main(rank: int, port: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for family in FAMILIES:
        model = model_of(family)
        ids_BS = random_ids(model.config, 3, 2, 11)
        loss_of(model, ids_BS).backward()
        want = {key: weight.grad.clone() for key, weight in model.weights().items() if weight.numel()}
        for wrapped in (parts, blocks):
            sharded = model_of(family)
            for module in wrapped(sharded):
                fully_shard(module, mesh=mesh)
            loss_of(sharded, ids_BS[rank : rank + 1]).backward()
            check_gradients(sharded, want)
    dist.destroy_process_group()
    os.write(1, b"ok\n")  # whole: another process writes there, too


if __name__ == "__main__":
    child = os.fork()
    main(0 if child else 1, sys.argv[1])
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)
