"""Every expert backend against the obvious loop in fp64: values and all five gradients, over every shape of routing.

On a machine without a GPU MegaBlocks' own kernels run interpreted (a few ms per row: shapes stay small); with one, the
same tests run on CUDA as well.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.errors import ConfigError
from trinity.experts import megablocks_cpu, torch_backend
from trinity.experts.base import Assignments, LayerWeights
from trinity.experts.reference import ReferenceBackend
from trinity.experts.registry import resolve
from trinity.experts.rows import SortedOrder, combine, gather, weighted_swiglu
from trinity.experts.torch_backend import TorchBackend

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", "cuda"] if HAS_CUDA else ["cpu"]
ON_DEVICE = [(device, kind) for device in DEVICES for kind in ("auto", "grouped", "loop")]
MEGABLOCKS = [(DEVICES[-1], kind) for kind in ("megablocks-grouped", "megablocks-sparse")]
NAMES = ("y", "dx", "dweight", "dgate", "dup", "ddown")

# (experts, rows, [(row, expert), ...])
ROUTINGS = {
    "top2_shuffled": (4, 12, [((7 * i) % 24 // 2, (7 * i) % 24 % 2 * 2 + (7 * i) % 24 // 2 % 2) for i in range(24)]),
    "one_row": (3, 1, [(0, 1)]),
    "all_to_one": (4, 9, [(r, 2) for r in range(9)]),
    "empty_experts": (6, 8, [(r, 1 if r % 3 else 4) for r in reversed(range(8))]),
    "single_expert": (1, 5, [(r, 0) for r in range(5)]),
    "uneven_and_idle_rows": (5, 7, [(6, 0), (2, 4), (2, 0), (0, 4), (2, 1), (6, 3)]),
    "no_rows": (3, 0, []),
    "no_assignments": (3, 4, []),
}


def case(routing, dtype, device="cpu", dim=128, ffn=128, seed=0):
    """-> rows, assignments and weights of one routing, all leaves of autograd."""
    experts, rows, pairs = routing
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=1.0, kind=dtype):
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(device, kind).requires_grad_()

    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(device)
    assigned = Assignments(index[:, 0], index[:, 1], leaf(len(pairs), kind=torch.float32))
    weights = LayerWeights(*(leaf(experts, ffn, dim, scale=scale) for scale in (dim**-0.5, dim**-0.5, ffn**-0.5)))
    return leaf(rows, dim), assigned, weights


def exact(x, assigned, weights):
    """The same numbers as fp64 leaves on the CPU."""

    def copy(tensor):
        return tensor.detach().double().cpu().requires_grad_()

    routed = Assignments(assigned.row_A.cpu(), assigned.expert_A.cpu(), copy(assigned.weight_A))
    return copy(x), routed, LayerWeights(*map(copy, weights))


def run(backend, x, assigned, weights):
    """-> y and the gradients of a fixed random projection of it."""
    y = backend(x, assigned, weights)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, [x, assigned.weight_A, *weights], dy)]


def check(backend, x, assigned, weights, tolerance, terms=0.0):
    """`terms`: the size of what is summed, for results so few that they may cancel to next to nothing."""
    got = run(backend, x, assigned, weights)
    want = run(ReferenceBackend(), *exact(x, assigned, weights))
    for name, value, truth in zip(NAMES, got, want, strict=True):
        error = (value.double().cpu() - truth).norm()
        assert error <= tolerance * (truth.norm() + terms), f"{name}: error {error:.2e} of {truth.norm():.2e}"
    assert got[0].dtype == got[1].dtype == x.dtype
    assert [g.dtype for g in got[2:]] == [torch.float32, *(w.dtype for w in weights)]


def tolerance(dtype, device):
    if dtype is torch.float32:
        return 3e-3 if device == "cuda" else 3e-6  # Triton's fp32 products use TF32
    return 1.2e-2


@pytest.fixture(scope="module")
def megablocks_backend():
    """The module, with the interpreter's repairs in place where there is no GPU."""
    try:
        resolve("megablocks", DEVICES[-1])
    except ConfigError as error:  # a GPU, but `make gpu-kernels` was not run
        pytest.skip(error.message)
    from trinity.experts import megablocks_backend

    return megablocks_backend


def build(kind, request):
    if kind.startswith("megablocks"):
        return request.getfixturevalue("megablocks_backend").MegaBlocksBackend(kind.split("-")[1])
    return TorchBackend(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("device", "kind"), ON_DEVICE + MEGABLOCKS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_backend_equals_the_loop(request, routing, device, kind, dtype):
    check(build(kind, request), *case(ROUTINGS[routing], dtype, device), tolerance(dtype, device))


@pytest.mark.parametrize(("device", "kind"), MEGABLOCKS)
def test_megablocks_expert_with_more_rows_than_a_tile(request, device, kind):
    pairs = [(i % 66, 1) for i in range(132)] + [(3, 0), (65, 2)]
    check(build(kind, request), *case((4, 66, pairs), torch.float32, device), tolerance(torch.float32, device))


def test_sparse_path_past_the_range_of_int16(request):
    """Block 259 starts at unit 33,152: MegaBlocks' own 16-bit indices would read outside the weights."""
    check(build("megablocks-sparse", request), *case((260, 2, [(0, 259), (1, 0)]), torch.float32, DEVICES[-1]), 3e-3)


@pytest.mark.parametrize(("device", "kind"), MEGABLOCKS)
def test_megablocks_wide_layer(request, device, kind):
    """More than one block along both dimensions of the weights, which differ."""
    check(build(kind, request), *case(ROUTINGS["one_row"], torch.bfloat16, device, dim=256, ffn=384), 1.2e-2)


def test_gmm_path_gives_the_package_row_counts_on_the_host(megablocks_backend, monkeypatch):
    """The `grouped_gemm` package needs a GPU; a loop stands for it and checks what it is given."""

    def gmm(a, b, batch_sizes, trans_b=False):
        assert batch_sizes.dtype == torch.int64
        assert batch_sizes.device.type == "cpu"
        parts = zip(a.split(batch_sizes.tolist()), b.unbind(0), strict=True)
        return torch.cat([part @ (w.T if trans_b else w) for part, w in parts])

    with pytest.raises(ConfigError, match="grouped_gemm"):
        megablocks_backend.MegaBlocksBackend("gmm")
    monkeypatch.setattr(megablocks_backend.grouped_gemm_util, "ops", SimpleNamespace(gmm=gmm))
    backend = megablocks_backend.MegaBlocksBackend("gmm")
    check(backend, *case(ROUTINGS["empty_experts"], torch.float32, DEVICES[-1]), 3e-3)


def test_rows_of_another_dtype_than_the_weights():
    x, assigned, weights = case(ROUTINGS["top2_shuffled"], torch.float32)
    narrow = x.detach().bfloat16().requires_grad_()
    for kind in ("grouped", "loop"):
        check(TorchBackend(kind), narrow, assigned, weights, 4e-3)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (7, 5)])
def test_auto_takes_shapes_that_grouped_mm_refuses(shape):
    dim, ffn = shape
    x, assigned, weights = case(ROUTINGS["uneven_and_idle_rows"], torch.bfloat16, dim=dim, ffn=ffn)
    with pytest.raises(RuntimeError):
        run(TorchBackend("grouped"), x, assigned, weights)
    check(TorchBackend(), x, assigned, weights, 1.2e-2)


def test_gradients_of_torch_are_exact_in_fp64():
    x, assigned, weights = exact(*case(ROUTINGS["uneven_and_idle_rows"], torch.float32, dim=4, ffn=3))

    def layer(x, weight_A, *stacks):
        return TorchBackend("loop")(x, assigned._replace(weight_A=weight_A), LayerWeights(*stacks))

    assert torch.autograd.gradcheck(layer, (x, assigned.weight_A, *weights))


def test_gradients_of_the_activation_are_exact():
    leaves = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (4, 4, 1)]
    assert torch.autograd.gradcheck(weighted_swiglu, leaves)


def test_crowded_experts_take_the_loop_on_cpu(monkeypatch):
    """Where there is no arithmetic in an order of our own (trinity/exact)."""
    monkeypatch.setattr(torch_backend.batch_invariant, "is_for", lambda tensor: False)
    calls = []
    for name in ("grouped", "looped"):
        real = getattr(torch_backend, name)
        monkeypatch.setattr(torch_backend, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    few, many = 10, 2 * torch_backend.LOOP_FROM_ROWS
    for rows in (few, many):
        x, assigned, weights = case((2, rows, [(r, r % 2) for r in range(rows)]), torch.bfloat16, dim=8, ffn=8)
        TorchBackend()(x, assigned, weights)
    assert calls == ["grouped", "looped"]


def orders(request):
    """The same nine assignments of one row, in every description of an order."""
    row_A, device = torch.zeros(9, dtype=torch.int64), DEVICES[-1]
    assigned = Assignments(row_A.to(device), torch.arange(9).to(device) % 3, torch.ones(9, device=device))
    binned = request.getfixturevalue("megablocks_backend").BinnedOrder
    return [
        SortedOrder(assigned.row_A, 1),
        binned.build(assigned, 1, 3, tile=1),
        binned.build(assigned, 1, 3, tile=128),
    ]


def test_sums_over_experts_round_once(request):
    """256 + 8 x 1 is 264 in bf16 if summed in fp32, and 256 if every partial sum is rounded; forward and backward."""
    for order in orders(request):
        terms = order.spread(torch.ones(1, 8, dtype=torch.bfloat16, device=DEVICES[-1]))
        terms[0] = 256
        assert combine(terms, order, torch.bfloat16).eq(264).all()
        x = torch.ones(1, 8, dtype=torch.bfloat16, device=terms.device, requires_grad=True)
        gather(x, order).backward(terms)
        assert x.grad.eq(264).all()


pairs_of = st.tuples(st.integers(1, 5), st.integers(1, 9)).flatmap(
    lambda size: st.tuples(
        st.just(size[0]),
        st.just(size[1]),
        st.lists(st.tuples(st.integers(0, size[1] - 1), st.integers(0, size[0] - 1)), max_size=30),
    )
)


@settings(max_examples=60, deadline=None)
@given(
    routing=pairs_of, dim=st.integers(1, 6), ffn=st.integers(1, 6), kind=st.sampled_from(["auto", "grouped", "loop"])
)
def test_torch_equals_the_loop_on_any_routing(routing, dim, ffn, kind):
    scale = 4 if kind == "grouped" else 1  # rows of 16 bytes
    check(TorchBackend(kind), *case(routing, torch.float32, dim=scale * dim, ffn=scale * ffn), 1e-5, terms=0.1)


@settings(max_examples=30, deadline=None)
@given(routing=pairs_of, data=st.data())
def test_order_of_assignments_and_split_over_shards_do_not_matter(routing, data):
    x, assigned, weights = case(routing, torch.float32, dim=8, ffn=8)
    whole = TorchBackend()(x, assigned, weights)
    shuffled = data.draw(st.permutations(range(len(assigned.row_A))))
    again = TorchBackend()(x, Assignments(*(t[torch.tensor(shuffled, dtype=torch.int64)] for t in assigned)), weights)
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
    cut = data.draw(st.integers(0, routing[0] - 1))
    parts = [(assigned.expert_A < cut, slice(0, cut), 0), (assigned.expert_A >= cut, slice(cut, None), cut)]
    shards = [
        TorchBackend()(x, moved(assigned, mask, first), LayerWeights(*(w[part].contiguous() for w in weights)))
        for mask, part, first in parts
    ]
    torch.testing.assert_close(shards[0] + shards[1], whole, rtol=1e-5, atol=1e-5)


def moved(assigned, mask, first):
    row_A, expert_A, weight_A = (t[mask] for t in assigned)
    return Assignments(row_A, expert_A - first, weight_A)


def test_same_bits_every_time():
    x, assigned, weights = case((4, 300, [(r % 300, r % 4) for r in range(900)]), torch.bfloat16)
    first, second = (run(TorchBackend(), x, assigned, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sparse_path_refuses_what_its_kernels_cannot_address(megablocks_backend):
    sparse = megablocks_backend.MegaBlocksBackend("sparse")
    with pytest.raises(ConfigError, match="multiples of 128"):
        sparse(*case(ROUTINGS["one_row"], torch.float32, dim=64))
    wide = torch.empty(65, 512 * 128, 128, device="meta")
    assert not megablocks_backend.fits_sparse(LayerWeights(wide, wide, wide))
    with pytest.raises(ConfigError, match="int32"):
        sparse._choose(2**25, LayerWeights(*[torch.empty(2, 128, 128, device="meta")] * 3))


def test_megablocks_pads_only_when_experts_are_crowded(megablocks_backend):
    auto, layer = megablocks_backend.MegaBlocksBackend(), LayerWeights(*[torch.empty(4, 128, 256, device="meta")] * 3)
    odd = LayerWeights(*[torch.empty(4, 64, 256, device="meta")] * 3)
    assert [auto._choose(n, layer) for n in (4, 511, 512)] == ["grouped", "grouped", "sparse"]
    assert auto._choose(4096, odd) == "grouped"


def test_resolve_names_its_choice_and_the_reason(caplog):
    caplog.set_level(logging.INFO)
    for name, device in (("auto", "cpu"), ("torch", "cpu"), ("reference", "cpu")):
        backend = resolve(name, device)
        assert backend.name == ("torch" if name == "auto" else name)
    assert len(caplog.messages) == 3
    assert all(f"torch {torch.__version__.split('+')[0]}" in message for message in caplog.messages)
    assert "needs a CUDA device" in caplog.messages[0]


def test_resolve_refuses_an_unknown_name():
    with pytest.raises(ConfigError, match="auto, reference, torch, megablocks"):
        resolve("megablock", "cpu")


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device here, so nothing is refused")
def test_megablocks_without_gpu_or_interpreter_names_the_remedy(monkeypatch):
    monkeypatch.setattr(megablocks_cpu, "can_interpret", lambda: False)
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match="make gpu-kernels"):
            resolve("megablocks", device)
        assert resolve("auto", device).name == "torch"
