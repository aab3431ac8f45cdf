"""Counts of rows that each expert of a shard has computed: what the placement is planned from.

Legend: E experts of a layer on this shard, X experts of the model.
"""

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from trinity.rpc.messages import Experts


class RowCounts:
    """Rows by layer and expert, since they were reset. For any threads. `others` gives those that were counted elsewhere.

    `running` are counts by expert that whoever computes may add to, without asking: nobody sets them back.
    """

    others: Callable[[], Iterable[tuple[int, int, int]]] = tuple

    def __init__(self, layers: Iterable[int], num_experts: int):
        self._guard = threading.Lock()
        self._rows = {layer: torch.zeros(num_experts, dtype=torch.int64) for layer in layers}  # rows_X
        self.running = {layer: torch.zeros_like(rows_X) for layer, rows_X in self._rows.items()}
        self._seen = {layer: torch.zeros_like(rows_X) for layer, rows_X in self._rows.items()}  # of those, so far

    def add(self, layer: int, ids_E: Tensor, rows_E: Tensor) -> None:
        with self._guard:
            self._rows[layer][ids_E] += rows_E

    def forget(self, layer: int, experts: Sequence[int]) -> None:
        """Start anew for experts that leave: they may come back."""
        with self._guard:
            self._take_others()
            self._rows[layer][list(experts)] = 0

    def read(self, experts: Experts, reset: bool) -> dict[int, dict[int, int]]:
        """layer -> expert -> rows. With `reset` all start at 0 again, and no row is lost between."""
        with self._guard:
            self._take_others()
            found = {layer: {e: int(self._rows[layer][e]) for e in held} for layer, held in experts.items()}
            for rows_X in self._rows.values() if reset else ():
                rows_X.zero_()
        return found

    def _take_others(self) -> None:
        for layer, expert, rows in self.others():
            self._rows[layer][expert] += rows
        for layer, running_X in self.running.items():
            now_X = running_X.clone()
            self._rows[layer] += now_X - self._seen[layer]
            self._seen[layer] = now_X
