"""Compact weights: what is stored against a reading of the format in Python, products against plain ones."""

from itertools import pairwise

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS, run, team, widened
from .test_gemm import check, to_bf16

PANEL, COMPACT = cpu.PANEL, cpu.COMPACT
SHAPES = [(1, 1), (32, 3), (33, 4), (40, 5), (64, 96), (96, 130), (31, 577), (128, 1536), (70, 2051)]


def plain(values: np.ndarray) -> cpu.Buffer:
    """bf16 bits [n, k], packed; columns that pad the last panel are zeros."""
    n, k = values.shape
    packed = cpu.Buffer(cpu.packed_bytes(n, k, "BF16"))
    cpu.pack_linear(team(LEVELS[-1], 2), "BF16", np.ascontiguousarray(values), n, k, packed, "BF16")
    return packed


def compacted(values: np.ndarray, step: int | None = None, threads: int = 2) -> np.ndarray:
    """The bytes of the compact weight, appended by so many panels at a time."""
    n, k = values.shape
    packed, panels = np.frombuffer(memoryview(plain(values)), np.uint8), -(-n // PANEL)
    out = np.full(cpu.packed_bytes(n, k, "BF16", COMPACT) + 64, 0xA5, np.uint8)
    size, nbytes = cpu.packed_bytes(PANEL, k, "BF16"), 0
    for first in range(0, panels, step or panels):
        count = min(step or panels, panels - first)
        part = packed[first * size : (first + count) * size]
        nbytes = cpu.compact(team(LEVELS[-1], threads), part, n, k, out, first, count)
    assert (out[nbytes:] == 0xA5).all(), "wrote past the weight"
    assert nbytes == cpu.compact_bytes(out, n)
    return out[:nbytes]


def read(stored: np.ndarray, n: int, k: int) -> np.ndarray:
    """The numbers [n, k] of a compact weight, as `compact.h` tells."""
    panels = -(-n // PANEL)
    start = stored[: 4 * panels + 4].view(np.int32).astype(int) * 64
    assert start[-1] == len(stored)
    out = np.zeros((panels * PANEL, k + -k % 4), np.uint16)
    for p, (begin, end) in enumerate(pairwise(start)):
        panel, rows = stored[begin:end], slice(p * PANEL, (p + 1) * PANEL)
        table, count = panel[:16].astype(np.uint16), panel[16:20].view(np.int32)[0]
        if count < 0:
            pairs = panel[64:].view(np.uint16).reshape(-1, PANEL, 2)
            out[rows, : 2 * len(pairs)] = pairs.swapaxes(0, 1).reshape(PANEL, -1)
            continue
        exceptions = panel[20 : 24 + 4 * count].view(np.int32).tolist()
        assert exceptions[-1] == 2**31 - 1 and exceptions == sorted(set(exceptions))
        head = -(-(24 + 4 * count) // 64) * 64
        exact = panel[head : head + 256 * count].view(np.uint16).reshape(count, 2, PANEL, 2)
        units = panel[head + 256 * count :].reshape(k // 4, 192)
        lower = units[:, :128].reshape(-1, 2, 64)
        upper = table[np.stack([units[:, 128:] & 15, units[:, 128:] >> 4], 1)]
        # Eight numbers of the first half of the rows, and eight of the second, in turn.
        numbers = (upper << 8 | lower).reshape(-1, 2, 4, 2, 8).swapaxes(2, 3).reshape(-1, 2, PANEL, 2)
        all_units = np.zeros((out.shape[1] // 4, 2, PANEL, 2), np.uint16)
        all_units[: len(numbers)] = numbers
        all_units[exceptions[:-1]] = exact
        out[rows] = all_units.transpose(2, 0, 1, 3).reshape(PANEL, -1)
    return out[:n, :k]


def weights_of(kind: str, n: int, k: int) -> np.ndarray:
    rng = np.random.default_rng([n, k])
    if kind == "bits":
        bits = rng.integers(0, 2**16, (n, k)).astype(np.uint16)
        return np.where(bits & 0x7F80 == 0x7F80, bits & 0xFF80, bits)  # no NaN: packing makes them quiet
    values = rng.normal(0, 0.02, (n, k))
    if kind == "wide":  # a unit in some has numbers of other sizes
        values *= np.where(rng.random((n, k)) < 2e-4, 10.0 ** rng.integers(-30, 30, (n, k)), 1)
    if kind == "sparse":
        values *= rng.random((n, k)) < 0.3
    if kind == "subnormal":
        values *= 2.0**-124
    if kind == "constant":
        values[:] = -1.5
    return to_bf16(values.astype(np.float32))


KINDS = ["normal", "wide", "sparse", "subnormal", "constant", "bits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_kept(kind: str, shape: tuple[int, int]) -> None:
    values = weights_of(kind, *shape)
    stored = compacted(values)
    np.testing.assert_array_equal(read(stored, *shape), values)
    np.testing.assert_array_equal(compacted(values, 1, threads=1), stored)
    np.testing.assert_array_equal(compacted(values, 2), stored)


def test_bytes() -> None:
    n, k = 640, 1024
    size = cpu.packed_bytes(n, k, "BF16")
    assert 0.75 * size < compacted(weights_of("normal", n, k)).nbytes < 0.775 * size
    assert compacted(weights_of("constant", n, k)).nbytes < 0.755 * size
    # What cannot be made smaller is stored as it is.
    assert size < compacted(weights_of("bits", n, k)).nbytes < 1.01 * size


def linear(level: str, threads: int, x: np.ndarray, weight: np.ndarray, n: int, group: int) -> np.ndarray:
    m, k = x.shape
    out = np.full((m + 1, n), np.nan, np.float32)
    run(
        team(level, threads),
        cpu.LINEAR,
        [out, x, weight, None],
        [n, k, cpu.BF16, 0, group],
        num_tokens=m,
    )
    assert np.isnan(out[m]).all(), "wrote past the output"
    return out[:m]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["normal", "wide", "sparse"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1], ids=str)
def test_products_are_those_of_plain_weights(level: str, kind: str, shape: tuple[int, int]) -> None:
    n, k = shape
    values = weights_of(kind, n, k)
    weight, packed = compacted(values), np.frombuffer(memoryview(plain(values)), np.uint8)
    x = np.random.default_rng(n).standard_normal((130, k), np.float32)
    alone = np.concatenate([linear(level, 1, x[i : i + 1], weight, n, COMPACT) for i in range(130)])
    if level == "amx":  # where plain weights use tile registers, which round x and add in another order
        check(alone, x, widened(values), None, False)
    else:
        np.testing.assert_array_equal(alone, linear(level, 1, x, packed, n, 0))
    for m in (2, 3, 4, 8, 12, 13, 24, 32, 97, 130):
        out = linear(level, 1 + m % 3, x[:m], weight, n, COMPACT)
        np.testing.assert_array_equal(out, alone[:m], err_msg=str(m))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["wide", "bits"])
def test_rows_of_a_table(level: str, kind: str) -> None:
    n, k = 70, 579
    values = weights_of(kind, n, k)
    ids = np.array([0, 69, 31, 32, 5, 70, 33, -1])
    out = np.full((len(ids), k), np.nan, np.float32)
    sizes = [k, cpu.BF16, 0, n, 1, COMPACT]
    run(team(level, 2), cpu.EMBED, [out, compacted(values)], sizes, num_tokens=len(ids), token_ids=ids)
    expected = np.stack([widened(values)[i] if 0 <= i < n else np.zeros(k) for i in ids])
    np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_refusals() -> None:
    t, values = team(LEVELS[-1], 2), weights_of("normal", 64, 96)
    packed, out = plain(values), cpu.Buffer(cpu.packed_bytes(64, 96, "BF16", COMPACT))
    with pytest.raises(ValueError, match=r"panels 1\.\.3 do not lie in a weight of shape \[64, 96\]"):
        cpu.compact(t, packed, 64, 96, out, 1, 2)
    with pytest.raises(ValueError, match="the packed panels"):
        cpu.compact(t, packed, 96, 96, out)
    with pytest.raises(ValueError, match="the compact weight"):
        cpu.compact(t, packed, 64, 96, cpu.Buffer(packed.nbytes))
    with pytest.raises(ValueError, match="BF16 weights have no groups"):
        cpu.pack_linear(t, "BF16", values, 64, 96, out, "BF16", group=COMPACT)
    with pytest.raises(ValueError, match="F16 weights have no groups"):
        cpu.packed_bytes(64, 96, "F16", COMPACT)
