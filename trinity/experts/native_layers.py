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
from trinity.experts.native_experts import matrices_of
from trinity.ops.extension import KINDS

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
        matrices = matrices_of(layer)
        assert matrices is not None, "such a layer is not possible"
        (version, number), (hidden, dim) = key, matrices[0].sides
        kernel = native.lib.ring_kernel(matrices[0].kind)
        ids, sizes = layer.ids_E.data_ptr(), (len(layer.experts), self._model.num_experts)
        stacks = [0 if part is None else part.data_ptr() for parts in zip(*matrices, strict=True) for part in parts]
        rows = KINDS[getattr(torch, self._model.dtype)]
        return layer, native.lib.ring_layer(number, version, rows, dim, hidden, kernel, ids, *sizes, *stacks)


def _possible(layers: Layers) -> Iterator[tuple[tuple[int, int], ReadyLayer]]:
    for version, ready in layers.items():
        for number, layer in ready.items():
            if matrices_of(layer) is not None:
                yield (version, number), layer
