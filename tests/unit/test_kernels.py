"""The extension's kernels have the bits of what they stand for, on each set of instructions, and in any company.

Legend: A rows, E experts, K and N of a product, D model, F hidden. Sizes are mostly no multiple of anything.
"""

import itertools

import pytest
import torch

from trinity import native
from trinity.bench.expert_backends import shape_of
from trinity.bench.expert_formats import formats
from trinity.errors import InvalidRequest
from trinity.experts.base import Assignments
from trinity.experts.derived import FORMS, DerivedLayer
from trinity.experts.derived_compute import infer
from trinity.ops import extension, quantised, rounded, stored
from trinity.ops.batch_invariant import elementwise, fused_mlp, gemm

built = pytest.mark.skipif(native.lib is None, reason="the extension is not built, or switched off")
INSTRUCTIONS = range(4)  # those that a processor does not have are left out: it uses the best of those below
COUNTS, INNER, OUTPUTS = ([3, 0, 7, 1, 2], [1], [5, 79]), (1, 15, 33, 64, 300), (1, 7, 130)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    native.lib.use_instructions(request.param)
    yield
    native.lib.use_instructions(INSTRUCTIONS[-1])


@pytest.fixture
def twin(monkeypatch):
    """Call a function as it is without the extension."""

    def without(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(extension, "lib", None)
            return function(*arguments)

    return without


def cases():
    for counts, inner, outputs in itertools.product(COUNTS, INNER, OUTPUTS):
        num = sum(counts)
        yield torch.tensor(counts).cumsum(0), random(num, inner), random(len(counts), outputs, inner, seed=1)


@built
@pytest.mark.parametrize("scale", [1.0, 1e-19])  # of tiny numbers, products are below the smallest normal one
def test_bfloat16_products_are_numbas(instructions, twin, scale):
    for end_E, x_AK, w_ENK in cases():
        x_AK, w_ENK = (x_AK * scale).bfloat16(), (w_ENK * scale).bfloat16()
        assert torch.equal(gemm.multiply(x_AK, w_ENK, end_E), twin(gemm.multiply, x_AK, w_ENK, end_E))


@built
def test_bfloat16_feed_forwards_are_their_steps(instructions):
    for end_E, x_AD, gate_EFD in cases():
        (num, f, d), x_AD = gate_EFD.shape, x_AD.bfloat16()
        gate, up, down = (random(num, *s, seed=i, dtype=torch.bfloat16) for i, s in enumerate(((f, d), (f, d), (9, f))))
        weight_A = random(len(x_AD), seed=5)
        middle = elementwise.gated(gemm.grouped(x_AD, gate, end_E), gemm.grouped(x_AD, up, end_E), weight_A[:, None])
        got = fused_mlp.feed_forward(x_AD, gate, up, down, end_E, weight_A)
        assert torch.equal(got, gemm.grouped(middle, down, end_E))


@built
def test_float32_is_numbas(instructions, twin, monkeypatch):
    monkeypatch.setattr(extension, "HAS_FLOAT32", True)
    for end_E, x_AK, w_ENK in cases():
        assert torch.equal(gemm.multiply(x_AK, w_ENK, end_E), twin(gemm.multiply, x_AK, w_ENK, end_E))
        down_ENF = random(len(w_ENK), 9, w_ENK.shape[1], seed=3)
        arguments = x_AK, w_ENK, w_ENK, down_ENF, end_E, random(len(x_AK), seed=5)
        assert torch.equal(fused_mlp.feed_forward(*arguments), twin(fused_mlp.feed_forward, *arguments))


@built
@pytest.mark.parametrize(
    ("name", "shape"), [("fp8", (130, 300)), ("fp8", (7, 33)), ("nvfp4", (48, 1200)), ("nvfp4", (16, 16))]
)
def test_8_and_4_bits_are_float32_of_what_they_mean(instructions, name, shape):
    """With scales that are tiny, and all numbers that a byte may be; those that are none stay so."""
    form, (f, d) = FORMS[name], shape
    end_E, x_AD, weight_A = torch.tensor([3, 3, 14]), random(14, d), random(14, seed=5)
    stacks, matrices = [], []
    for seed, (n, k) in enumerate(((f, d), (f, d), (d, f))):
        types = [plane.dtype for plane in form.planes((n, k))]
        made = (form.made(w_NK * 1e-3**e) for e, w_NK in enumerate(random(3, n, k, seed=seed)))
        planes = [[part.to(dtype) for part, dtype in zip(parts, types, strict=True)] for parts in made]
        codes = planes[2][-1].view(-1)[:256]
        codes.copy_(torch.arange(len(codes)))
        matrices.append(torch.stack([form.read(*expert) for expert in planes]))
        stacks.append([torch.stack(parts) for parts in zip(*planes, strict=True)])
    order = [0, 0, 0, *[2] * 11]
    got = infer(x_AD, Assignments(torch.arange(14), torch.tensor(order), weight_A), DerivedLayer(form, *stacks))
    want = fused_mlp.feed_forward(x_AD, *matrices, end_E, weight_A)
    torch.testing.assert_close(got, want, atol=0, rtol=0, equal_nan=True)
    assert not want[:3].isnan().any()
    [y_AN] = rounded.side_by_side(x_AD, [stored.matrices([part[2] for part in stacks[0]])])
    want = gemm.multiply(x_AD, matrices[0][2:], torch.tensor([14]))
    torch.testing.assert_close(y_AN, want, atol=0, rtol=0, equal_nan=True)


@built
def test_int8_is_numbas(instructions, twin):
    for end_E, x_AK, w_ENK in cases():
        x_AK[0], x_AK[-1, -1] = 0, x_AK[-1, -1] * 1e-35
        w = quantised.quantised(w_ENK)
        assert torch.equal(quantised.multiply(x_AK, w, end_E), twin(quantised.multiply, x_AK, w, end_E))
        n, k = w_ENK.shape[1:]
        parts = (
            w,
            quantised.quantised(random(len(w_ENK), n, k, seed=2)),
            quantised.quantised(random(len(w_ENK), 9, n, seed=3)),
        )
        arguments = x_AK, *parts, end_E, random(len(x_AK), seed=5)
        assert torch.equal(quantised.feed_forward(*arguments), twin(quantised.feed_forward, *arguments))


def test_int8_is_what_its_formula_says(twin):
    x_AK, w_NK = random(12, 70), random(9, 70, seed=1)
    x_AK[3], x_AK[4], x_AK[5] = 0, x_AK[4] * 1e-34, torch.linspace(-1, 1, 70)
    w, end_1 = quantised.quantised(w_NK[None]), torch.tensor([12])

    def formula(x):
        amax = x.abs().amax(1, keepdim=True)
        factor = torch.where(amax >= 1e-30, 127 / amax, 0)
        return (x * factor).round(), amax / 127

    (q_x, s_x), (q_w, s_w) = formula(x_AK), formula(w_NK)
    assert torch.equal(w.q[0], q_w.to(torch.int8))
    assert torch.equal(quantised.dequantised(w)[0], q_w * s_w)
    want = (q_x.double() @ q_w.double().T).float() * s_w.T * s_x
    for y in (quantised.multiply(x_AK, w, end_1), twin(quantised.multiply, x_AK, w, end_1)):
        assert torch.equal(y, want)
    torch.testing.assert_close(want[5:], x_AK[5:] @ w_NK.T, atol=0.5, rtol=0)


def test_rows_that_are_not_finite_are_no_numbers(twin):
    x_AK, w = random(3, 20), quantised.quantised(random(1, 9, 20, seed=1))
    x_AK[0, 3], x_AK[2, 5] = torch.nan, torch.inf
    for y in (quantised.multiply(x_AK, w, torch.tensor([3])), twin(quantised.multiply, x_AK, w, torch.tensor([3]))):
        assert y.isnan().all(1).tolist() == [True, False, True]


def test_sums_that_an_int32_does_not_hold_are_refused():
    with pytest.raises(InvalidRequest, match="65537 columns: sums of at most 65536 products"):
        quantised.quantised(torch.zeros(1, 1 << 16 | 1))
    w = quantised.quantised(torch.full((1, 1, 1 << 16), -1.0))
    y = quantised.multiply(torch.ones(1, 1 << 16), w, torch.tensor([1]))
    assert y.item() == pytest.approx(-(1 << 16), rel=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_an_experts_rows_are_the_same_in_any_company(kind):
    """37 rows, cut in all ways."""
    shapes = (33, 70), (33, 70), (70, 33)
    stacks = [random(1, *shape, seed=i) / 8 for i, shape in enumerate(shapes)]
    x_AD, weight_A = random(37, 70, seed=4), random(37, seed=5)
    if kind == "bfloat16":
        x_AD, parts = x_AD.bfloat16(), [stack.bfloat16() for stack in stacks]
        compute = fused_mlp.feed_forward if native.lib else _bfloat16_steps
    else:
        parts, compute = [quantised.quantised(stack) for stack in stacks], quantised.feed_forward
    whole = compute(x_AD, *parts, torch.tensor([37]), weight_A)
    for num in range(1, 38):
        pieces = zip(x_AD.split(num), weight_A.split(num), strict=True)
        assert torch.equal(torch.cat([compute(x, *parts, torch.tensor([len(x)]), w) for x, w in pieces]), whole)


def _bfloat16_steps(x_AD, gate, up, down, end_E, weight_A):
    products = gemm.grouped(x_AD, gate, end_E), gemm.grouped(x_AD, up, end_E)
    return gemm.grouped(elementwise.gated(*products, weight_A[:, None]), down, end_E)


@built
def test_what_does_not_fit_is_refused_before_memory_is_touched():
    rows, w, y = extension.Rows(torch.zeros(2, 8)), extension.Matrices(torch.zeros(1, 3, 9)), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"w of \(1, 3, 9\).* does not fit its rows"):
        extension.multiplying(extension.FLOAT32, rows, w, torch.tensor([2]), y)
    with pytest.raises(TypeError, match="2 arguments, not 14"):
        native.lib.multiply(1, 2)


def test_the_bench_compares_every_format_with_float32():
    table = formats(shape_of("tiny", torch.device("cpu"), experts=2), rows=(1, 3), rounds=1)
    packed = ["fp8", "nvfp4"] if native.lib else []
    names = ["float32", *(["bfloat16"] if native.lib else []), "int8", *packed]
    assert [row[:2] for row in table.rows] == [(num, name) for num in (1, 3) for name in names]
    lost = {row[1]: float(row[-1]) for row in table.rows}
    assert lost["float32"] == 0 < lost["int8"] < 0.1
