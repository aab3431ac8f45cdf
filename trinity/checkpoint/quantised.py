"""Quantised matrices of a checkpoint: of which tensors each is made, whether they fit together, and its numbers.

Legend: N outputs and K inputs of a matrix, R rows of a band, B bytes of a row, S scales of a row.

    layout, as compressed-tensors, DeepSeek and ModelOpt write it      number
    weight F8_E4M3, weight_scale or weight_scale_inv                   value * scale (multiplied under both names)
    weight I8, weight_scale, maybe weight_zero_point                   (value - zero) * scale
    weight_packed I32 (4 or 8 bits), weight_scale, weight_shape        (value - zero) * scale
    weight_packed U8 (E2M1), weight_scale, weight_global_scale         value * (scale / global)
    weight U8 (E2M1), weight_scale, weight_scale_2                     value * (scale * scale_2)

Decisions: the headers say what a matrix is; the settings say what these cannot (quantisation.py), and where both speak they
must agree. Only weights count: what is said of activations and of KV caches is not used. A matrix is read and multiplied in
bands of rows, so that there never is a copy of it in fp32; each scale is looked at when it is used, before any row is computed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from trinity.checkpoint.quantisation import Quantisation
from trinity.checkpoint.tensor_file import TYPES, Entry, Part, TensorFile
from trinity.config import FP4_GROUP
from trinity.errors import CheckpointError
from trinity.ops import formats
from trinity.ops.extension import Matrices
from trinity.ops.stored import BLOCK

BAND_BYTES = 1 << 20  # of a band in fp32
TOO_LARGE = 2.0**118  # times any number of these formats it still is one in fp32
OF_A_WEIGHT = "weight"  # the first word of the last part of the keys of all that a matrix is made of
SCALES = {**TYPES, "F8_E8M0": torch.float8_e8m0fnu}  # of scales; those of groups of 16 are F8_E4M3
FP8 = {"F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Layout:
    """A way to store a matrix. `table`: the numbers in a byte of `data`; `overall`: a scale of all its scales."""

    data: str
    dtype: str
    scale: str
    table: Tensor
    kind: tuple[str, int]  # type and bits, in the words of quantization_config
    scale_types: Mapping[str, torch.dtype] = field(default_factory=lambda: SCALES)
    overall: str = ""
    needs: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what it must have, its data first."""
        return (self.data, self.scale, *filter(None, [self.overall]), *self.needs)


LAYOUTS = (
    Layout("weight", "F8_E4M3", "weight_scale", formats.FP8, ("float", 8)),
    Layout("weight", "F8_E4M3", "weight_scale_inv", formats.FP8, ("float", 8)),
    Layout("weight", "I8", "weight_scale", formats.INT8, ("int", 8), may_have=("weight_zero_point",)),
    *(
        Layout("weight_packed", "I32", "weight_scale", table, ("int", bits), needs=("weight_shape",),
               may_have=("weight_zero_point",))
        for table, bits in ((formats.OFFSET4, 4), (formats.OFFSET8, 8))
    ),
    Layout("weight_packed", "U8", "weight_scale", formats.FP4, ("float", 4), FP8, "weight_global_scale"),
    Layout("weight", "U8", "weight_scale", formats.FP4, ("float", 4), FP8, "weight_scale_2"),
)  # fmt: skip
OURS = {("I8", ""): "int8", ("F8_E4M3", ""): "fp8", ("U8", "weight_global_scale"): "nvfp4"}  # by theirs
QUANTISED = {layout.dtype for layout in LAYOUTS}


class QuantisedMatrices:
    """Those of a checkpoint, by their keys. `opened`: gives the file of a name."""

    def __init__(
        self, path: Path, said: Quantisation, weight_map: Mapping[str, str], opened: Callable[[str], TensorFile]
    ):
        self._path, self._said, self._map, self._opened = path, said, weight_map, opened
        self._parts = defaultdict[str, set[str]](set)  # of a module: last words of its keys
        for key in weight_map:
            module, _, part = key.rpartition(".")
            if part.startswith(OF_A_WEIGHT):
                self._parts[module].add(part)
        for module, parts in self._parts.items():
            if not parts & {"weight", "weight_packed"}:
                raise CheckpointError(f"{path}: {module}.{min(parts)} is there, and no weight that it belongs to")
        said.check_ignored(weight_map)
        self._unlike = said.unlike_others(self._parts)

    def keys(self, key: str) -> Iterable[str]:
        """Keys of the tensors that a matrix is made of; the key itself where it is stored plainly."""
        module = key.removesuffix(".weight")
        return [f"{module}.{part}" for part in self._parts[module]] if module in self._parts else [key]

    def find(self, key: str, shape: tuple[int, ...] | None) -> "QuantisedMatrix | None":
        """The matrix of a key that ends with `.weight`; None where that is stored plainly."""
        module = key.removesuffix(".weight")
        parts = self._parts.get(module, set())
        if module == key or parts <= {"weight"}:
            if module in self._unlike and self._entry(key).dtype not in QUANTISED:
                self._said.refuse_half(module)
            return None
        entries = {part: self._entry(f"{module}.{part}") for part in sorted(parts)}
        bits, where = self._said.bits(module), f"{self._path}: {module}"
        layout = _layout_of(entries, bits, where)
        if surplus := sorted(parts - {*layout.names, *layout.may_have}):
            raise CheckpointError(f"{where}.{surplus[0]} is there, which weights of {layout.dtype} do not have")
        files = {part: self._opened(self._map[f"{module}.{part}"]) for part in parts}
        return QuantisedMatrix(where, module, layout, entries, files, shape, self._said)

    def _entry(self, key: str) -> Entry:
        return self._opened(self._map[key]).entry(key)


def _layout_of(entries: Mapping[str, Entry], bits: int | None, where: str) -> Layout:
    data = "weight" if "weight" in entries else "weight_packed"
    dtype = entries[data].dtype
    fitting = [each for each in LAYOUTS if (each.data, each.dtype) == (data, dtype) and bits in (None, each.kind[1])]
    if not fitting:
        extra = min(part for part in entries if part != data)
        said = "" if bits is None else f", quantization_config says {bits} bits"
        raise CheckpointError(f"{where}.{data} has type {dtype}{said}; what is {extra} beside it?")
    whole = [layout for layout in fitting if set(layout.names) <= entries.keys()]
    if not whole:
        missing = next(name for name in fitting[0].names if name not in entries)
        raise CheckpointError(f"{where}.{missing} is missing, which weights of {dtype} have")
    return whole[0]


class QuantisedMatrix:
    """A matrix whose tensors are there and fit together. Raises CheckpointError where they do not."""

    dtype = torch.float32  # of its numbers, before they are rounded to what somebody wants

    def __init__(
        self,
        where: str,
        module: str,
        layout: Layout,
        entries: Mapping[str, Entry],
        files: Mapping[str, TensorFile],
        shape: tuple[int, ...] | None,
        said: Quantisation,
    ):
        self._where, self._module, self._layout, self._entries, self._files = where, module, layout, entries, files
        self.shape = self._checked_shape(shape)
        said.check(module, layout.kind)
        self._rows, self._columns = said.block(module, self.shape) or self._guessed_block()
        self._check_grid(layout.scale, layout.scale_types)
        if layout.overall:
            self._check_shape(layout.overall, ((), (1,)), TYPES)
        if "weight_zero_point" in entries:
            self._check_zero()
        elif not said.is_symmetric(module):
            raise CheckpointError(f"{where}.weight_zero_point is missing; quantization_config says symmetric: false")

    # -- what the headers say

    def _checked_shape(self, wanted: tuple[int, ...] | None) -> tuple[int, int]:
        entry, name = self._entries[self._layout.data], self._layout.data
        per_item = self._layout.table.shape[1] * (4 if entry.dtype == "I32" else 1)
        if len(entry.shape) != 2:
            raise CheckpointError(f"{self._where}.{name} has shape {[*entry.shape]}; one matrix to a tensor is read")
        num_out, num_items = entry.shape
        shape = (num_out, num_items * per_item) if wanted is None else wanted
        if len(shape) != 2 or (num_out, num_items) != (shape[0], ceil(shape[1] / per_item)):
            raise CheckpointError(
                f"{self._where}.{name} has shape {[*entry.shape]}, {per_item} numbers to an item; config.json wants {[*shape]}"
            )
        return shape[0], shape[1]

    def _guessed_block(self) -> tuple[int, int]:
        """Rows and columns that share a scale, where no settings say it: a row, all, groups of 16, or blocks of 128."""
        (n, k), found = self.shape, self._entries[self._layout.scale].shape
        if self._layout.overall:
            return 1, 16
        known = {(): (n, k), (1,): (n, k), (n,): (1, k), (n, 1): (1, k)}
        return known.get(found, (128, 128))

    def _check_grid(self, name: str, types: Iterable[str]) -> None:
        grid = self._grid
        flat: list[tuple[int, ...]] = [grid[:1]] if grid[1] == 1 else []
        self._check_shape(name, [grid, *flat, *([()] if grid == (1, 1) else [])], types)

    @property
    def _grid(self) -> tuple[int, int]:
        return ceil(self.shape[0] / self._rows), ceil(self.shape[1] / self._columns)

    def _check_shape(self, name: str, allowed: Sequence[tuple[int, ...]], types: Iterable[str]) -> None:
        entry = self._entries[name]
        if entry.shape not in allowed or entry.dtype not in types:
            raise CheckpointError(
                f"{self._where}.{name} is {entry.dtype} {[*entry.shape]}; a matrix of {[*self.shape]} with a scale for "
                f"{self._rows} x {self._columns} of its numbers has {[*allowed[0]]}, one of {', '.join(types)}"
            )

    def _check_zero(self) -> None:
        if self._layout.dtype == "I8":
            return self._check_grid("weight_zero_point", ["I8"])
        rows, columns = self._grid
        per_item = 4 * self._layout.table.shape[1]
        self._check_shape("weight_zero_point", ((ceil(rows / per_item), columns),), ["I32"])

    # -- its numbers

    @property
    def order(self) -> tuple[str, int]:
        """The place of its data: file and byte."""
        return self._files[self._layout.data].name, self._entries[self._layout.data].offset

    @torch.no_grad()
    def read_into(self, target_NK: Tensor) -> None:
        """Fill memory of any type and layout. Raises CheckpointError for scales that are no positive numbers."""
        self._check_stored_shape()
        num_out, num_in = self.shape
        scale_NS, zero_NS, overall = self._scales(), self._zeros(), self._overall()
        step = max(1, BAND_BYTES // (4 * num_in))
        for start in range(0, num_out, step):
            rows_R = torch.arange(start, min(num_out, start + step)) // self._rows
            values_RK = self._values(start, len(rows_R))
            if zero_NS is not None:
                values_RK -= formats.spread(zero_NS[rows_R], self._columns, num_in)
            scale_RS = self._scale_of(scale_NS[rows_R], overall)
            target_NK[start : start + len(rows_R)] = formats.scaled(values_RK, scale_RS, self._columns)

    @torch.no_grad()
    def kept_as(self, name: str) -> Matrices | None:
        """The matrix as it is stored, where that is the format of that name (trinity/ops/stored.py); None: it is to be made.
        Raises as `read_into` does."""
        block = {"int8": (1, self.shape[1]), "fp8": BLOCK, "nvfp4": (1, FP4_GROUP)}.get(name)
        if name != OURS.get((self._layout.dtype, self._layout.overall)) or (self._rows, self._columns) != block:
            return None
        if "weight_zero_point" in self._entries:
            return None
        values = torch.empty(self._entries[self._layout.data].shape, dtype=torch.uint8)
        self._data(values)
        stored = self._scales()
        scales = self._positive(stored.float(), self._layout.scale)
        if name == "fp8":
            return Matrices(values, scales)
        if name == "int8":
            from trinity.ops.quantised import with_totals  # a compiler comes with it

            return Matrices(*with_totals(values.view(torch.int8), scales.view(-1)))
        return Matrices(values, self._overall(), stored.view(torch.uint8))

    def _scale_of(self, stored_RS: Tensor, overall: Tensor | None) -> Tensor:
        scale_RS = self._positive(stored_RS.float(), self._layout.scale)
        if overall is None:
            return scale_RS
        return scale_RS / overall if self._layout.overall == "weight_global_scale" else scale_RS * overall

    def _values(self, start: int, num: int) -> Tensor:
        """values_RK of some rows, without scales."""
        entry = self._entries[self._layout.data]
        row_bytes = entry.shape[1] * (4 if entry.dtype == "I32" else 1)
        bytes_RB = torch.empty((num, row_bytes), dtype=torch.uint8)
        self._data(bytes_RB, start * row_bytes)
        return formats.decoded(bytes_RB, self._layout.table)[:, : self.shape[1]].contiguous()

    def _scales(self) -> Tensor:
        """scale_NS in the type that they are stored in, a row for each row of blocks."""
        entry = self._entries[self._layout.scale]
        dtype = self._layout.scale_types[entry.dtype]
        stored = torch.empty(self._grid, dtype=dtype)
        self._bytes(self._layout.scale, stored.view(torch.uint8))
        return stored

    def _overall(self) -> Tensor | None:
        if not self._layout.overall:
            return None
        entry = self._entries[self._layout.overall]
        stored = torch.empty(1, dtype=TYPES[entry.dtype])
        self._bytes(self._layout.overall, stored.view(torch.uint8))
        return self._positive(stored.float(), self._layout.overall)

    def _zeros(self) -> Tensor | None:
        """zero_NS, fp32, as values of the same table; of packed ones the numbers lie along the rows."""
        if (entry := self._entries.get("weight_zero_point")) is None:
            return None
        rows, columns = self._grid
        stored = torch.empty(entry.shape, dtype=torch.int8 if entry.dtype == "I8" else torch.int32)
        self._bytes("weight_zero_point", stored.view(torch.uint8))
        if entry.dtype == "I8":
            return stored.view(rows, columns).float()
        return formats.decoded(stored.T.contiguous().view(torch.uint8), self._layout.table)[:, :rows].T

    def _check_stored_shape(self) -> None:
        if "weight_shape" not in self._entries:
            return
        entry = self._entries["weight_shape"]
        self._check_shape("weight_shape", ((2,),), ["I64", "I32"])
        stored = torch.empty(2, dtype=torch.int64 if entry.dtype == "I64" else torch.int32)
        self._bytes("weight_shape", stored.view(torch.uint8))
        if tuple(stored.tolist()) != self.shape:
            raise CheckpointError(
                f"{self._where}.weight_shape is {stored.tolist()}, the matrix is one of {[*self.shape]}"
            )

    def _bytes(self, name: str, target: Tensor, start: int = 0) -> None:
        self._files[name].read_bytes(f"{self._module}.{name}", target, start)

    def _data(self, target: Tensor, start: int = 0) -> None:
        self._bytes(self._layout.data, target, start)
        if self._layout.dtype in FP8 and bool((target & 127 == 127).any()):
            raise CheckpointError(f"{self._where}.{self._layout.data} has NaN in it; fetch the file again")

    def _positive(self, scales: Tensor, name: str) -> Tensor:
        if not bool(((scales > 0) & (scales < TOO_LARGE)).all()):
            raise CheckpointError(
                f"{self._where}.{name} has a scale that is no positive number, or too large for one; fetch the file again"
            )
        return scales


@dataclass(frozen=True)
class QuantisedPart:
    """One matrix and the memory that it belongs in, to be read with others."""

    matrix: QuantisedMatrix
    part: Part

    @property
    def order(self) -> tuple[str, int]:
        return self.matrix.order

    def read(self) -> None:
        self.matrix.read_into(self.part.target)
