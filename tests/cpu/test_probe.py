"""What the probe reports can be had, and bad arguments are refused."""

import math
import time

import numpy as np
import pytest

from asyncengine._fast import cpu

NAMES = ["read", "f32", "bf16", "int8"]


@pytest.mark.parametrize("level", cpu.levels())
@pytest.mark.parametrize("threads", [1, 3])
def test_every_peak_is_measured(level: str, threads: int) -> None:
    found = cpu.peaks(cpu.Team(threads, level), 1 << 20, 1 << 10, 2)
    assert list(found) == NAMES
    assert all(math.isfinite(value) and value > 0 for value in found.values())


def test_a_copy_by_numpy_reads_no_faster() -> None:
    # 64 MiB: beyond what a core keeps for itself. Whoever shares the machine slows both.
    source = np.ones(1 << 24, np.float32)
    found = cpu.peaks(cpu.Team(1), source.nbytes, 1, 20)["read"]
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        source.copy()
        times.append(time.perf_counter() - begin)
    assert source.nbytes / min(times) < 1.5 * found


@pytest.mark.parametrize("wrong", [(0, 1, 1), (4096, 0, 1), (4096, 1, 0)])
def test_bad_arguments(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        cpu.peaks(cpu.Team(1), *wrong)
