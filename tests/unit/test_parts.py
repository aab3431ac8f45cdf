"""Blocks and their parts are ordinary modules: PyTorch's own tools wrap them as they wrap anybody's.

Legend: B batch, S sequence, T tokens, D model.
"""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.parity.configs import FAMILIES, random_config, random_ids
from tests.unit.parts_driver import Plain, loss_of, model_of, parts
from trinity.models.common.attention import PackedAttention, packed_positions

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("family", FAMILIES)


class Counting(Plain):
    """Counts the messages of forward passes."""

    def __init__(self):
        self.num_sent = 0

    def begin(self, layer, x_TD, ids_TK, weights_TK):
        self.num_sent += 1
        return super().begin(layer, x_TD, ids_TK, weights_TK)


def counted(family: str):
    """A model whose experts count, and its grads after one batch by `forward` (of a block's part)."""
    model = model_of(family)
    return model.with_experts(Counting())


def grads(model) -> dict[str, torch.Tensor]:
    return {key: weight.grad for key, weight in model.weights().items() if weight.grad is not None}


@each
def test_checkpointed_parts_give_the_same_bits_and_send_no_message_twice(family):
    plain, wrapped = counted(family), counted(family)
    ids_BS = random_ids(plain.config, 1, 2, 13)
    recomputed = []
    for part in parts(wrapped):  # one that only adds keeps nothing for its backward, and is not computed again
        whole = part.forward

        def forward(*inputs, whole=whole):
            recomputed.append(1)
            return whole(*inputs)

        part.forward = lambda *inputs, forward=forward: checkpoint(forward, *inputs, use_reentrant=False)
    losses = [loss_of(model, ids_BS) for model in (plain, wrapped)]
    num_forward = len(recomputed)
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert len(recomputed) == 2 * num_forward > 0, "every part was computed again in the backward"
    assert wrapped.experts.num_sent == plain.experts.num_sent == len(plain.config.moe_layers)
    mine, theirs = grads(wrapped), grads(plain)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@each
def test_hooks_fire_after_the_work(family):
    """Each part, and what is in it: the output that a hook sees is the output that goes on."""
    model, seen = model_of(family), []
    for name, module in model.named_modules():
        if name and not list(module.children()):
            module.register_forward_hook(lambda m, i, out, name=name: seen.append((name, out)))
    for number, block in enumerate(model.blocks()):
        block.pre.register_forward_hook(lambda m, i, out, n=number: seen.append((f"pre {n}", out.x_TD)))
        block.post.register_forward_hook(lambda m, i, out, n=number: seen.append((f"post {n}", out)))
        block.register_forward_hook(lambda m, i, out, n=number: seen.append((f"block {n}", out[0])))
    model.model.register_forward_hook(lambda m, i, out: seen.append(("model", out.hidden_TD)))
    loss_of(model, random_ids(model.config, 2, 1, 9))
    assert all(torch.is_tensor(out) for name, out in seen if "router" not in name)
    order = [name for name, _ in seen]
    for number in range(model.config.num_hidden_layers):
        begin, end = order.index(f"pre {number}"), order.index(f"post {number}")
        assert order.index(f"model.layers.{number}.pre.self_attn.o_proj") < begin < end < order.index(f"block {number}")
        assert dict(seen)[f"block {number}"] is dict(seen)[f"post {number}"]
    last = dict(seen)[f"post {model.config.num_hidden_layers - 1}"]
    assert dict(seen)["model"] is dict(seen)["model.norm"]
    assert torch.equal(model.model.norm(last), dict(seen)["model"])


@each
def test_checkpointed_blocks_give_the_same_bits(family):
    """Whole blocks: their rows are sent again, which parts spare."""
    plain, wrapped = counted(family), counted(family)
    ids_BS = random_ids(plain.config, 1, 2, 13)
    for block in wrapped.blocks():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    losses = [loss_of(model, ids_BS) for model in (plain, wrapped)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert wrapped.experts.num_sent == 2 * plain.experts.num_sent
    mine, theirs = grads(wrapped), grads(plain)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@each
def test_compiled_parts_run(family):
    """Graphs, not kernels: what the compiler makes of them is the compiler's."""
    config = random_config(family, 7).model_copy(update={"batch_invariant": False})
    plain, compiled = (model_of(family) for _ in range(2))
    for model in (plain, compiled):
        for module in model.modules():
            module.is_exact = False
    ids_BS = random_ids(config, 1, 1, 12)
    for block in compiled.blocks():
        block.post.compile(backend="aot_eager", fullgraph=True)
        if block.local is not None:
            block.local.compile(backend="aot_eager", fullgraph=True)
        block.pre.compile(backend="aot_eager")
    args = ids_BS.flatten(), packed_positions(1, 12)
    outs = [model(*args, PackedAttention(config, None, 1, 12)).hidden_TD for model in (plain, compiled)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    outs[1].square().sum().backward()
    assert all(
        weight.grad is not None for key, weight in compiled.weights().items() if "layers" in key and weight.numel()
    )


def test_sharded_parts_give_the_same_gradients():
    """fully_shard on every part, in two processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.unit.parts_driver", port]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, timeout=110)
    assert (done.returncode, done.stdout) == (0, "ok\nok\n")
