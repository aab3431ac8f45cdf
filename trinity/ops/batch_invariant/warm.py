"""Compiled code is compiled at its first use, or read from a folder beside it: here, while nobody waits for a token."""

import torch

from trinity.ops import extension
from trinity.ops.batch_invariant import elementwise, gemm
from trinity.ops.batch_invariant.attention import Seen, attention
from trinity.ops.batch_invariant.fused_mlp import feed_forward


def warm_up(dtype: torch.dtype, is_kept_in_int8: bool = False) -> None:
    """Run each kernel once on next to nothing. A few seconds on a machine's first time, half a second later."""
    z, one = torch.zeros(1, 1, 2, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    kept, scales = (z.to(torch.int8), (torch.ones(1, 1),) * 2) if is_kept_in_int8 else (z, ())
    attention(z, kept, kept, Seen(one, one, one + 1, one), scales)
    gemm.linear(z, z[0])
    elementwise.gated(z, z)
    if dtype == torch.float32 or extension.lib is not None:
        gemm.side_by_side(z[0], [z[0]] * 2)
        feed_forward(z[0], z[0, :1, None], z[0, :1, None], z.mT.contiguous(), one + 1)
    elementwise.sigmoid(z)
    elementwise.cos_sin(torch.zeros(1))
