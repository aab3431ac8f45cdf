"""On a real GPU, at the shapes of Trinity Nano: every backend against the loop in fp64, and decoding in a CUDA graph.

Shapes: D=1024, F=256, 128 experts, top-8; all experts on one shard, then a quarter of them.
"""

import pytest
import torch

from trinity.errors import ConfigError
from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.reference import ReferenceBackend
from trinity.experts.registry import resolve
from trinity.experts.torch_backend import TorchBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DIM, FFN, TOP_K = 1024, 256, 8


def megablocks(path):
    try:
        resolve("megablocks", "cuda")
    except ConfigError as error:
        pytest.skip(error.message)
    from trinity.experts.megablocks_backend import MegaBlocksBackend

    return MegaBlocksBackend(path)


def build(kind):
    return megablocks(kind.split("-")[1]) if "-" in kind else TorchBackend(kind)


def nano_layer(rows, experts, seed=0):
    """Random routing over 128 experts of which this shard holds the first `experts`."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def leaf(*shape, scale=1.0, dtype=torch.bfloat16):
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()

    scores = torch.rand(rows, 128, generator=generator, device="cuda")
    chosen = scores.topk(TOP_K).indices
    row_A, slot_A = (chosen < experts).nonzero(as_tuple=True)
    assigned = Assignments(row_A, chosen[row_A, slot_A], leaf(len(row_A), dtype=torch.float32))
    weights = LayerWeights(*(leaf(experts, FFN, DIM, scale=width**-0.5) for width in (DIM, DIM, FFN)))
    return leaf(rows, DIM), assigned, weights


def run(backend, x, assigned, weights):
    y = backend(x, assigned, weights)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [x, assigned.weight_A, *weights], dy)]


def exact(x, assigned, weights):
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, assigned.weight_A, *weights)]
    return wide[0], assigned._replace(weight_A=wide[1]), LayerWeights(*wide[2:])


@pytest.mark.parametrize("kind", ["grouped", "loop", "megablocks-grouped", "megablocks-sparse", "megablocks-auto"])
@pytest.mark.parametrize(("rows", "experts"), [(1, 128), (64, 32), (4096, 128)])
def test_nano_shapes_equal_the_loop(kind, rows, experts):
    layer = nano_layer(rows, experts)
    truth = run(ReferenceBackend(), *exact(*layer))
    for value, wanted in zip(run(build(kind), *layer), truth, strict=True):
        assert (value.double() - wanted).norm() <= 1.2e-2 * wanted.norm()


@pytest.mark.parametrize("kind", ["grouped", "megablocks-grouped", "megablocks-sparse"])
def test_same_bits_every_time(kind):
    layer = nano_layer(2048, 128)
    first, second = (run(build(kind), *layer) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["grouped", "megablocks-grouped"])
def test_decoding_can_be_captured_in_a_graph(kind):
    """No host synchronisation; needs Hopper or later, where grouped_mm reads its offsets on the device."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("grouped_mm waits for its offsets before Hopper")
    backend, (x, assigned, weights) = build(kind), nano_layer(16, 128)
    with torch.no_grad():
        want = backend(x, assigned, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = backend(x, assigned, weights)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
