"""Layers of a shard as threads of native/ring find them: published beside what Python computes with, for the same readers.

Decisions: what C++ cannot compute is not there, and its callers ask Python; the kernel is made ready in the background, and
until then nothing is there. `publish` returns when nobody computes any more with what has gone, as `PublishedVersions.withdraw`
does.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trinity import native
from trinity.config import ModelConfig
from trinity.experts.layer import ReadyLayer

Layers = Mapping[int, Mapping[int, ReadyLayer]]  # by version and layer


class NativeLayers:
    """Owner of one service of native/ring. For any threads. `kernel` gives the address of what computes the experts."""

    def __init__(self, model: ModelConfig, kernel: Callable[[], int]):
        self.service: Any = native.lib.ring_service()
        self._model, self._kernel = model, 0
        self._guard = threading.Lock()
        self._wanted: Layers = {}
        self._known = dict[tuple[int, int], tuple[ReadyLayer, Any]]()  # what is published, and as what
        self._make: Callable[[], int] | None = kernel
        self.is_ready = threading.Event()

    def start(self) -> None:
        """Make the kernel ready, if nobody has begun to: somebody is there who will ask."""
        with self._guard:
            make, self._make = self._make, None
        if make is not None:
            threading.Thread(target=self._make_ready, args=(make,), name="trinity-kernel", daemon=True).start()

    def publish(self, layers: Layers) -> None:
        """Let these be computed, and no others; wait for those who compute others."""
        with self._guard:
            self._wanted = layers
            self._publish()

    def take_counts(self) -> list[tuple[int, int, int]]:
        """-> (layer, expert, rows) that were computed since the last time."""
        found: list[tuple[int, int, int]] = native.lib.ring_take_counts(self.service)
        return found

    def _make_ready(self, kernel: Callable[[], int]) -> None:
        address = kernel()
        with self._guard:
            self._kernel = address
            self._publish()
        self.is_ready.set()

    def _publish(self) -> None:
        if self._kernel:
            known = {key: self._as_native(key, layer) for key, layer in self._possible()}
            native.lib.ring_publish(self.service, [made for _, made in known.values()])
            self._known = known  # what was known before stays alive until here

    def _possible(self) -> Iterator[tuple[tuple[int, int], ReadyLayer]]:
        for version, layers in self._wanted.items():
            for number, layer in layers.items():
                if is_possible(layer):
                    yield (version, number), layer

    def _as_native(self, key: tuple[int, int], layer: ReadyLayer) -> tuple[ReadyLayer, Any]:
        known = self._known.get(key)
        if known is not None and known[0] is layer:
            return known
        assert layer.weights is not None, "such a layer is not possible"
        stacks = layer.weights.gate_EFD, layer.weights.up_EFD, layer.weights.down_EFD
        (version, number), (num, hidden, dim) = key, stacks[0].shape
        ids, sizes = layer.ids_E.data_ptr(), (num, self._model.num_experts)
        made = native.lib.ring_layer(
            number, version, dim, hidden, self._kernel, ids, *sizes, *(stack.data_ptr() for stack in stacks)
        )
        return layer, made


def is_possible(layer: ReadyLayer) -> bool:
    """Say whether C++ computes this layer with the bits that Python gives it: plain experts in fp32, in a CPU's memory."""
    if layer.weights is None or layer.derived is not None:  # rows are for another form of the weights
        return False
    gate_EFD, up_EFD, down_EFD = layer.weights
    stored = gate_EFD, up_EFD, down_EFD.mT
    return layer.adapters is None and all(
        each.is_cpu and each.dtype == torch.float32 and each.is_contiguous() and each.numel() > 0 for each in stored
    )
