"""The small parts every layer is made of: RMSNorm, SwiGLU, rotary tables.

Legend: T tokens, H heads, d head dim.
Norms compute in fp32 and round once, after the gain, as transformers 5.23 does. Rotary frequencies are recomputed in
fp32 from the positions at each forward pass: they are no buffer, so `.to(bfloat16)` and `to_empty` cannot damage them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """(w * x / rms(x)) over the last dimension, in fp32, returned in x's dtype. The gain is w, not 1 + w."""

    def __init__(self, dim: int, eps: float, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); the dense layers' feed-forward and the shared experts."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None):
        super().__init__()
        self.gate_proj = linear(dim, hidden, device=device, dtype=dtype)
        self.up_proj = linear(dim, hidden, device=device, dtype=dtype)
        self.down_proj = linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def linear(in_features: int, out_features: int, *, device=None, dtype=None) -> nn.Linear:
    """AFMoE has no biases anywhere."""
    return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)


def rotary_table(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos_T1d, sin_T1d) for integer positions: angles in fp32, then cast; both halves of d hold the same angles."""
    powers = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angle = positions_T[:, None, None].float() * (1.0 / theta**powers)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_THd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """NeoX rotary embedding (half-split pairs) over the whole head, in x's dtype."""
    cos_T1d, sin_T1d = table
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos_T1d + torch.cat((-second, first), dim=-1) * sin_T1d
