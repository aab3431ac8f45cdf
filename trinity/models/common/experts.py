"""The seam between a backbone and its routed experts, which are never parameters of it.

Legend: T tokens, D model, K top-k.
"""

from typing import Protocol

from torch import Tensor


class Pending(Protocol):
    """Rows on their way to their experts and back."""

    def result(self) -> Tensor:
        """Wait; -> y_TD."""
        ...


class ExpertLayer(Protocol):
    """Computes routed experts of any layer, from local tensors or on shards. Differentiable in x and weights.

    `priority` is that of the calls to come, where others wait for the same experts: the lowest number first."""

    priority: int

    def begin(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Pending:
        """Start on y_TD = sum over k of weights_TK[:, k] * SwiGLU_{ids_TK[:, k]}(x_TD), in x's dtype.

        ids int64, the checkpoint's expert indices; weights float32, applied to the experts' outputs.
        """
        ...
