"""Formats of an expert layer's weights on a CPU, side by side: processor time of one thread, for inference.

Decisions: formats take turns on the same rows, each on several layers in turn, more bytes than a cache holds; the least time
of a format counts, which neighbours on the machine spoil least. A format is compared with float32 at the same rows; what it
loses in precision is its output's distance from float32's, relative to its size, with random weights.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trinity.bench.expert_backends import Shape
from trinity.bench.report import Table
from trinity.ops import extension, quantised
from trinity.ops.batch_invariant.fused_mlp import feed_forward, units_of
from trinity.ops.extension import Matrices
from trinity.ops.stored import FORMATS, matrices
from trinity.utils.hugepages import on_huge_pages

COLD_BYTES, MOST_LAYERS = 64 << 20, 16  # of a format's weights
COLUMNS = ("rows / expert", "format", "ms", "x float32", "GB/s", "GFLOP/s", "distance")
PACKED = ("fp8", "nvfp4")
Run = Callable[[int], Tensor]  # of a layer's number
Stack = tuple[Tensor, ...]


def formats(shape: Shape, rows: Sequence[int], rounds: int) -> Table:
    """Time every format that there is with each of `rows` rows per expert."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            stacks = _stacks(shape)
            cells = [cell for num in rows for cell in _cells(shape, stacks, num, rounds)]
    finally:
        torch.set_num_threads(num_threads)
    return Table(f"{shape}: formats of weights, one thread's processor time", COLUMNS, tuple(cells))


def _stacks(shape: Shape) -> dict[str, Stack]:
    shapes = (shape.ffn, shape.dim), (shape.ffn, shape.dim), (shape.dim, shape.ffn)
    plain = tuple(_huge(torch.randn(shape.experts, *each) / each[1] ** 0.5) for each in shapes)
    made: dict[str, Stack] = {"float32": plain}
    if extension.lib is not None:
        made["bfloat16"] = tuple(_huge(w.bfloat16()) for w in plain)
    for name in ("int8", *(PACKED if extension.lib is not None else ())):
        made[name] = tuple(part for w_ENK in plain for part in _parts(name, w_ENK))
    return made


def _parts(name: str, w_ENK: Tensor) -> Stack:
    """Parts of a format, each of all experts, the data last."""
    *scales, values = (torch.stack(parts) for parts in zip(*map(FORMATS[name].made, w_ENK), strict=True))
    return *scales, _huge(values)


def _huge(tensor: Tensor) -> Tensor:
    return on_huge_pages(torch.empty_like(tensor)).copy_(tensor)


def _cells(shape: Shape, stacks: dict[str, Stack], num: int, rounds: int) -> Iterator[tuple[Any, ...]]:
    x_AD = torch.randn(shape.experts * num, shape.dim)
    end_E = (torch.arange(shape.experts) + 1) * num
    runs = {name: _run(name, _layers(stack), x_AD, end_E) for name, stack in stacks.items()}
    outputs = {name: run(0) for name, run in runs.items()}  # the first time does not count
    best_s: dict[str, float] = {}
    for turn, (name, run) in itertools.product(range(rounds), runs.items()):
        begun = time.thread_time()
        run(turn)
        best_s[name] = min(best_s.get(name, torch.inf), time.thread_time() - begun)
    for name, time_s in best_s.items():
        read = sum(part.nbytes for part in stacks[name])
        lost = float((outputs[name] - outputs["float32"]).norm() / outputs["float32"].norm())
        rates = read / time_s / 1e9, shape.flops(num) / time_s / 1e9
        yield num, name, 1e3 * time_s, best_s["float32"] / time_s, *rates, f"{lost:.1e}"


def _layers(stack: Stack) -> list[Stack]:
    """The layer and its copies."""
    copies = min(MOST_LAYERS, -(-COLD_BYTES // sum(part.nbytes for part in stack)))
    return [stack, *(tuple(map(_huge, stack)) for _ in range(copies - 1))]


def _of_parts(stacks: list[Matrices], x_AD: Tensor, end_E: Tensor) -> Tensor:
    if stacks[0].kind == extension.INT8:
        gate, up, down = (quantised.Int8(*(part for part in each if part is not None)) for each in stacks)
        return quantised.feed_forward(x_AD, gate, up, down, end_E)
    y_AN, rows = torch.empty(x_AD.shape), extension.rounded(stacks[0].kind, x_AD)
    extension.feed_forward(stacks[0].kind, rows, stacks, None, units_of(end_E, len(x_AD)), y_AN)
    return y_AN


def _run(name: str, layers: Sequence[Stack], x_AD: Tensor, end_E: Tensor) -> Run:
    def run(turn: int) -> Tensor:
        stack = layers[turn % len(layers)]
        if len(stack) > 3:
            num = len(stack) // 3
            return _of_parts([matrices(stack[at : at + num]) for at in range(0, len(stack), num)], x_AD, end_E)
        gate_EFD, up_EFD, down_ENF = stack
        return feed_forward(x_AD.to(gate_EFD.dtype), gate_EFD, up_EFD, down_ENF, end_E).float()

    return run
