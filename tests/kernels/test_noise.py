"""The noise against its definition in exact integers and float64."""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from asyncengine.kernels.noise import gumbel, noise_key

from ..noise import MASK, STEP


@triton.jit
def noise_kernel(out, seed, positions, first, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    ids = first + tl.arange(0, BLOCK)
    key = noise_key(tl.load(seed + row).to(tl.uint64, bitcast=True), tl.load(positions + row))
    tl.store(out + row * BLOCK + tl.arange(0, BLOCK), gumbel(key, ids))


def mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def test_noise_of_many_ids() -> None:
    seeds, positions, first, block = [0, 1, 2**63 + 5, MASK], [0, 7, 2**31 - 1, 130_000], 1000, 1 << 18
    out = torch.zeros(4, block)
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in seeds], dtype=torch.int64)
    noise_kernel[(4,)](out, signed, torch.tensor(positions, dtype=torch.int32), first, BLOCK=block)
    ids = np.arange(first, first + block, dtype=np.uint64)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        key = mix(np.array([(seed + STEP * (position + 1)) & MASK], np.uint64))
        h = mix(key + np.uint64(STEP) * (ids + np.uint64(1))) >> np.uint64(40)
        u = (h.astype(np.float64) + 0.5) * 2.0**-24
        exact = -np.log(-np.log(u))
        np.testing.assert_allclose(out[row].numpy(), exact, rtol=4e-7, atol=4e-7)
        assert exact.max() > math.log(block) - 2  # the far tail was met
