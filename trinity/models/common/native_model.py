"""A pass through all layers as one call of the extension in C++, which comes back where Python has to do a part.

Legend: T tokens, D model, X = heads * head dim, E experts, K top-k, L layers, M those of them that route, V vocabulary.
What the layers are made of is described once (native_step.py), and again when a tensor is another or lies elsewhere; where
keys and experts are is said for each pass by the Attend and by the ExpertLayer, if they can.
Decisions: where a layer is not described, or attention, a choice or a layer's experts are not the extension's to compute, the
call returns, Python does that part as it always does, and calls again from the next place. Rows for shards that rings lead to
leave and come back inside the call. A kind of model is first compared with its modules in a whole pass, bit for bit. With
hooks, adapters or gradients the modules run.
"""

import itertools
import logging
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trinity import native
from trinity.models.common import native_step
from trinity.models.common.attention import Attend, Attention
from trinity.models.common.block import Block, Table
from trinity.models.common.experts import ExpertLayer, Pending
from trinity.models.common.native_step import NativeAfter, NativeBefore, NativeHead, NativeLocal, Part
from trinity.models.common.router import Router, Routing

if TYPE_CHECKING:
    from trinity.models.common.decoder import CausalLM, Output

log = logging.getLogger(__name__)

ENTER, ATTEND, ROUTE, CHOOSE, EXPERTS, LOCAL, JOIN, LEAVE, PLACES = range(9)  # native/step/plan.h
MEMORY, RUN, HERE = "<5q", "<23q", "<29q"
ELSEWHERE = bytes(struct.calcsize(HERE))
NO_LOCAL = bytes(struct.calcsize(native_step.LOCAL))
LINE, NUM_ROWS = 64, 9  # bytes; parts of a pass's memory that are rows as wide as the model's
NO_LAYER = bytes(sum(map(struct.calcsize, (native_step.PROJECT, native_step.ROUTE, native_step.LEAVE))))


class Memories(NamedTuple):
    """Memory that single tokens' attention reads and writes: descriptions of `num` attentions, of each layer which of them it
    has, and its keys and values (`MEMORY`), and addresses of each token's row of the block table and of its position.

    An Attend that can say so has `memories(heads_L, dtype) -> Memories | None`; None: its own way is needed.
    """

    num: int
    attends: bytes
    memory_L: bytes | None
    tokens: tuple[int, int]


class NearPass(Protocol):
    """Rings for a pass's layers. An ExpertLayer that can say so has `near(layers, x_TD) -> NearPass | None`."""

    def described(self, layers: Sequence[int]) -> tuple[object, ...]:
        """The argument `near` of the extension's step_run, for layers of these numbers."""
        ...

    def usual(self, failure: int, at: int, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Pending:
        """`begin` of the layer at that place, after rings were of no use: the same call, another way."""
        ...

    def took(self, waited_L: Sequence[float], num_rows: int) -> None:
        """Learn how long rings took; 0: they were not asked."""
        ...


class Layer(NamedTuple):
    """A block's parts; none: they are not described."""

    block: Block
    before: NativeBefore | None
    after: NativeAfter | None
    local: NativeLocal | None

    @property
    def attention(self) -> Attention | None:
        return None if self.before is None else self.before.what.attention

    @property
    def router(self) -> Router | None:
        return None if self.before is None else self.before.what.router

    @property
    def parts(self) -> Sequence[Part]:
        return [part for part in (self.before, self.after, self.local) if part is not None]

    def is_for(self, h_TD: Tensor, rotated: int) -> bool:
        """Say whether the extension computes all of it."""
        if self.before is None or self.after is None:
            return False
        return self.before.is_for(h_TD, rotated) and all(part.is_for(h_TD) for part in self.parts[1:])

    def described(self, is_whole: bool) -> bytes:
        """A StepLayer of native/step/plan.h. `is_whole`: it is Python's."""
        if is_whole:
            return NO_LAYER + NO_LOCAL + struct.pack("<2q", self.block.layer, True)
        assert self.before is not None, "it is not described"
        assert self.after is not None, "it is not described"
        local = (NO_LOCAL,) if self.local is None else self.local.description
        return b"".join(
            (*self.before.description, *self.after.description, *local, struct.pack("<2q", self.block.layer, False))
        )


class NativeModel:
    """Layers, final norm and head of one model, as the extension takes them. It has descriptions, the model has the weights."""

    def __init__(self, model: "CausalLM"):
        self._decoder = model.model
        self.layers = [Layer(block, *block.described) for block in model.blocks()]
        self.head = NativeHead(model.model.norm, model.lm_head)
        parts = [*(part for layer in self.layers for part in layer.parts), self.head]
        self._tensors = [each for part in parts for each in part.tensors]
        self._linears = [linear for part in parts for linear in part.linears]
        self._hooks = [hooks for each in model.modules() for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._at: object = None
        self._is_usable = False
        attentions = [layer.attention for layer in self.layers]
        self.heads_L = [each.q_proj.out_features // each.head_dim if each else 0 for each in attentions]
        self._heads = max_of(attentions, "q_proj"), max_of(attentions, "k_proj")
        routers = [layer.router for layer in self.layers if layer.router is not None]
        self.sizes = {(router.gate.out_features, router.top_k) for router in routers}
        self.slots: dict[int, int] = {}  # of layers that the extension routes: which of them
        self.names = [layer.block.layer for layer in self.layers]
        self._is_even = len(self.layers) == len(model.model.layers) and len(self.sizes) < 2

    def __call__(
        self, h_TD: Tensor, table: Table, attend: Attend, experts: ExpertLayer, wants_logits: bool
    ) -> "Output | None":
        """The pass of embedded rows, which it may write to; None: the modules have to."""
        if not self._is_for(h_TD, table[0].shape[-1]):
            return None
        memories = attend.memories(self.heads_L, h_TD.dtype) if hasattr(attend, "memories") else None
        if self._kind in native_step.tried:
            if not native_step.tried[self._kind]:
                return None
            return _Pass(self, h_TD, table, attend, experts, memories).run(wants_logits)
        return None if memories is None else self._compared(h_TD, table, attend, experts, memories)

    def _is_for(self, h_TD: Tensor, rotated: int) -> bool:
        if not self._is_even or not native_step.is_possible(h_TD) or any(self._hooks):
            return False
        if self._decoder.passing.adapters is not None or any(each.adapter is not None for each in self._linears):
            return False
        at = h_TD.dtype, rotated, *native_step.places_of(self._tensors)
        if at != self._at:
            self._at, self._is_usable = at, self._prepared(h_TD, rotated)
        return self._is_usable

    def _prepared(self, h_TD: Tensor, rotated: int) -> bool:
        is_native = [layer.is_for(h_TD, rotated) for layer in self.layers]
        if not any(is_native) or not self.head.is_for(h_TD):
            return False
        routed = [i for i, layer in enumerate(self.layers) if is_native[i] and layer.router is not None]
        self.slots = {layer: slot for slot, layer in enumerate(routed)}
        self.widths = self._widths(h_TD)
        self.described_L = b"".join(layer.described(not own) for layer, own in zip(self.layers, is_native, strict=True))
        parts = [part for layer, own in zip(self.layers, is_native, strict=True) if own for part in layer.parts]
        self._kind = (type(self._decoder), *is_native, *(part.kind for part in parts), self.head.kind)
        return True

    def _widths(self, h_TD: Tensor) -> dict[str, int]:
        """Bytes of a row in each part of a pass's memory, made whole lines of the processor's cache."""
        (dim, size), (q, kv), num = (h_TD.shape[1], h_TD.element_size()), self._heads, len(self.slots)
        experts, top_k = next(iter(self.sizes), (0, 0))
        rows = {"residual": dim, "x": dim, "q": q, "k": kv, "v": kv, "gate": q, "mixed": q, "local": dim, "y": dim}
        decisions = {"logits": 4 * experts, "scores": 4 * experts, "ids": 8 * top_k, "weights": 4 * top_k}
        found = {name: size * width for name, width in rows.items()}
        found |= {name: num * width for name, width in decisions.items()}
        return {name: -(-width // LINE) * LINE for name, width in found.items()}

    def _compared(
        self, h_TD: Tensor, table: Table, attend: Attend, experts: ExpertLayer, memories: Memories
    ) -> "Output":
        """The modules' result: a pass of single tokens may be made twice. Numbers that are not finite say nothing."""
        ours = _Pass(self, h_TD.clone(), table, attend, experts, memories).run(False)
        theirs = self._decoder.through(h_TD, table, attend, experts)
        if theirs.hidden_TD.isfinite().all():
            is_equal = _is_equal(ours, theirs)
            native_step.tried[self._kind] = is_equal
            if not is_equal:
                log.warning("%s runs layer by layer: the extension's bits differ", type(self._decoder).__name__)
        return theirs


def max_of(attentions: Sequence[Attention | None], name: str) -> int:
    """Outputs of the widest matrix of that name."""
    return max((getattr(each, name).out_features for each in attentions if each is not None), default=0)


def _is_equal(ours: "Output", theirs: "Output") -> bool:
    pairs = [(ours.hidden_TD, theirs.hidden_TD)]
    for own, other in zip(ours.routing, theirs.routing, strict=True):
        pairs += zip(own, other, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class _Pass:
    """One pass: its memory, and what Python does of it."""

    def __init__(
        self, model: NativeModel, h_TD: Tensor, table: Table, attend: Attend, experts: ExpertLayer,
        memories: Memories | None,
    ):  # fmt: skip
        self._model, self._h_TD, self._table, self._attend, self._experts = model, h_TD, table, attend, experts
        self._memories = memories or Memories(0, b"", None, (0, 0))
        num, widths = len(h_TD), model.widths.values()
        self._memory = torch.empty(num * sum(widths), dtype=torch.uint8)  # parts in the order of `widths`
        begins = itertools.accumulate((num * width for width in widths), initial=0)
        self._begins = dict(zip(model.widths, begins, strict=False))
        self._pending: Pending | None = None
        self._own: dict[int, Routing | None] = {}  # of layers that Python computes
        self._waited_L: Tensor | None = None
        self._near: NearPass | None = None
        self._failure = 0  # of rings, at the place that Python has to see to
        self._here: Mapping[int, bytes] = {}

    def run(self, wants_logits: bool) -> "Output":
        from trinity.models.common.decoder import Output

        h_TD, head = self._h_TD, self._model.head.head
        hidden_TD = torch.empty_like(h_TD)
        logits_TV = h_TD.new_empty(len(h_TD), head.out_features) if wants_logits else None
        lent = getattr(self._experts, "here", nothing_here)(h_TD.dtype)
        with lent as self._here:
            near = self._find_near()
            base, place = self._memory.data_ptr(), native_step._place
            parts = [base + begin for begin in self._begins.values()]
            run = struct.pack(
                RUN, len(h_TD), torch.get_num_threads(), *map(place, (*self._table, h_TD)), *parts[:NUM_ROWS],
                place(hidden_TD), place(logits_TV), *parts[NUM_ROWS:], *self._memories.tokens, place(self._waited_L),
            )  # fmt: skip
            self._go(run, near)
        if self._near is not None and self._waited_L is not None:
            self._near.took(self._waited_L.tolist(), len(h_TD))
        return Output(hidden_TD, _Routings(self), logits_TV)

    def _find_near(self) -> tuple[object, ...] | None:
        model = self._model
        if len(self._here) < len(model.slots):
            find = getattr(self._experts, "near", nobody_near)
            self._near = find([layer.block.layer for layer in model.layers if layer.router is not None], self._h_TD)
        if self._near is None:
            return None
        self._waited_L = torch.zeros(len(model.layers), dtype=torch.float64)
        return self._near.described(model.names)

    def _go(self, run: bytes, near: tuple[object, ...] | None) -> None:
        model, memories = self._model, self._memories
        here_L = b"".join([self._here.get(name, ELSEWHERE) for name in model.names])
        given = (
            len(model.layers), model.described_L, model.head.description[0], here_L, memories.num, memories.attends,
            memories.memory_L, run, near,
        )  # fmt: skip
        at, done = 0, len(model.layers) * PLACES
        while True:
            self._failure, at = divmod(native.lib.step_run(*given, at), 1 << 32)
            if at == done:
                return
            layer, place = divmod(at, PLACES)
            at = layer * PLACES + HELP[place](self, layer)

    def routings(self) -> Iterator[Routing]:
        """Decisions of all layers that make one, in order."""
        for layer in range(len(self._model.layers)):
            is_own = layer in self._model.slots
            routing = Routing(*self._decision(layer)) if is_own else self._own.get(layer)
            if routing is not None:
                yield routing

    # -- what Python does at a place; -> the place to go on at

    def _enter(self, layer: int) -> int:
        block = self._model.layers[layer].block
        h_TD, self._own[layer] = block(self._h_TD, self._table, self._attend, self._experts)
        self._h_TD.copy_(h_TD)
        return PLACES

    def _attended(self, layer: int) -> int:
        attention = self._model.layers[layer].attention
        assert attention is not None, "such a layer is the modules'"
        q, k, v = (
            self._of(name, part.out_features).unflatten(1, (-1, attention.head_dim))
            for name, part in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj))
        )
        self._of("mixed", attention.q_proj.out_features).copy_(self._attend(attention.layer, q, k, v).flatten(1))
        return ROUTE

    def _chosen(self, layer: int) -> int:
        logits_TE, *others = self._decision(layer)
        router = self._model.layers[layer].router
        assert router is not None, "such a layer chooses no experts"
        for mine, found in zip(others, router.routed(logits_TE)[1:], strict=True):
            mine.copy_(found)
        return EXPERTS

    def _sent(self, layer: int) -> int:
        block, x_TD, decision = self._model.layers[layer].block, self._of("x", None), self._decision(layer)
        if self._failure and self._near is not None:
            self._pending = self._near.usual(self._failure, layer, block.layer, x_TD, *decision[2:])
        else:
            self._pending = self._experts.begin(block.layer, x_TD, *decision[2:])
        if block.layer not in self._here:
            return LOCAL
        if block.local is not None:  # the extension has left an error to those who can name it
            self._of("local", None).copy_(block.local(x_TD))
        return self._joined(layer)

    def _joined(self, layer: int) -> int:
        if self._failure and self._near is not None:
            number, decision = self._model.layers[layer].block.layer, self._decision(layer)
            self._pending = self._near.usual(self._failure, layer, number, self._of("x", None), *decision[2:])
        assert self._pending is not None, "rows come back that were not sent"
        self._of("y", None).copy_(self._pending.result())
        self._pending = None
        return LEAVE

    def _decision(self, layer: int) -> list[Tensor]:
        """logits_TE, scores_TE, ids_TK and weights_TK."""
        slot, (experts, top_k), real = self._model.slots[layer], next(iter(self._model.sizes)), torch.float32
        fields = (
            ("logits", experts, real),
            ("scores", experts, real),
            ("ids", top_k, torch.int64),
            ("weights", top_k, real),
        )
        return [self._of(name, width, dtype, slot) for name, width, dtype in fields]

    def _of(self, name: str, width: int | None, dtype: torch.dtype | None = None, slot: int = 0) -> Tensor:
        """Rows [T, width] of the pass's memory, behind so many such; None: as wide as h, in its type."""
        num, width, dtype = len(self._h_TD), width or self._h_TD.shape[1], dtype or self._h_TD.dtype
        num_bytes = num * width * dtype.itemsize
        begin = self._begins[name] + slot * num_bytes
        return self._memory[begin : begin + num_bytes].view(dtype).view(num, width)


class _Routings(Sequence[Routing]):
    """Decisions of a pass's layers, looked up when somebody asks for them."""

    def __init__(self, made: _Pass):
        self._pass, self._found = made, list[Routing]()

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, at: Any) -> Any:
        return self._all()[at]

    def _all(self) -> list[Routing]:
        self._found = self._found or [*self._pass.routings()]
        return self._found


HELP: dict[int, Callable[[_Pass, int], int]] = {
    ENTER: _Pass._enter,
    ATTEND: _Pass._attended,
    CHOOSE: _Pass._chosen,
    EXPERTS: _Pass._sent,
    JOIN: _Pass._joined,
}


def nobody_near(layers: Sequence[int], x_TD: Tensor) -> NearPass | None:
    """Answer for an ExpertLayer that does not know of rings."""
    return None


def nothing_here(dtype: torch.dtype) -> AbstractContextManager[Mapping[int, bytes]]:
    """Answer for an ExpertLayer that does not say which experts are in this process."""
    return nullcontext({})
