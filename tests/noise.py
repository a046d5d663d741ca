"""The sampler's noise by its definition (`_fast/cpu/sample.h`), in exact integers and float64."""

import math

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    """The finalizer of splitmix64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def gumbel(seed: int, position: int, token: int) -> float:
    key = mix((seed + STEP * (position + 1)) & MASK)
    h = mix((key + STEP * (token + 1)) & MASK)
    return -math.log(-math.log(((h >> 40) + 0.5) * 2.0**-24))
