"""Decode steps as graphs: one for each of a list of batch sizes, replayed for all steps that fit."""

import logging
from collections.abc import Callable

from .device import Device

__all__ = ["GRAPH_BYTES", "Graphs", "graph_sizes"]

GRAPH_BYTES = 4 << 20
"""Estimate of what a graph takes beside the memory that all of them share."""

SMALL = (1, 2, 4)
STEP = 8
LARGE = 256
LARGE_STEP = 32

_logger = logging.getLogger(__name__)


def graph_sizes(most: int) -> list[int]:
    """Rows of the graphs of an engine of up to `most` sequences, ascending."""
    sizes = [*SMALL, *range(STEP, LARGE + 1, STEP), *range(LARGE + LARGE_STEP, most, LARGE_STEP)]
    return [*(size for size in sizes if size < most), most]


class Graphs:
    """Replays by number of rows.

    `launch(rows)` launches a step of so many rows, on inputs that `prepare(rows)` has made padding. The
    largest graph comes first, so that the smaller ones find room in the memory that it has left.
    `addresses` tells where the graphs' inputs and outputs are: where debug messages are logged, every
    replay checks that they are still where they were.
    """

    def __init__(
        self,
        device: Device,
        most: int,
        prepare: Callable[[int], None],
        launch: Callable[[int], None],
        addresses: Callable[[], tuple[int, ...]],
        progress: Callable[[int, int], None],
    ) -> None:
        sizes = graph_sizes(most)
        self._replays: dict[int, Callable[[], None]] = {}
        for done, rows in enumerate(reversed(sizes), 1):
            prepare(rows)
            launch(rows)  # compiles kernels, and lets libraries make what they cannot while captured
            self._replays[rows] = device.capture(lambda rows=rows: launch(rows))  # type: ignore[misc]
            progress(done, len(sizes))
        self._addresses = addresses
        self._captured = addresses()
        self._size_of = [0] * (most + 1)
        for size in sorted(sizes, reverse=True):
            self._size_of[1 : size + 1] = [size] * size

    def __len__(self) -> int:
        return len(self._replays)

    def size_for(self, rows: int) -> int:
        """Rows of the smallest graph that has as many."""
        return self._size_of[rows]

    def replay(self, size: int) -> None:
        if _logger.isEnabledFor(logging.DEBUG) and self._addresses() != self._captured:
            raise RuntimeError("a tensor that the decode graphs use has moved since they were captured")
        self._replays[size]()
