"""What the configuration of each kernel could be, and the search through it."""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from . import workloads
from .workloads import Workload

__all__ = ["GRIDS", "MAX_SHARED", "Grid", "Numbers", "candidates", "max_shared", "search"]

Numbers = dict[str, int]
"""A configuration, block sizes and options side by side."""

MAX_SHARED = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Most bytes of shared memory that a program may have, from each capability on. 8.0 and 8.7 have 163 KiB, but
8.6 and 8.9, which use 8.0's configurations, do not."""

REGISTERS = 65536
"""Of a multiprocessor."""

GAIN = 0.01
"""Differences below this share of a time are taken for noise."""


class Grid(NamedTuple):
    function: str
    """Name of the Triton function."""
    workloads: Callable[[torch.device], Iterator[Workload]]
    axes: dict[str, tuple[int, ...]]
    complete: Callable[[Numbers], Numbers | None] = lambda numbers: numbers
    """Adds what follows from the axes; None where they do not go together."""


def _registers_shared(numbers: Numbers) -> Numbers:
    """As many registers as PROGRAMS programs leave each other."""
    threads = 32 * numbers["num_warps"] * numbers["PROGRAMS"]
    return numbers | {"maxnreg": min(REGISTERS // threads // 8 * 8, 255)}


def _registers_suffice(numbers: Numbers) -> Numbers | None:
    # Registers are given to warps by 256.
    used = numbers["num_warps"] * -(-32 * numbers["maxnreg"] // 256) * 256
    return numbers if used <= REGISTERS else None


def _decode(head_dim: int) -> Grid:
    axes = {
        "MAX_M": (16, 32),
        "BLOCK_N": (32, 64, 128),
        "MIN_TILES": (1, 2, 4, 8),
        "PROGRAMS": (1, 2, 3, 4),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    }
    return Grid("decode_kernel", partial(workloads.decode, head_dim), axes, _registers_shared)


def _prefill(head_dim: int) -> Grid:
    axes = {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (32, 64, 128),
        "SHORT_WARPS": (4, 8),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
    return Grid("prefill_kernel", partial(workloads.prefill, head_dim), axes)


GRIDS = {
    "rms_norm": Grid("rms_norm_kernel", workloads.norm, {"num_warps": (2, 4, 8, 16)}),
    "gated": Grid(
        "gated_kernel", workloads.activation, {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}
    ),
    "rope_kv": Grid(
        "rope_kv_kernel", workloads.rotation, {"BLOCK_HEADS": (2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}
    ),
    "batch_update": Grid(
        "batch_update_kernel",
        workloads.batch_updates,
        {"BLOCK": (128, 256, 512, 1024), "num_warps": (1, 2, 4, 8)},
    ),
    "sampler_scan": Grid(
        "scan_kernel", workloads.sampling, {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8, 16)}
    ),
    "sampler_pick": Grid(
        "pick_kernel",
        workloads.sampling,
        {"num_warps": (4, 8, 16), "maxnreg": (128, 168, 224, 255)},
        _registers_suffice,
    ),
    "attention_decode_64": _decode(64),
    "attention_decode_128": _decode(128),
    "attention_decode_256": _decode(256),
    "attention_prefill_64": _prefill(64),
    "attention_prefill_128": _prefill(128),
    "attention_prefill_256": _prefill(256),
}
"""By names in kernels/configs.py. The sampler's first kernel comes first: the second takes its block size."""


def max_shared(capability: int) -> int:
    return MAX_SHARED[max(known for known in MAX_SHARED if known <= capability)]


def candidates(grid: Grid, start: Numbers) -> list[Numbers]:
    """All of the grid and `start`, those first that differ from it least."""
    found = [start]
    for values in itertools.product(*grid.axes.values()):
        numbers = grid.complete(dict(zip(grid.axes, values, strict=True)))
        if numbers is not None and numbers != start:
            found.append(numbers)
    return sorted(found, key=lambda numbers: sum(numbers[name] != start[name] for name in grid.axes))


def search(
    grid: Grid, start: Numbers, cost: Callable[[Numbers], float], deadline: float
) -> tuple[Numbers, bool]:
    """The best of the grid that changing one axis at a time leads to, and whether time sufficed.

    `cost` is infinite for what cannot be used; `deadline` is one of time.monotonic().
    """
    best, least = start, cost(start)
    seen = [start]
    improved = True
    while improved:
        improved = False
        for name, values in grid.axes.items():
            for value in values:
                numbers = grid.complete(best | {name: value})
                if numbers is None or numbers in seen:
                    continue
                if time.monotonic() >= deadline:
                    return best, False
                seen.append(numbers)
                found = cost(numbers)
                if found < (1.0 - GAIN) * least:
                    best, least, improved = numbers, found, True
    return best, True
