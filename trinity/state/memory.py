"""Memory of a store's tensors: blocks that are used again when no version needs them.

Decisions: a block is of one tensor, flat, and known by its address. With a folder each has a file there, which outlives the
process: on a CPU the block is the file, mapped; a GPU's is copied to it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trinity.state.files import created, dtype_of, mapped, numel_of
from trinity.utils.hugepages import on_huge_pages


@dataclass(frozen=True, eq=False)
class _Block:
    file: str
    tensor: Tensor
    mirror: Tensor | None  # what the folder has of it


class Memory:
    """Owns the blocks of one store, in use and free."""

    def __init__(self, folder: Path | None, device: torch.device):
        self.folder, self.device = folder, device
        self._blocks: dict[int, _Block] = {}  # by address
        self._free: list[_Block] = []
        self._count = 0  # of names given to files

    @property
    def files(self) -> set[str]:
        """Names of the files that the blocks lie in."""
        return {block.file for block in self._blocks.values()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_bytes_at(self._blocks)

    def num_bytes_at(self, addresses: Collection[int]) -> int:
        """Bytes of these blocks."""
        return sum(self._blocks[address].tensor.nbytes for address in addresses)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A free block, or a new one; its values are anything. Raises ConfigError where the folder has no room."""
        for at, block in enumerate(self._free):
            if block.tensor.numel() == numel and block.tensor.dtype == dtype:
                return self._free.pop(at).tensor
        return self._new(numel, dtype).tensor

    def written(self, address: int, is_known: bool = False) -> str:
        """The file of a block; a GPU's is copied to it first, unless its values are known to be there."""
        block = self._blocks[address]
        if block.mirror is not None and block.mirror is not block.tensor and not is_known:
            block.mirror.copy_(block.tensor)
        return block.file

    def found(self, entry: Mapping[str, Any]) -> Tensor | None:
        """The block of a tensor that a process before left in the folder, None for one without elements. Versions share what
        did not change: one file, one block."""
        file = entry["file"]
        if file is None:
            return None
        for block in self._blocks.values():
            if block.file == file:
                return block.tensor
        assert self.folder is not None
        mirror = mapped(self.folder / file, numel_of(entry), dtype_of(entry))
        tensor = mirror if self.device.type == "cpu" else mirror.to(self.device)
        self._count = max(self._count, 1 + int(file[2:]))
        return self._add(_Block(file, tensor, mirror)).tensor

    def keep(self, addresses: Collection[int]) -> None:
        """These blocks are in use; all others are free."""
        self._free = [block for address, block in self._blocks.items() if address not in addresses]

    def trim(self) -> None:
        """Give free blocks back to the system."""
        for block in self._free:
            del self._blocks[block.tensor.data_ptr()]
            if self.folder is not None:
                (self.folder / block.file).unlink(missing_ok=True)
        self._free = []

    def _new(self, numel: int, dtype: torch.dtype) -> _Block:
        file, self._count = f"t-{self._count:06d}", self._count + 1
        mirror = None if self.folder is None else created(self.folder / file, numel, dtype)
        if mirror is not None and self.device.type == "cpu":
            return self._add(_Block(file, mirror, mirror))
        return self._add(_Block(file, on_huge_pages(torch.empty(numel, dtype=dtype, device=self.device)), mirror))

    def _add(self, block: _Block) -> _Block:
        self._blocks[block.tensor.data_ptr()] = block
        return block
