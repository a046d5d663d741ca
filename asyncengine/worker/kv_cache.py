"""Memory of the keys and values: one mapping, divided into layers and blocks."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncengine._fast.cpu import Buffer

__all__ = ["KVCache", "KVLayout"]


class KVLayout(NamedTuple):
    """Shape of the cache on one rank, but for the number of blocks."""

    layers: int
    heads: int
    block_size: int
    """Positions in a block."""
    head_dim: int
    item_size: int
    """Bytes of one number."""

    @property
    def piece_bytes(self) -> int:
        """Keys, or values, of one block in one layer."""
        return self.heads * self.block_size * self.head_dim * self.item_size

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block in all layers."""
        return 2 * self.layers * self.piece_bytes


class KVCache:
    """[layers, 2 (keys, values), blocks, heads, block, head_dim]; pages are taken when first written."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.nbytes = layout.bytes_per_block * num_blocks
        self._memory = Buffer(self.nbytes)
        pieces = np.frombuffer(memoryview(self._memory), np.uint8)
        self._pieces = pieces.reshape(2 * layout.layers, num_blocks, layout.piece_bytes)

    def addresses(self, layer: int) -> tuple[int, int]:
        """Where the keys and the values of `layer` begin."""
        size = self.num_blocks * self.layout.piece_bytes
        keys = self._memory.address + 2 * layer * size
        return keys, keys + size

    def copy_blocks(self, copies: NDArray[np.int32]) -> None:
        """`copies`: [n, 2] of source and target, done in order (a target may be a later source)."""
        for source, target in copies.tolist():
            self._pieces[:, target] = self._pieces[:, source]
