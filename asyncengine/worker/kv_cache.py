"""Memory of the keys and values: one mapping, divided into layers and blocks."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncengine._fast.cpu import Buffer

__all__ = ["KVCache", "KVLayout"]


class KVLayout(NamedTuple):
    """Shape of the cache on one rank, but for the number of blocks."""

    layers: int
    piece_bytes: int
    """Keys, or values, of one block in one layer."""

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block in all layers."""
        return 2 * self.layers * self.piece_bytes


class KVCache:
    """[blocks, layers, 2 (keys, values), piece]: what a block holds lies together, so that memory is taken
    block by block, and a block moves as one run of bytes."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.nbytes = layout.bytes_per_block * num_blocks
        self._memory = Buffer(self.nbytes)
        values = np.frombuffer(memoryview(self._memory), np.uint8)
        self._blocks = values.reshape(num_blocks, layout.bytes_per_block)

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where the keys and the values of `layer` begin in block 0; blocks follow at `bytes_per_block`."""
        keys = self._memory.address + 2 * layer * self.layout.piece_bytes
        return keys, keys + self.layout.piece_bytes

    def discard(self) -> None:
        """Gives the memory back. It is taken again as blocks are written."""
        self._memory.discard()

    def copy_blocks(self, copies: NDArray[np.int32]) -> None:
        """`copies`: [n, 2] of source and target, done in order (a target may be a later source)."""
        for source, target in copies.tolist():
            self._blocks[target] = self._blocks[source]
