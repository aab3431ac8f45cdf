"""Adapters that a shard computes with beside its weights, for rows that ask for one.

Legend: E experts of a layer on this shard, F expert hidden, D model, r rank; R rows.
Decisions: an adapter is known by what is in its files (`content`), so that nobody gets another one's numbers, nor the base's
alone: who asks for one that is not here is told so. Its factors lie in stacks like those of weights, in the weights' type, for
the experts that a layer holds, whatever version of the weights they are beside; where experts came, the stacks are read anew
from the files, which have to stay where they are.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trinity.adapters import peft
from trinity.checkpoint import PROJECTIONS, AdapterFolder, examined, expert_key, located
from trinity.config import MOST_ADAPTERS
from trinity.errors import AdapterMissing
from trinity.experts.base import LayerAdapters, Pair
from trinity.experts.spec import ShardSpec
from trinity.rpc.messages import Adapt, Experts, Forget, TakenAdapter

KEPT = 3  # stacks of a layer: versions of the weights may hold other experts


class NamedAdapters:
    """At most MOST_ADAPTERS, of which the one that was used least recently goes first. For any threads."""

    def __init__(self, spec: ShardSpec):
        self._spec = spec
        self._found: OrderedDict[int, _Stacks] = OrderedDict()
        self._guard = threading.Lock()

    def adapt(self, message: Adapt, experts: Experts) -> TakenAdapter:
        """Take one up, for these experts at first. Raises CheckpointError, and then has changed nothing."""
        source = located(message.source)
        if message.content in self._found:
            return TakenAdapter(message.content, source)
        if message.content:
            folder = AdapterFolder(source, self._spec.model)
            folder.adapter.check_content(message.content)
        else:
            folder = examined(source, self._spec.model, message.base)
        stacks = _Stacks(folder, self._spec)
        for layer, held in experts.items():
            stacks.of(layer, held)
        with self._guard:
            self._found[folder.adapter.content] = stacks
            while len(self._found) > MOST_ADAPTERS:
                self._found.popitem(last=False)
        return TakenAdapter(folder.adapter.content, source)

    def forget(self, message: Forget) -> bool:
        with self._guard:
            return self._found.pop(message.content, None) is not None

    def of(self, contents: Iterable[int], layer: int, held: tuple[int, ...]) -> list[LayerAdapters | None]:
        """Factors of each for a layer with these experts; None where it has none there, as for 0. Raises AdapterMissing."""
        return [self._stacks(content).of(layer, held) if content else None for content in contents]

    def _stacks(self, content: int) -> "_Stacks":
        with self._guard:
            if content not in self._found:
                raise AdapterMissing(f"shard {self._spec.name} does not have adapter {content:x}")
            self._found.move_to_end(content)
            return self._found[content]


class _Stacks:
    """The factors of one adapter, by layer and experts."""

    def __init__(self, folder: AdapterFolder, spec: ShardSpec):
        self._folder, self._spec = folder, spec
        self._made: dict[int, OrderedDict[tuple[int, ...], LayerAdapters | None]] = {}
        self._guard = threading.Lock()

    @torch.no_grad()
    def of(self, layer: int, held: tuple[int, ...]) -> LayerAdapters | None:
        with self._guard:
            made = self._made.setdefault(layer, OrderedDict())
            if held not in made:
                made[held] = self._read(layer, held)
                while len(made) > KEPT:
                    made.popitem(last=False)
            return made[held]

    def _read(self, layer: int, held: Sequence[int]) -> LayerAdapters | None:
        adapter, model = self._folder.adapter, self._spec.model
        names = [[expert_key(model, layer, e, p).removesuffix(".weight") for e in held] for p in PROJECTIONS]
        if not adapter.modules.intersection(name for each in names for name in each):
            return None
        f, d = model.moe_intermediate_size, model.hidden_size
        gate, up, down = (self._pair(own, *size) for own, size in zip(names, ((f, d), (f, d), (d, f)), strict=True))
        return LayerAdapters(gate, up, down, adapter.config.scale)

    def _pair(self, names: Sequence[str], num_out: int, num_in: int) -> Pair:
        """A [E, r, in] and B [E, out, r] of one projection; zeros for experts without."""
        adapter, rank = self._folder.adapter, self._folder.adapter.config.rank
        stacks = [self._zeros(len(names), *size) for size in ((rank, num_in), (num_out, rank))]
        for at, name in enumerate(names):
            for part, stack in zip(peft.PARTS, stacks, strict=True):
                if name in adapter.modules:
                    stack[at].copy_(adapter.tensor(peft.key_of(name, part)))
        return stacks[0], stacks[1]

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=self._spec.dtype, device=self._spec.device)


def both(trained: LayerAdapters | None, named: LayerAdapters | None) -> LayerAdapters | None:
    """The adapters that a run trains, with a named one on top."""
    if trained is None or named is None:
        return named if trained is None else trained
    gate, up, down = (
        _side_by_side(*pairs, trained.scale, named.scale) for pairs in zip(trained[:3], named[:3], strict=True)
    )
    return LayerAdapters(gate, up, down, 1.0)


def _side_by_side(one: Pair, other: Pair, *scales: float) -> Pair:
    a_ErK = torch.cat([one[0], other[0].to(one[0])], dim=1)
    return a_ErK, torch.cat([scales[0] * one[1], scales[1] * other[1].to(one[1])], dim=2)
