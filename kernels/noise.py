"""The noise of sampling: `_fast/cpu/sample.h` defines it as a function of seed, position and id."""

import triton
import triton.language as tl

__all__ = ["gumbel", "noise_key"]

STEP = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def noise_key(seed, position):
    """The key of a row, from its uint64 seed and the position of the token to be drawn."""
    return _mix(seed + STEP * (position.to(tl.uint64) + 1))


@triton.jit
def gumbel(key, ids):
    """Standard Gumbel noise -log(-log(u)) of each id, float32, to a few units in the last place.

    The largest values come from u next to 1, where neither u nor its logarithm survives float32: there
    -log(u) = -log(1 - v) = 2 atanh(v / (2 - v)), as a series of odd powers of at most 1/3.
    """
    bits = (_mix(key + STEP * (ids.to(tl.uint64) + 1)) >> 40).to(tl.int32)
    u = (bits.to(tl.float32) + 0.5) * (1.0 / 16777216)
    v = ((16777216 - bits).to(tl.float32) - 0.5) * (1.0 / 16777216)
    small = tl.minimum(v, 0.5)
    s = small / (2.0 - small)
    q = s * s
    series = 1.0 / 11 + q * (1.0 / 13)
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    near_one = 2.0 * s * (1.0 + q * series)
    return -tl.log(tl.where(v < 0.5, near_one, -tl.log(u)))
