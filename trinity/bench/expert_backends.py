"""Subjects of `trinity bench experts`: layer shapes, expert backends with their path fixed, and whether they are right.

Legend: R rows, A assignments (row, expert), E experts on the shard, D model, F expert hidden, K local experts of a row.

Decisions:
- The truth is the reference backend one precision up on the same rounded numbers: fp32 for bf16, fp64 for fp32.
- An error is relative to the tensor's size. The whole tensor must be within `tolerance`; its worst row or expert, against
  a typical one, within `WORST` times that, so that one lost row among thousands is seen. No rows: exactly no gradient.
- Output is compared with and without gradients, with few rows and with many: backends choose kernels by both.
- A row goes to K different experts of the shard, as in the model, if K divides E; else to the largest divisor both have.
"""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from trinity.config import preset
from trinity.errors import ConfigError
from trinity.experts.base import Assignments, ExpertBackend, LayerWeights
from trinity.experts.reference import ReferenceBackend
from trinity.experts.registry import resolve
from trinity.experts.torch_backend import TorchBackend
from trinity.utils.machine import available_bytes

LAYER_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}  # of weights that a shard holds of one layer, unless told
NAMES = ("y without gradients", "y", "dx", "dweight", "dgate", "dup", "ddown")
FEW_ROWS = 2  # per expert, on average
WORST = 10
V = TypeVar("V")


@dataclass(frozen=True)
class Shape:
    """One layer's experts on a shard: `experts` of the model's `of`, each of three [F, D] matrices."""

    name: str
    dim: int
    ffn: int
    experts: int
    of: int
    top_k: int
    dtype: torch.dtype

    @property
    def weight_bytes(self) -> int:
        return 3 * self.experts * self.dim * self.ffn * self.dtype.itemsize

    def flops(self, rows: int) -> int:
        """Count those of a forward pass with `rows` rows for each expert; a backward pass has twice as many."""
        return 2 * 3 * self.experts * rows * self.dim * self.ffn

    def check_bytes(self) -> int:
        """About what comparing with the truth needs: two layers, their gradients, and three wide copies."""
        return 4 * self.weight_bytes + 3 * self.weight_bytes * wide(self.dtype).itemsize // self.dtype.itemsize

    def pass_bytes(self, rows: int) -> int:
        """About what forward and backward need beside the weights; the reference backend's fp32 is the most."""
        of_weights = 2 * self.weight_bytes + 2 * self.weight_bytes * 4 // self.dtype.itemsize
        return of_weights + 4 * self.experts * rows * (4 * self.dim + 6 * self.ffn)

    def __str__(self) -> str:
        held = f"{self.experts} of {self.of} experts, top-{self.top_k}"
        return f"{self.name}: D {self.dim}, F {self.ffn}, {held}, {str(self.dtype).removeprefix('torch.')}"


def shape_of(name: str, device: torch.device, experts: int | None = None, dtype: str | None = None) -> Shape:
    """The shape of a preset. Without `experts`: all, or the largest power of two within LAYER_BYTES."""
    model = preset(name)
    kind = getattr(torch, dtype or model.dtype)
    if experts is not None and experts > model.num_experts:
        raise ConfigError(f"--experts {experts}: a layer of {name} has {model.num_experts}; ask for at most that")
    fitting = LAYER_BYTES[device.type] // (3 * model.hidden_size * model.moe_intermediate_size * kind.itemsize)
    held = experts or min(model.num_experts, 1 << (max(1, fitting).bit_length() - 1))
    top_k = math.gcd(held, model.num_experts_per_tok)
    return Shape(name, model.hidden_size, model.moe_intermediate_size, held, model.num_experts, top_k, kind)


def growing(experts: int, dim: int, dtype: torch.dtype) -> Shape:
    """A layer with D = F = `dim` and four experts to a row, of a series that differs in `experts` alone."""
    return Shape(f"{experts} experts of {dim} x {dim}", dim, dim, experts, experts, math.gcd(experts, 4), dtype)


def device_of(name: str) -> torch.device:
    """Raises ConfigError where there is no CUDA device but one is asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; see `trinity doctor`, or use --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def free_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def no_room(needed: int, device: torch.device) -> str | None:
    """The reason why so many bytes had better not be tried; None if they fit."""
    free = free_bytes(device)
    return None if needed <= free else f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def build(name: str, device: torch.device) -> ExpertBackend:
    """`auto`, `reference` or KIND-PATH, as `torch-loop`. Raises ConfigError, with the remedy, where it cannot run."""
    kind, _, path = name.partition("-")
    if kind == "auto":
        return resolve(kind, device)
    if kind == "megablocks":
        resolve(kind, device)
        from trinity.experts.megablocks_backend import MegaBlocksBackend

        return MegaBlocksBackend(path)  # type: ignore[arg-type]
    return TorchBackend(path) if kind == "torch" else ReferenceBackend()  # type: ignore[arg-type]


def ready(names: Sequence[str], device: torch.device, asked: bool) -> tuple[dict[str, ExpertBackend], dict[str, str]]:
    """-> the backends that run here, and why the others do not. On CPU, MegaBlocks is interpreted: only if `asked`."""
    backends, missing = {}, {}
    for name in names:
        try:
            if name.startswith("megablocks") and device.type == "cpu" and not asked:
                raise ConfigError("it needs a CUDA device")
            backends[name] = build(name, device)
        except ConfigError as error:
            missing[name] = error.message
    return backends, missing


class Case(NamedTuple):
    """All that a forward and backward pass is given; x, weight_A and the weights are leaves of autograd."""

    x_RD: Tensor
    assigned: Assignments
    weights: LayerWeights
    dy_RD: Tensor


def layer_of(shape: Shape, device: torch.device, seed: int = 0, backends: Iterable[ExpertBackend] = ()) -> LayerWeights:
    """Laid out as a shard does for torch's backend, where no other is among `backends`."""
    generator = torch.Generator(device).manual_seed(seed)

    def stack(width: int) -> Tensor:
        values_EFD = torch.randn(shape.experts, shape.ffn, shape.dim, generator=generator, device=device)
        return values_EFD.mul_(width**-0.5).to(shape.dtype).requires_grad_()

    gate_EFD, up_EFD, down_EFD = map(stack, (shape.dim, shape.dim, shape.ffn))
    plain = [isinstance(each, TorchBackend | ReferenceBackend) for each in backends]
    if plain and all(plain) and TorchBackend().stores_down_transposed(device):
        down_EFD = down_EFD.detach().mT.contiguous().mT.requires_grad_()
    return LayerWeights(gate_EFD, up_EFD, down_EFD)


def balanced(shape: Shape, rows: int, weights: LayerWeights) -> Case:
    """Each expert gets exactly `rows` rows, each row goes to K different experts; assignments in random order."""
    generator = torch.Generator().manual_seed(rows)
    expert_A = torch.rand(rows, shape.experts, generator=generator).argsort(1).flatten()
    row_A = torch.arange(len(expert_A)) // shape.top_k
    return _case(row_A, expert_A, len(row_A) // shape.top_k, weights, generator)


def uneven(shape: Shape, rows: int, weights: LayerWeights) -> Case:
    """Give 1 to twice `rows` rows to each expert but the middle one, which gets none; rows are drawn at random."""
    generator = torch.Generator().manual_seed(rows)
    count_E = torch.randint(1, 2 * rows + 1, (shape.experts,), generator=generator)
    if shape.experts > 1:
        count_E[shape.experts // 2] = 0
    expert_A = torch.arange(shape.experts).repeat_interleave(count_E)
    num_rows = max(1, len(expert_A) // shape.top_k)
    return _case(torch.randint(num_rows, expert_A.shape, generator=generator), expert_A, num_rows, weights, generator)


def _case(row_A: Tensor, expert_A: Tensor, num_rows: int, weights: LayerWeights, generator: torch.Generator) -> Case:
    device, dtype, dim = weights.gate_EFD.device, weights.gate_EFD.dtype, weights.gate_EFD.shape[2]
    x_RD, dy_RD = (torch.randn(num_rows, dim, generator=generator).to(device, dtype) for _ in range(2))
    order_A = torch.randperm(len(row_A), generator=generator)
    weight_A = (torch.rand(len(row_A), generator=generator) + 0.5).to(device).requires_grad_()
    assigned = Assignments(row_A[order_A].to(device), expert_A[order_A].to(device), weight_A)
    return Case(x_RD.requires_grad_(), assigned, weights, dy_RD)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def results(backend: ExpertBackend, case: Case) -> list[Tensor]:
    """The output, as serving and as training compute it, and all five gradients, in the order of NAMES."""
    with torch.no_grad():
        served_RD = backend(case.x_RD, case.assigned, case.weights)
    y_RD = backend(case.x_RD, case.assigned, case.weights)
    leaves = [case.x_RD, case.assigned.weight_A, *case.weights]
    return [served_RD, y_RD.detach(), *torch.autograd.grad(y_RD, leaves, case.dy_RD)]


def truth_of(case: Case) -> list[Tensor]:
    """`results` of the reference backend, one precision up."""
    kind = wide(case.x_RD.dtype)
    x_RD, weight_A, *stacks = (
        leaf.detach().to(kind).requires_grad_() for leaf in (case.x_RD, case.assigned.weight_A, *case.weights)
    )
    exact = Case(x_RD, case.assigned._replace(weight_A=weight_A), LayerWeights(*stacks), case.dy_RD.to(kind))
    return results(ReferenceBackend(), exact)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Bound of a whole tensor's error. On CUDA, Triton multiplies fp32 as TF32."""
    if dtype is torch.float32:
        return 3e-3 if device.type == "cuda" else 1e-5
    return 1.2e-2


class Skipped(NamedTuple):
    """Reason why there is no result. `wrong`: not for want of support or memory."""

    why: str
    wrong: bool


def attempt(run: Callable[[], V]) -> V | Skipped:
    """The result of `run`, or why it failed: a kernel that does is a finding about it, and the others go on."""
    try:
        return run()
    except ConfigError as error:
        return Skipped(error.message, wrong=False)
    except torch.OutOfMemoryError:
        return Skipped("out of memory", wrong=False)
    except Exception as error:  # whatever a kernel or its compiler raises
        return Skipped(f"{type(error).__name__}: {error}".splitlines()[0], wrong=True)


class Verdict(NamedTuple):
    """`error`: the largest of the tensors' relative errors. `unfit`: it does not take this shape, and says so."""

    state: Literal["right", "wrong", "unfit"]
    error: float | None
    detail: str


def check(backend: ExpertBackend, case: Case, truth: Sequence[Tensor]) -> Verdict:
    """Output and gradients against the truth."""
    got = attempt(lambda: results(backend, case))
    if isinstance(got, Skipped):
        return Verdict("wrong" if got.wrong else "unfit", None, got.why)
    bound = tolerance(case.x_RD.dtype, case.x_RD.device)
    errors = {name: _errors(*pair) for name, *pair in zip(NAMES, got, truth, strict=True)}
    faults = [
        f"{name} is off by {whole:.1e}, at the worst place {worst:.1e}"
        for name, (whole, worst) in errors.items()
        if not (whole <= bound and worst <= WORST * bound)  # not so for NaN either
    ]
    idle_E = torch.bincount(case.assigned.expert_A, minlength=len(truth[-1])) == 0
    if not faults and any(grad_EFD[idle_E].any() for grad_EFD in got[-3:]):
        faults.append("an expert without rows has a gradient")
    return Verdict("wrong" if faults else "right", max(whole for whole, _ in errors.values()), "; ".join(faults))


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """-> relative errors: of the whole tensor, and of the worst slice along its first dimension against a typical one."""
    if got.shape != want.shape:
        return math.inf, math.inf
    error, size = ((t.reshape(len(want), -1).norm(dim=1)) for t in (got.to(want.dtype) - want, want))
    typical = size.square().mean().sqrt()
    return float(error.square().mean().sqrt() / typical), float(error.max() / typical)


def checked(
    backends: Mapping[str, ExpertBackend], shape: Shape, rows: int, weights: LayerWeights
) -> dict[str, Verdict]:
    """Every backend on uneven routings of a few and of about `rows` rows per expert: backends choose kernels by that."""
    unfit = _unfit(backends, shape)
    found: list[dict[str, Verdict]] = []
    for case in (uneven(shape, n, weights) for n in (FEW_ROWS, rows)):
        truth = truth_of(case)
        found.append({name: check(backend, case, truth) for name, backend in backends.items() if name not in unfit})
    return {**unfit, **{name: max((few, found[1][name]), key=_badness) for name, few in found[0].items()}}


def _unfit(backends: Mapping[str, ExpertBackend], shape: Shape) -> dict[str, Verdict]:
    if shape.dtype == torch.bfloat16 or "megablocks-gmm" not in backends:
        return {}
    return {"megablocks-gmm": Verdict("unfit", None, "the grouped_gemm package multiplies bfloat16 only")}


def _badness(verdict: Verdict) -> tuple[int, float]:
    return ("right", "unfit", "wrong").index(verdict.state), verdict.error or 0.0
