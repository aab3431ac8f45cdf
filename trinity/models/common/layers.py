"""The small parts every layer is made of: RMSNorm, SwiGLU, rotary tables.

Legend: T tokens, H heads, d head dim.
Norms compute in fp32; whether they round before or after the gain is the family's to say. Rotary frequencies are recomputed in
fp32 from the positions at each forward pass: they are no buffer, so `.to(bfloat16)` and `to_empty` cannot damage them.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity.models.common.adapted import Passing
from trinity.ops import batch_invariant
from trinity.ops.extension import Matrices
from trinity.ops.stored import FORMATS, Format, made, matrices

Device = torch.device | str | None
Dtype = torch.dtype | None


class Made(TypedDict):
    """Device and type that a module's parameters are made in; None: torch's default."""

    device: Device
    dtype: Dtype


NO_PASS = Passing()  # of a matrix that is in no model
POSITIONS = 256  # whose angles are computed at a time
HAS_ONEDNN = torch.backends.mkldnn.is_available()


class RMSNorm(nn.Module):
    """(w * x / rms(x)) over the last dimension, in x's dtype. The gain is w, not 1 + w.

    Computed in fp32 and rounded once, after the gain; with `rounds_first` the gain multiplies what is rounded already (Llama).
    """

    def __init__(self, dim: int, eps: float, *, rounds_first: bool = False, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.eps, self.rounds_first = eps, rounds_first
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self._is_trained(x):
            from trinity.ops.batch_invariant.norm import rms_norm

            return rms_norm(x, self.weight, self.eps, self.rounds_first)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype) if self.rounds_first else (self.weight * x32).to(x.dtype)

    def _is_trained(self, x: Tensor) -> bool:
        """Say whether there is a kernel for the gradients that somebody may ask for."""
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or not (x.requires_grad or self.weight.requires_grad)
        ):
            return False
        return x.numel() > 0 and batch_invariant.is_for(x) and batch_invariant.is_for(self.weight)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); the dense layers' feed-forward and the shared experts."""

    is_exact = False

    def __init__(self, dim: int, hidden: int, *, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.gate_proj = Linear(dim, hidden, device=device, dtype=dtype)
        self.up_proj = Linear(dim, hidden, device=device, dtype=dtype)
        self.down_proj = Linear(hidden, dim, device=device, dtype=dtype)

    @property
    def parts(self) -> tuple["Linear", "Linear", "Linear"]:
        """Gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor) -> Tensor:
        if (self.is_exact or self.gate_proj.is_rounded) and (y := self._at_once(x)) is not None:
            return y
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up, self.is_exact))

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The same bits, for inference; None where that does not fit."""
        weights, rounded = [part.weight for part in self.parts], [part.kept for part in self.parts if part.is_rounded]
        is_adapted = any(part.is_adapted for part in self.parts)
        if rounded and x.numel() and not is_adapted:
            from trinity.ops.rounded import feed_forward

            return feed_forward(x.flatten(0, -2), *rounded).to(x.dtype).unflatten(0, x.shape[:-1])
        if is_adapted or not batch_invariant.at_once(x, *weights):
            return None
        from trinity.ops.batch_invariant import fused_mlp

        x_TD, (gate_1FD, up_1FD, down_1DF) = x.flatten(0, -2), (weight.unsqueeze(0) for weight in weights)
        y_TD = fused_mlp.feed_forward(x_TD, gate_1FD, up_1FD, down_1DF, torch.tensor([len(x_TD)]))
        return y_TD.unflatten(0, x.shape[:-1])


class Embedding(nn.Embedding):
    """torch's, but not drawn on the meta device: numbers of nothing would import a compiler, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """A matrix and, where the family has one, a bias; `adapter`: a module that makes the product instead (trinity/adapters/).
    `is_exact`: see `ModelConfig.batch_invariant`; `name` in a checkpoint, without `.weight`; `passing`: whose pass may have
    adapters that add to the product (adapted.py). CausalLM sets the three.

    Inference in fp32 on a CPU multiplies by a copy of the weight in oneDNN's own layout, packed again whenever the weight has
    changed (512 x 512, 2 threads: 114 us instead of 190 for 32 rows, 62 instead of 172 for 3). It sees a weight that was
    replaced or written in place (`load_state_dict`, `copy_`), but no write through `.data`, which leaves no trace.

    `round_to` has inference multiply by the weight in another format, which then is all that is kept of it.
    """

    is_exact, name, passing = False, "", NO_PASS

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, device: Device = None, dtype: Dtype = None
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.adapter: nn.Module | None = None
        self._packed: tuple[list[tuple[int, int]], list[Tensor], Tensor] | None = None
        self.format: Format | None = None  # that it is kept in, if that is not the model's type
        self.scale: Tensor | None = None  # of some formats, as is the next
        self.more: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None:
            return self.biased(self.adapter(x, [self])[0])
        if self.is_rounded:
            return project(x, self)[0]
        y = self.packed_with([], x) if is_packed(x, self) else self.times(x, self.weight)
        return self.finished(x, y)

    @property
    def is_rounded(self) -> bool:
        return self.format is not None

    def round_to(self, name: str) -> None:
        """Keep the weight in that format from now on. Its values follow, by `fill`."""
        self.format = FORMATS[name]
        *others, (dtype, shape) = self.format.planes((self.out_features, self.in_features))
        self.weight = nn.Parameter(self.weight.new_empty(shape, dtype=dtype), requires_grad=False)
        scales = [torch.empty(each.shape, dtype=each.dtype) for each in others]
        _, self.scale, self.more = matrices([*scales, self.weight])

    @property
    def num_scale_bytes(self) -> int:
        return sum(part.nbytes for part in (self.scale, self.more) if part is not None)

    @torch.no_grad()
    def fill(self, weight_NK: Tensor) -> None:
        """Give the weight these values, as it is kept."""
        assert self.format is not None, "it is copied"
        self.put(made(weight_NK, self.format.name))

    @torch.no_grad()
    def put(self, kept: Matrices) -> None:
        """Copy these values in, which are of its format."""
        for own, other in zip(self.kept, kept, strict=True):
            if own is not None and other is not None:
                own.copy_(other)

    @property
    def kept(self) -> Matrices:
        """The weight as it is kept."""
        return Matrices(self.weight, self.scale, self.more)

    def times(self, x: Tensor, weight_NK: Tensor) -> Tensor:
        return product(x, weight_NK, self.is_exact)

    def finished(self, x: Tensor, y: Tensor) -> Tensor:
        """The product y with what the pass's adapters and the bias add to it."""
        adapters = self.passing.adapters
        return self.biased(y if adapters is None else adapters.add(self, x, y))

    def biased(self, y: Tensor) -> Tensor:
        """The product with the bias added."""
        return y if self.bias is None else y + self.bias

    @property
    def is_adapted(self) -> bool:
        """Does an adapter change the product?"""
        adapters = self.passing.adapters
        return self.adapter is not None or (adapters is not None and adapters.has(self.name))

    def packed_with(self, others: Sequence["Linear"], x: Tensor) -> Tensor:
        """x times this weight and the others', side by side, as one multiplication."""
        weights = [part.weight for part in (self, *others)]
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        if self._packed is None or self._packed[0] != state:
            same = [weight.detach() for weight in weights]  # kept: no other weight can get their addresses
            self._packed = (state, same, torch.ops.mkldnn._reorder_linear_weight(torch.cat(same), None))
        return torch.ops.mkldnn._linear_pointwise(x, self._packed[2], None, "none", [], "")


def is_packed(x: Tensor, part: Linear) -> bool:
    """Say whether rows like x are multiplied by packed weights. oneDNN has no empty ones, as those of no shared experts."""
    if part.is_exact or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or not HAS_ONEDNN:
        return False
    if part.weight.is_inference():  # made in inference mode: it has no version to tell a change by
        return False
    return x.is_cpu and x.dtype is torch.float32 and len(x) > 0 and part.weight.numel() > 0


def project(x: Tensor, *parts: Linear) -> Sequence[Tensor]:
    """Each part's product with the same rows."""
    adapters = [part.adapter for part in parts if part.adapter is not None]
    if len(adapters) == len(parts):
        return [part.biased(each) for part, each in zip(parts, adapters[0](x, parts), strict=True)]
    if adapters:
        return [part(x) for part in parts]
    if rounded := [part.kept for part in parts if part.is_rounded]:
        from trinity.ops.rounded import side_by_side

        sums = [y.to(x.dtype).unflatten(0, x.shape[:-1]) for y in side_by_side(x.flatten(0, -2), rounded)]
        return [part.finished(x, y) for part, y in zip(parts, sums, strict=True)]
    if is_packed(x, parts[0]):
        y = parts[0].packed_with(parts[1:], x)
    elif parts[0].is_exact and batch_invariant.at_once(x, *(part.weight for part in parts)):
        from trinity.ops.batch_invariant import gemm

        y = gemm.side_by_side(x.flatten(0, -2), [part.weight for part in parts]).unflatten(0, x.shape[:-1])
    else:
        return [part(x) for part in parts]
    products = y.split([part.out_features for part in parts], dim=-1)
    return [part.finished(x, each) for part, each in zip(parts, products, strict=True)]


def product(x: Tensor, weight_NK: Tensor, is_exact: bool) -> Tensor:
    """x [..., K] times the transpose of the weight -> [..., N]."""
    if is_exact and batch_invariant.is_for(x) and x.dtype == weight_NK.dtype:
        from trinity.ops.batch_invariant import gemm

        return gemm.linear(x, weight_NK)
    return F.linear(x, weight_NK)


def swiglu(gate: Tensor, up: Tensor, is_exact: bool) -> Tensor:
    if is_exact and batch_invariant.is_for(gate):
        from trinity.ops.batch_invariant import elementwise

        return elementwise.swiglu(gate, up)
    return F.silu(gate) * up


def sigmoid(x: Tensor, is_exact: bool) -> Tensor:
    if is_exact and batch_invariant.is_for(x):
        from trinity.ops.batch_invariant import elementwise

        return elementwise.sigmoid(x)
    return x.sigmoid()


def softmax(x: Tensor, is_exact: bool) -> Tensor:
    """Over the last dimension, of float32."""
    if is_exact and batch_invariant.is_for(x):
        from trinity.ops.batch_invariant import elementwise

        return elementwise.softmax(x)
    return x.softmax(-1)


def rotary_table(
    positions_T: Tensor, dim: int, theta: float, dtype: torch.dtype, is_exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(cos_T1d, sin_T1d) for integer positions: angles in fp32, then cast; both halves of d hold the same angles.

    `dim`: the numbers of a head that are rotated.
    """
    powers = torch.arange(0, dim, 2, device=positions_T.device, dtype=torch.float32) / dim
    angle = positions_T[:, None, None].float() * (1.0 / theta**powers)
    if is_exact and batch_invariant.is_for(angle):
        from trinity.ops.batch_invariant import elementwise

        cos, sin = elementwise.cos_sin(angle)
    else:
        cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


class RotaryTable:
    """`rotary_table` of exact arithmetic on a CPU, computed once for each position up to the highest that was asked for: in
    memory for positions up to `most` that is taken as it is filled.

    Legend: P positions.
    """

    def __init__(self, dim: int, theta: float, most: int):
        self._dim, self._theta, self._most = dim, theta, most
        self._known: dict[torch.dtype, tuple[int, Tensor, Tensor]] = {}  # positions that are filled, cos_Pd and sin_Pd

    def __call__(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos_T1d and sin_T1d."""
        end = int(positions_T.max()) + 1 if len(positions_T) else 0
        if end > self._most:
            return rotary_table(positions_T, self._dim, self._theta, dtype, True)
        filled, cos_Pd, sin_Pd = self._known[dtype] if dtype in self._known else (0, *self._empty(dtype))
        parts = cos_Pd, sin_Pd
        if filled < end:
            last = min(self._most, -(-end // POSITIONS) * POSITIONS)
            new = rotary_table(torch.arange(filled, last), self._dim, self._theta, dtype, True)
            for part, own in zip(parts, new, strict=True):
                part[filled:last] = own[:, 0]
            self._known[dtype] = last, cos_Pd, sin_Pd  # threads that do so at once write the same numbers
        cos_T1d, sin_T1d = (part.index_select(0, positions_T).unsqueeze(1) for part in parts)
        return cos_T1d, sin_T1d

    def _empty(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # else only inference could read it
            return torch.empty(self._most, self._dim, dtype=dtype), torch.empty(self._most, self._dim, dtype=dtype)


def rotate(x_THd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """NeoX rotary embedding (half-split pairs) of as many numbers of a head as the table has, the first; in x's dtype."""
    cos_T1d, sin_T1d = table
    if (dim := cos_T1d.shape[-1]) < x_THd.shape[-1]:
        return torch.cat((rotate(x_THd[..., :dim], table), x_THd[..., dim:]), dim=-1)
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos_T1d + torch.cat((-second, first), dim=-1) * sin_T1d
