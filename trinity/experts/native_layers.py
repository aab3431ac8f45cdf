"""Layers of a shard as threads of native/ring find them: published beside what Python computes with, for the same readers.

Decisions: what C++ cannot compute is not there, and its callers ask Python. `publish` returns when nobody computes any more
with what has gone, as `PublishedVersions.withdraw` does.
"""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trinity import native
from trinity.config import ModelConfig
from trinity.experts.layer import ReadyLayer

FORMATS = {torch.float32: 0, torch.bfloat16: 1}  # native/ring/layout.h:RowFormat
Layers = Mapping[int, Mapping[int, ReadyLayer]]  # by version and layer


class NativeLayers:
    """Owner of one service of native/ring. For any threads."""

    def __init__(self, model: ModelConfig):
        self.service: Any = native.lib.ring_service()
        self._model, self._guard = model, threading.Lock()
        self._known = dict[tuple[int, int], tuple[ReadyLayer, Any]]()  # what is published, and as what

    def publish(self, layers: Layers) -> None:
        """Let these be computed, and no others; wait for those who compute others."""
        with self._guard:
            known = {key: self._as_native(key, layer) for key, layer in _possible(layers)}
            native.lib.ring_publish(self.service, [made for _, made in known.values()])
            self._known = known  # what was known before stays alive until here

    def take_counts(self) -> list[tuple[int, int, int]]:
        """-> (layer, expert, rows) that were computed since the last time."""
        found: list[tuple[int, int, int]] = native.lib.ring_take_counts(self.service)
        return found

    def _as_native(self, key: tuple[int, int], layer: ReadyLayer) -> tuple[ReadyLayer, Any]:
        known = self._known.get(key)
        if known is not None and known[0] is layer:
            return known
        assert layer.weights is not None, "such a layer is not possible"
        stacks = layer.weights.gate_EFD, layer.weights.up_EFD, layer.weights.down_EFD
        (version, number), (num, hidden, dim) = key, stacks[0].shape
        ids, sizes, dtype = layer.ids_E.data_ptr(), (num, self._model.num_experts), stacks[0].dtype
        made = native.lib.ring_layer(
            number,
            version,
            FORMATS[dtype],
            dim,
            hidden,
            native.lib.ring_kernel(FORMATS[dtype]),
            ids,
            *sizes,
            *(stack.data_ptr() for stack in stacks),
        )
        return layer, made


def _possible(layers: Layers) -> Iterator[tuple[tuple[int, int], ReadyLayer]]:
    for version, ready in layers.items():
        for number, layer in ready.items():
            if is_possible(layer):
                yield (version, number), layer


def is_possible(layer: ReadyLayer) -> bool:
    """Say whether C++ computes this layer with the bits that Python gives it: plain experts of one type, in a CPU's memory."""
    if layer.weights is None or layer.derived is not None:  # rows are for another form of the weights
        return False
    gate_EFD, up_EFD, down_EFD = layer.weights
    stored = gate_EFD, up_EFD, down_EFD.mT
    return layer.adapters is None and all(
        each.is_cpu and each.dtype == gate_EFD.dtype in FORMATS and each.is_contiguous() and each.numel() > 0
        for each in stored
    )
