"""Blocks whose parts before and after the hop are computed by the extension in C++, where there is one: four calls for a layer.

Legend: T tokens, D model, H query heads, G key-value heads, d head dim, X = H * d, E experts, K top-k.
A family's part describes what it is made of (`Before`, `After`): the modules that compute it otherwise, in the order of their
use. The extension knows no family; what is not described, or not for it, runs as its modules.
Decisions: the bits are those of the modules. Products, attention and sigmoid are sums in an order that is written down
(trinity/ops/batch_invariant); norms and top-k follow torch's own order, so the first use of a kind of block is compared with
its modules bit for bit, and a kind that differs is not used. Where there are hooks or adapters, the modules run.
"""

import logging
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trinity import native
from trinity.models.common.attention import Attend, Attention
from trinity.models.common.layers import Linear, RMSNorm
from trinity.models.common.router import Router, Routing, SigmoidRouter, SoftmaxRouter
from trinity.ops import batch_invariant

log = logging.getLogger(__name__)

Table = tuple[Tensor, Tensor]
Place = Callable[[Tensor | None], int]
MOST_DIM, MOST_HEAD_DIM = 1 << 15, 1 << 12  # native/step/pieces.inl: kMostDim
NORM, MATRIX = "qdq", "7q"  # native/step/step.h
PROJECT, ROUTE, LEAVE, ATTEND = f"<4q{3 * NORM}{4 * MATRIX}", f"<3q{2 * NORM}{2 * MATRIX}6qd", f"<2q{NORM}", "<9q"
PYTHONS, SIGMOID, SOFTMAX = range(3)  # native/step/step.h:Scoring
LOCAL, HEAD = f"<2q{3 * MATRIX}", f"<2q{NORM}{MATRIX}"
tried: dict[tuple[object, ...], bool] = {}  # kinds of parts, and of models, that were compared with their modules


class Before(NamedTuple):
    """The part before the hop: h += after(out(gated(attention(norm(h))))), x = next(h), and the router's choice for x."""

    norm: RMSNorm
    attention: Attention
    after: RMSNorm | None
    next: RMSNorm
    router: Router | None


class After(NamedTuple):
    """The part after the hop: residual + norm(y)."""

    norm: RMSNorm | None


class Stored(NamedTuple):
    """Memory that single tokens' attention reads and writes: its description (`ATTEND`), addresses of each token's row of the
    block table and of its position, and where a layer's keys and values, and their scales, are.

    An Attend that can say so has `stored(layer, q_THd) -> Stored | None`; None: its own way is needed.
    """

    description: bytes
    tokens: tuple[int, int]
    parts: Sequence[int]


class Result(NamedTuple):
    """Result of the part before the hop: see block.Sent."""

    residual_TD: Tensor
    x_TD: Tensor
    routing: Routing | None


class Part:
    """A part that is described. Its weights' places are looked up in each call: they are packed again when one has moved."""

    def __init__(self, part: nn.Module, modules: Sequence[nn.Module | None], linears: Sequence[Linear] = ()):
        self.module, self.linears = part, linears
        tables: list[Any] = [table for each in modules if each for table in (each._parameters, each._buffers)]
        self.tensors = [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
        own = [part, *(each for each in modules if each)]
        self._hooks = [hooks for each in own for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._at: tuple[object, ...] = ()
        self._is_usable = False

    def is_for(self, h_TD: Tensor, like: object = None) -> bool:
        """Say whether the extension computes it for rows like these. `like`: what else the description depends on."""
        if not is_possible(h_TD) or any(self._hooks) or self._is_adapted():
            return False
        at = (h_TD.dtype, like, *places_of(self.tensors))
        if at != self._at:
            self._at, self._is_usable = at, self._prepared(h_TD, like)
        return self._is_usable

    def _is_adapted(self) -> bool:
        if any(linear.adapter is not None for linear in self.linears):
            return True
        return bool(self.linears) and self.linears[0].passing.adapters is not None

    def _prepared(self, h_TD: Tensor, like: Any) -> bool:
        rounded = {id(linear._parameters) for linear in self.linears if linear.is_rounded}
        for table, name in self.tensors:
            tensor, is_free = table[name], name == "bias_E" or (name == "weight" and id(table) in rounded)
            if not is_free and not (tensor.dtype == h_TD.dtype and tensor.is_contiguous() and tensor.is_cpu):
                return False
        self.is_brain = h_TD.dtype == torch.bfloat16
        if not self.fits(h_TD):
            return False
        self.kind = (type(self.module), h_TD.dtype, *self.packed(_is_there, like))
        self.description = self.packed(_place, like)
        if self.kind not in tried:
            tried[self.kind] = self.agrees(h_TD, like)
            if not tried[self.kind]:
                log.warning("%s runs as its modules: the extension's bits differ", type(self.module).__name__)
        return tried[self.kind]

    is_brain = False  # its rows are in bfloat16
    description: tuple[bytes, ...] = ()
    kind: tuple[object, ...] = ()

    def fits(self, h_TD: Tensor) -> bool:
        return h_TD.shape[-1] <= MOST_DIM

    def packed(self, place: Place, like: Any) -> tuple[bytes, ...]:
        """Descriptions for the extension's calls, tensors by their places."""
        raise NotImplementedError

    def agrees(self, h_TD: Tensor, like: Any) -> bool:
        """Has the extension the bits of the modules?"""
        raise NotImplementedError


def is_possible(h_TD: Tensor) -> bool:
    """Say whether there is an extension for rows like these."""
    if not hasattr(native.lib, "step_run") or not torch.is_inference_mode_enabled():
        return False
    return batch_invariant.is_for(h_TD) and h_TD.is_contiguous() and len(h_TD) > 0


def places_of(tensors: Sequence[tuple[Any, str]]) -> tuple[list[int], list[int], list[int]]:
    """Places of tensors now, and their sizes: another answer means that what was described of them does not hold. Some hundred
    tensors are asked in each pass, so no Python runs between them."""
    found = [table[name] for table, name in tensors]
    return [*map(id, found)], [*map(Tensor.data_ptr, found)], [*map(Tensor.numel, found)]


class NativeBefore(Part):
    def __init__(self, part: nn.Module, what: Before):
        attention, router = what.attention, what.router
        gate = () if attention.gate_proj is None else (attention.gate_proj,)
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, *gate, attention.o_proj]
        linears += [] if router is None else [router.gate]
        norms = (what.norm, attention.q_norm, attention.k_norm, what.after, what.next)
        super().__init__(part, [*norms, *linears, router, attention], linears)
        self.what = what

    def __call__(self, h_TD: Tensor, table: Table, attend: Attend) -> Result | None:
        """None: the modules have to."""
        return self._run(h_TD, table, attend) if self.is_for(h_TD, table[0].shape[-1]) else None

    def fits(self, h_TD: Tensor) -> bool:
        attention = self.what.attention
        return super().fits(h_TD) and attention.head_dim <= MOST_HEAD_DIM and attention.is_exact

    def packed(self, place: Place, like: Any) -> tuple[bytes, ...]:
        what, attention, router = self.what, self.what.attention, self.what.router
        is_brain, dim = what.norm.weight.dtype == torch.bfloat16, attention.q_proj.in_features
        matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.gate_proj)
        norms = (what.norm, attention.q_norm, attention.k_norm)
        project = struct.pack(
            PROJECT, is_brain, dim, attention.head_dim, like if attention.rotates else 0, *_norms(place, *norms),
            *_matrices(place, *matrices),
        )  # fmt: skip
        route = struct.pack(
            ROUTE, is_brain, dim, attention.o_proj.in_features, *_norms(place, what.after, what.next),
            *_matrices(place, attention.o_proj, None if router is None else router.gate), *_choice(place, router),
        )  # fmt: skip
        return project, route

    def agrees(self, h_TD: Tensor, like: Any) -> bool:
        rows_TD, rng = _rows(h_TD), torch.Generator().manual_seed(1)
        angle = torch.rand(len(rows_TD), 1, like, generator=rng).to(h_TD.dtype)
        table = (angle.cos(), angle.sin())
        theirs, ours = self.module(rows_TD, table, _nobody), self._run(rows_TD, table, _nobody)
        pairs = [*zip(theirs[:2], ours[:2], strict=True), *zip(theirs[2] or (), ours[2] or (), strict=True)]
        return all(torch.equal(a, b) for a, b in pairs)

    def _run(self, h_TD: Tensor, table: Table, attend: Attend) -> Result:
        q_THd, k_TGd, v_TGd, gate_TX = self.project(h_TD, table)
        o_THd = attended(self.what.attention.layer, attend, q_THd, k_TGd, v_TGd)
        return self.route(o_THd, gate_TX, h_TD)

    def project(self, h_TD: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """-> q_THd, k_TGd, v_TGd, normalised and rotated, and gate_TX."""
        num, attention = len(h_TD), self.what.attention
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        dim = attention.head_dim
        q, k, v = (h_TD.new_empty((num, part.out_features // dim, dim)) for part in parts)
        gate = None if attention.gate_proj is None else h_TD.new_empty((num, attention.gate_proj.out_features))
        places = map(_place, (h_TD, *table, q, k, v, gate))
        native.lib.step_project(self.description[0], torch.get_num_threads(), num, *places)
        return q, k, v, gate

    def route(self, o_THd: Tensor, gate_TX: Tensor | None, h_TD: Tensor) -> Result:
        router, residual_TD, x_TD = self.what.router, torch.empty_like(h_TD), torch.empty_like(h_TD)
        routed = [] if router is None else _routed(router, len(h_TD))
        places = map(_place, (o_THd, gate_TX, h_TD, residual_TD, x_TD, *routed, *[None] * (4 - len(routed))))
        native.lib.step_route(self.description[1], torch.get_num_threads(), len(h_TD), *places)
        if router is None:
            return Result(residual_TD, x_TD, None)
        routing = Routing(*routed) if len(routed) == 4 else router.routed(routed[0])
        return Result(residual_TD, x_TD, routing)


class NativeAfter(Part):
    def __init__(self, part: nn.Module, what: After):
        super().__init__(part, [what.norm])
        self.what = what

    def __call__(self, residual_TD: Tensor, routed_TD: Tensor, local_TD: Tensor | None) -> Tensor | None:
        """h_TD after the layer; None: the modules have to."""
        others = (routed_TD,) if local_TD is None else (routed_TD, local_TD)
        if not all(each.is_contiguous() and each.dtype == residual_TD.dtype for each in others):
            return None
        return self._run(residual_TD, routed_TD, local_TD) if self.is_for(residual_TD) else None

    def packed(self, place: Place, like: Any) -> tuple[bytes, ...]:
        is_brain, dim = like
        return (struct.pack(LEAVE, is_brain, dim, *_norms(place, self.what.norm)),)

    def is_for(self, h_TD: Tensor, like: object = None) -> bool:
        return super().is_for(h_TD, (h_TD.dtype == torch.bfloat16, h_TD.shape[-1]))

    def agrees(self, h_TD: Tensor, like: Any) -> bool:
        residual, routed, local = _rows(h_TD), _rows(h_TD).flip(0), _rows(h_TD).flip(1).contiguous()
        return torch.equal(self.module(residual, local + routed), self._run(residual, routed, local))

    def _run(self, residual_TD: Tensor, routed_TD: Tensor, local_TD: Tensor | None) -> Tensor:
        out_TD = torch.empty_like(residual_TD)
        places = map(_place, (residual_TD, routed_TD, local_TD, out_TD))
        native.lib.step_leave(self.description[0], torch.get_num_threads(), len(residual_TD), *places)
        return out_TD


class NativeLocal(Part):
    """A SwiGLU that all rows go through."""

    def __init__(self, part: nn.Module, gate: Linear, up: Linear, down: Linear):
        super().__init__(part, (gate, up, down), (gate, up, down))

    def fits(self, h_TD: Tensor) -> bool:
        return (bool(self.module.is_exact) or self.linears[0].is_rounded) and all(
            w.weight.numel() for w in self.linears
        )

    def packed(self, place: Place, like: Any) -> tuple[bytes, ...]:
        gate = self.linears[0]
        return (struct.pack(LOCAL, self.is_brain, gate.in_features, *_matrices(place, *self.linears)),)

    def agrees(self, h_TD: Tensor, like: Any) -> bool:
        return all(torch.equal(self.module(rows), self._run(rows)) for rows in (_rows(h_TD)[:1], _rows(h_TD)))

    def _run(self, x_TD: Tensor) -> Tensor:
        y_TD = torch.empty_like(x_TD)
        places = map(_place, (x_TD, y_TD))
        native.lib.step_local(self.description[0], torch.get_num_threads(), len(x_TD), *places)
        return y_TD


class NativeHead(Part):
    """The norm after the last layer, and the head."""

    def __init__(self, norm: RMSNorm, head: Linear):
        super().__init__(head, (norm,), (head,))
        self.tensors += [(head._parameters, name) for name, each in head._parameters.items() if each is not None]
        self.norm, self.head = norm, head

    def fits(self, h_TD: Tensor) -> bool:
        return super().fits(h_TD) and (self.head.is_exact or self.head.is_rounded)

    def packed(self, place: Place, like: Any) -> tuple[bytes, ...]:
        dim = self.head.in_features
        return (struct.pack(HEAD, self.is_brain, dim, *_norms(place, self.norm), *_matrices(place, self.head)),)

    def agrees(self, h_TD: Tensor, like: Any) -> bool:
        rows = _rows(h_TD)
        hidden, logits = torch.empty_like(rows), rows.new_empty(len(rows), self.head.out_features)
        places = map(_place, (rows, hidden, logits))
        native.lib.step_finish(self.description[0], torch.get_num_threads(), len(rows), *places)
        return torch.equal(self.norm(rows), hidden) and torch.equal(self.head(hidden), logits)


def attended(layer: int, attend: Attend, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """-> o_THd, natively where the Attend says where its memory is."""
    stored: Stored | None = attend.stored(layer, q_THd) if hasattr(attend, "stored") else None
    if stored is None:
        return attend(layer, q_THd, k_TGd, v_TGd)
    out_THd = torch.empty_like(q_THd)
    places = (*map(_place, (q_THd, k_TGd, v_TGd)), *stored.parts, _place(out_THd))
    native.lib.step_attend(stored.description, torch.get_num_threads(), len(q_THd), *stored.tokens, *places)
    return out_THd


def _nobody(layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGe: Tensor | None) -> Tensor:
    """An Attend that lets all see themselves alone, near enough."""
    return q_THd + k_TGd.repeat_interleave(q_THd.shape[1] // k_TGd.shape[1], dim=1)


def _rows(h_TD: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(5, h_TD.shape[-1], generator=rng).to(h_TD.dtype)


def _routed(router: Router, num: int) -> list[Tensor]:
    """Memory for a Routing, or for its logits alone."""
    logits_TE = torch.empty(num, router.gate.out_features)
    if not isinstance(router, SigmoidRouter | SoftmaxRouter):
        return [logits_TE]
    ids_TK = torch.empty(num, router.top_k, dtype=torch.int64)
    return [logits_TE, torch.empty_like(logits_TE), ids_TK, torch.empty(num, router.top_k)]


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_there(tensor: Tensor | None) -> int:
    return int(tensor is not None)


def _norms(place: Place, *norms: RMSNorm | None) -> list[float]:
    """Fields of a Norm each."""
    fields: list[float] = []
    for norm in norms:
        fields += (0, 0.0, 0) if norm is None else (place(norm.weight), norm.eps, norm.rounds_first)
    return fields


def _matrices(place: Place, *parts: Linear | None) -> list[int]:
    """Fields of a Matrix each."""
    fields: list[int] = []
    for part in parts:
        if part is None:
            fields += [0] * 7
            continue
        values, scale, more = kept = part.kept
        fields += (place(values), place(part.bias), place(scale), place(more), *kept.sides, kept.kind)
    return fields


def _choice(place: Place, router: Router | None) -> tuple[float, ...]:
    """Fields of a Route that say how experts are chosen."""
    if isinstance(router, SoftmaxRouter):
        return SOFTMAX, router.top_k, 1, 1, router.normalises, 0, 1.0
    if not isinstance(router, SigmoidRouter):
        return PYTHONS, 0 if router is None else router.top_k, 1, 1, 0, 0, 1.0
    groups = (router.num_groups, router.top_groups)
    return SIGMOID, router.top_k, *groups, router.normalises, place(router.bias_E), router.scale
