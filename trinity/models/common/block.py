"""A transformer block in parts that are ordinary modules: one before the hop to the experts, one beside it, one after it.

Legend: T tokens, D model.

    residual, x, routing = pre(h, ...)      attention, norms, router
    y = the experts' sum of x               the hop: on shards, while `local` is computed here
    h = post(residual, local(x) + y)

Nothing between a part's input and its output waits for another process, so whatever wraps modules (fully_shard, checkpoint,
compile, hooks) wraps parts. A layer without routed experts has its dense feed-forward in `local` and no hop.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from trinity.models.common.attention import Attend, Attention
from trinity.models.common.experts import ExpertLayer, Pending
from trinity.models.common.layers import Device, Dtype, Made, RMSNorm, SwiGLU
from trinity.models.common.native_step import After, Before, NativeAfter, NativeBefore, NativeLocal
from trinity.models.common.router import Router, Routing

Table = tuple[Tensor, Tensor]  # of rotary angles


class Sent(NamedTuple):
    """Result of a block's first part: its residual stream, the feed-forward's input, and the router's decision, if any."""

    residual_TD: Tensor
    x_TD: Tensor
    routing: Routing | None


@dataclass(frozen=True, eq=False)
class Hop:
    """A layer's rows on their way. `finish` once."""

    block: "Block"
    sent: Sent
    local_TD: Tensor | None
    pending: Pending | None

    def finish(self) -> Tensor:
        """Wait for the experts; -> h_TD after the layer."""
        if self.pending is None:
            assert self.local_TD is not None, "a layer has experts, a dense feed-forward, or both"
            return self.block.leave(self.sent.residual_TD, self.local_TD, None)
        return self.block.leave(self.sent.residual_TD, self.pending.result(), self.local_TD)


class Block(nn.Module):
    """`pre`, `local` (shared experts, or the dense feed-forward; None: nothing) and `post`."""

    def __init__(self, layer: int, pre: nn.Module, local: SwiGLU | None, post: nn.Module, is_dense: bool):
        super().__init__()
        self.layer, self.pre, self.post = layer, pre, post
        self.shared: SwiGLU | None = None if is_dense else local
        self.dense: SwiGLU | None = local if is_dense else None
        before, after = getattr(pre, "described", None), getattr(post, "described", None)
        self._native_pre = None if before is None else NativeBefore(pre, before())
        self._native_post = None if after is None else NativeAfter(post, after())
        self._native_local = None if local is None else NativeLocal(local, *local.parts)

    @property
    def described(self) -> tuple[NativeBefore | None, NativeAfter | None, NativeLocal | None]:
        """Its three parts for the extension; None: not described, or (the last) not there."""
        return self._native_pre, self._native_post, self._native_local

    @property
    def local(self) -> SwiGLU | None:
        return self.dense if self.shared is None else self.shared

    def begin(self, h_TD: Tensor, table: Table, attend: Attend, experts: ExpertLayer) -> Hop:
        """Compute up to the hop, send the rows, and compute what this process has of the feed-forward meanwhile."""
        sent, pending = self.enter(h_TD, table, attend), None
        if sent.routing is not None:
            pending = experts.begin(self.layer, sent.x_TD, sent.routing.ids_TK, sent.routing.weights_TK)
        return Hop(self, sent, None if self.local is None else self.local(sent.x_TD), pending)

    def enter(self, h_TD: Tensor, table: Table, attend: Attend) -> Sent:
        """`pre`, natively where that is possible."""
        found = None if self._native_pre is None else self._native_pre(h_TD, table, attend)
        return self.pre(h_TD, table, attend) if found is None else Sent(*found)

    def leave(self, residual_TD: Tensor, y_TD: Tensor, local_TD: Tensor | None) -> Tensor:
        """`post` of the sum of y and what was computed here, natively where that is possible."""
        found = None if self._native_post is None else self._native_post(residual_TD, y_TD, local_TD)
        if found is not None:
            return found
        return self.post(residual_TD, y_TD if local_TD is None else local_TD + y_TD)

    def forward(
        self, h_TD: Tensor, table: Table, attend: Attend, experts: ExpertLayer
    ) -> tuple[Tensor, Routing | None]:
        hop = self.begin(h_TD, table, attend, experts)
        return hop.finish(), hop.sent.routing


class PreNorm(nn.Module):
    """The part before the hop as Llama has it: a norm before attention, a norm before the feed-forward."""

    def __init__(
        self,
        attention: Attention,
        router: Router | None,
        dim: int,
        eps: float,
        *,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        made: Made = {"device": device, "dtype": dtype}
        self.input_layernorm, self.self_attn = RMSNorm(dim, eps, rounds_first=True, **made), attention
        self.post_attention_layernorm = RMSNorm(dim, eps, rounds_first=True, **made)
        self.router = router

    def described(self) -> Before:
        """Its parts, for the extension (native_step.py)."""
        return Before(self.input_layernorm, self.self_attn, None, self.post_attention_layernorm, self.router)

    def forward(self, h_TD: Tensor, table: Table, attend: Attend) -> Sent:
        h_TD = h_TD + self.self_attn(self.input_layernorm(h_TD), table, attend)
        x_TD = self.post_attention_layernorm(h_TD)
        return Sent(h_TD, x_TD, None if self.router is None else self.router(x_TD))


class Residual(nn.Module):
    """The part after the hop as Llama has it: the sum."""

    def described(self) -> After:
        """Its parts, for the extension (native_step.py)."""
        return After(None)

    def forward(self, residual_TD: Tensor, y_TD: Tensor) -> Tensor:
        return residual_TD + y_TD
