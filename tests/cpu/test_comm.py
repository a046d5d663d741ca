"""Collectives between real processes: every rank checks every result bit by bit."""

import os
import subprocess
import sys

import numpy as np
import pytest

from asyncengine._fast import cpu

RANK = """
import sys
import numpy as np
from asyncengine._fast import cpu

rank, world, fd, region, threads, rounds = map(int, sys.argv[1:])
team = cpu.Team(threads)
comm = cpu.Comm(fd, rank, world, region)
assert (comm.rank, comm.world) == (rank, world)


def step_of(tokens):
    row = np.zeros(tokens, np.int32)
    step = cpu.Step(token_ids=row, positions=row, token_row=row, query_start=np.zeros(2, np.int32),
                    context_len=row, row_slot=row, block_table=row.reshape(1, -1), sample_rows=row)
    step.set_counts(tokens, 0, 0)
    return step


def part(seed, rank, shape):
    return np.random.default_rng([seed, rank]).standard_normal(shape).astype(np.float32)


def all_reduce(seed, rows, width):
    x = part(seed, rank, (rows, width))
    program = cpu.Program(team)
    program.add(cpu.ALL_REDUCE, cpu.TOKENS, [x.ctypes.data, comm.address], [width])
    program.run(step_of(rows))
    expected = part(seed, 0, (rows, width))
    for r in range(1, world):
        expected += part(seed, r, (rows, width))
    assert x.tobytes() == expected.tobytes(), ("all_reduce", seed, rows, width)


def all_gather(seed, rows, widths):
    total, first = sum(widths), sum(widths[:rank])
    x = part(seed, rank, (rows, widths[rank]))
    out = np.full((rows, total), np.nan, np.float32)
    program = cpu.Program(team)
    program.add(cpu.ALL_GATHER, cpu.TOKENS, [out.ctypes.data, x.ctypes.data, comm.address],
                [widths[rank], total, first])
    program.run(step_of(rows))
    expected = np.concatenate([part(seed, r, (rows, w)) for r, w in enumerate(widths)], axis=1)
    assert out.tobytes() == expected.tobytes(), ("all_gather", seed, rows, widths)


def broadcast(seed, count):
    expected = np.random.default_rng(seed).integers(-1, 1 << 30, count).astype(np.int32)
    tokens = expected.copy() if rank == 0 else np.zeros(count, np.int32)
    comm.broadcast_tokens(tokens)
    assert (tokens == expected).all(), ("broadcast", seed, count)


shared = np.random.default_rng(99)  # the same choices on every rank
for i in range(rounds):
    rows, width = int(shared.integers(1, 40)), int(shared.integers(1, 700))
    kind = i % 3
    if kind == 0:
        all_reduce(i, rows, width)
    elif kind == 1:
        all_gather(i, rows, [int(w) for w in shared.integers(0, 300, world - 1)] + [1])
    else:
        broadcast(i, int(shared.integers(0, 600)))
"""


def memfd(world: int, region: int) -> int:
    fd = os.memfd_create("comm")
    os.ftruncate(fd, cpu.Comm.bytes_needed(world, region))
    return fd


# Regions from far too small for a row (every message goes in many chunks) to ample.
@pytest.mark.parametrize(
    ("world", "threads", "region", "rounds"),
    [
        (1, 1, 4096, 20),
        (2, 1, 1 << 20, 150),
        (2, 2, 1 << 20, 60),
        (3, 1, 1000, 30),
        (2, 2, 4100, 45),
        (4, 1, 64, 6),
    ],
)
def test_collectives(world: int, threads: int, region: int, rounds: int) -> None:
    fd = memfd(world, region)
    try:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, *map(str, (rank, world, fd, region, threads, rounds))],
                pass_fds=[fd],
                stderr=subprocess.PIPE,
            )
            for rank in range(world)
        ]
    finally:
        os.close(fd)
    try:
        errors = [rank.communicate(timeout=60)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)


def test_sizes_that_do_not_fit() -> None:
    fd = memfd(2, 4096)
    try:
        held = cpu.Comm(fd, 0, 2, 4096)
        with pytest.raises(ValueError, match="another rank opened it with other sizes"):
            cpu.Comm(fd, 1, 2, 4000)
        with pytest.raises(ValueError, match="too small"):
            cpu.Comm(fd, 1, 2, 1 << 20)
        with pytest.raises(ValueError, match="rank 2 is not one of 2"):
            cpu.Comm(fd, 2, 2, 4096)
        with pytest.raises(ValueError, match="region_bytes must be at least 64"):
            cpu.Comm(fd, 1, 2, 8)
        del held
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="cannot map the shared file"):
        cpu.Comm(fd, 0, 2, 4096)


def test_one_rank_alone_needs_nobody() -> None:
    fd = memfd(1, 64)
    try:
        comm = cpu.Comm(fd, 0, 1, 64)
    finally:
        os.close(fd)
    tokens = np.arange(100, dtype=np.int32)
    comm.broadcast_tokens(tokens)
    assert (tokens == np.arange(100)).all()
