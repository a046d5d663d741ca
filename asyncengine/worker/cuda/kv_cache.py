"""Keys and values on the device: one tensor, of which every layer has a part."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["KVCache", "KVLayout"]


class KVLayout(NamedTuple):
    """Shape of the cache on one rank, but for the number of blocks."""

    layers: int
    heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block in all layers."""
        return 2 * self.layers * self.heads * self.block_size * self.head_dim * self.dtype.itemsize


class KVCache:
    """[layers, 2 (keys, values), blocks, heads, block size, head size]"""

    def __init__(self, layout: KVLayout, num_blocks: int, place: torch.device) -> None:
        layers, heads, block_size, head_dim, dtype = layout
        self.num_blocks = num_blocks
        shape = (layers, 2, num_blocks, heads, block_size, head_dim)
        # Not cleared: nothing reads beyond a sequence's length.
        self._memory = torch.empty(shape, dtype=dtype, device=place)
        self.nbytes = self._memory.nbytes

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [blocks, heads, block size, head size] and contiguous."""
        keys, values = self._memory[index]
        return keys, values

    def copy_blocks(self, copies: NDArray[np.int32], on_device: torch.Tensor) -> None:
        """`copies`: [n, 2] of source and target, done in order; `on_device` are the same numbers."""
        # As bytes: float8 has no indexing of its own.
        blocks = self._memory.view(torch.uint8).flatten(0, 1)
        sources, targets = on_device.long().unbind(1)
        if len(np.unique(copies[:, 1])) == len(copies) and not np.isin(copies[:, 1], copies[:, 0]).any():
            blocks.index_copy_(1, targets, blocks.index_select(1, sources))
            return
        for i in range(len(copies)):  # a target is the source or the target of another copy
            blocks.index_copy_(1, targets[i : i + 1], blocks.index_select(1, sources[i : i + 1]))
