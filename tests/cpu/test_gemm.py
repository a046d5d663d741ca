"""LINEAR and its packing against float64, on every instruction-set level of this machine."""

from functools import cache

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import ROUNDING

LEVELS = cpu.levels()
TYPES = {"F32": cpu.F32, "BF16": cpu.BF16, "F16": cpu.F16}


@cache
def team(level: str, threads: int) -> cpu.Team:
    return cpu.Team(threads, level)


def step_of(tokens: int, samples: int = 0) -> cpu.Step:
    empty = np.zeros(1, np.int32)
    row = np.zeros(max(tokens, 1), np.int32)
    step = cpu.Step(
        token_ids=row,
        positions=row,
        token_row=row,
        query_start=np.zeros(2, np.int32),
        context_len=empty,
        row_slot=empty,
        block_table=empty.reshape(1, 1),
        sample_rows=np.zeros(max(samples, 1), np.int32),
    )
    step.set_counts(tokens, 0, samples)
    return step


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits, round to nearest even, by the definition on exact integers."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, up = bits & 0xFFFF, bits >> 16
    return (up + ((low > 0x8000) | ((low == 0x8000) & (up & 1 == 1)))).astype(np.uint16)


def stored(w: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of `w` in `dtype` and the values they stand for, in float64."""
    if dtype == "BF16":
        half = to_bf16(w)
        return half, (half.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    exact = w.astype(np.float16 if dtype == "F16" else np.float32)
    return exact, exact.astype(np.float64)


def pack(t: cpu.Team, w: np.ndarray, dtype: str) -> cpu.Buffer:
    n, k = w.shape
    packed = cpu.Buffer(cpu.packed_bytes(n, k, dtype))
    cpu.pack_linear(t, dtype, stored(w, dtype)[0], n, k, packed, dtype)
    return packed


def linear(
    t: cpu.Team, x: np.ndarray, packed: cpu.Buffer, n: int, dtype: str, bias: np.ndarray | None
) -> np.ndarray:
    m, k = x.shape
    guard = 64
    out = np.full(m * n + guard, np.nan, np.float32)
    program = cpu.Program(t)
    address = 0 if bias is None else bias.ctypes.data
    program.add(
        cpu.LINEAR,
        cpu.TOKENS,
        [out.ctypes.data, x.ctypes.data, packed.address, address],
        [n, k, TYPES[dtype]],
    )
    program.run(step_of(m))
    assert np.isnan(out[m * n :]).all(), "wrote past the output"
    return out[: m * n].reshape(m, n)


def check(out: np.ndarray, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, rounded_x: bool) -> None:
    """Error of a float32 dot product: a few roundings of the sum of magnitudes."""
    expected = x.astype(np.float64) @ w.T
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).T
    if bias is not None:
        expected += bias
        magnitude += np.abs(bias)
    unit = 2.0**-8 if rounded_x else np.sqrt(x.shape[1] + 4) * 2.0**-23
    assert (np.abs(out - expected) <= unit * magnitude + 1e-30).all()


SHAPES = [(1, 1, 1), (1, 33, 7), (2, 64, 64), (3, 31, 129), (1, 300, 2048), (7, 576, 577), (12, 65, 96)]
SHAPES += [(13, 96, 515), (25, 200, 1100), (97, 40, 64), (100, 129, 1025), (130, 70, 1301)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(level: str, dtype: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    rng = np.random.default_rng([m, n, k])
    x = rng.standard_normal((m, k), np.float32)
    w = rng.standard_normal((n, k), np.float32)
    bias = rng.standard_normal(n, np.float32) if (m + n) % 2 else None
    outs = [linear(t, x, pack(t, w, dtype), n, dtype, bias) for t in (team(level, 1), team(level, 2))]
    check(outs[0], x, stored(w, dtype)[1], bias, level in ROUNDING and dtype == "BF16")
    assert (outs[0] == outs[1]).all(), "depends on the number of threads"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_is_the_same_in_every_batch(level: str, dtype: str) -> None:
    n, k = 100, 1101
    rng = np.random.default_rng(5)
    x = rng.standard_normal((130, k), np.float32)
    w = rng.standard_normal((n, k), np.float32)
    bias = rng.standard_normal(n, np.float32)
    packed = pack(team(level, 1), w, dtype)
    alone = np.concatenate([linear(team(level, 1), x[i : i + 1], packed, n, dtype, bias) for i in range(130)])
    check(alone, x, stored(w, dtype)[1], bias, level in ROUNDING and dtype == "BF16")
    for m in range(2, 131):
        assert (linear(team(level, 1 + m % 4), x[:m], packed, n, dtype, bias) == alone[:m]).all(), m


@pytest.mark.parametrize("level", LEVELS)
def test_long_k_of_a_single_row(level: str) -> None:
    """K past the block that bounds a decode tile."""
    m, n, k = 2, 40, 100_003
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    for dtype in TYPES:
        out = linear(team(level, 2), x, pack(team(level, 2), w, dtype), n, dtype, None)
        check(out, x, stored(w, dtype)[1], None, level in ROUNDING and dtype == "BF16")


@pytest.mark.parametrize("dtype", TYPES)
def test_nonfinite_values_stay_in_their_row_and_column(dtype: str) -> None:
    for level in LEVELS:
        x = np.ones((14, 35), np.float32)
        x[3, 34] = np.inf
        w = np.ones((33, 35), np.float32)
        w[32, 0] = np.nan
        out = linear(team(level, 2), x, pack(team(level, 1), w, dtype), 33, dtype, None)
        assert np.isnan(out[:, 32]).all()
        assert np.isinf(out[3, :32]).all()
        assert (np.delete(out, 3, 0)[:, :32] == 35).all()


@pytest.mark.parametrize("src", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dtype", TYPES)
def test_fused_and_sliced_packing(src: str, dtype: str) -> None:
    """Three sources of uneven height share one packed weight; only columns [start, stop) are taken."""
    t = team(LEVELS[-1], 2)
    rng = np.random.default_rng(7)
    heights, cols, start, stop = (45, 3, 81), 701, 33, 690
    parts = [rng.standard_normal((h, cols), np.float32) for h in heights]
    n, k = sum(heights), stop - start
    packed = cpu.Buffer(cpu.packed_bytes(n, k, dtype))
    np.frombuffer(packed, np.uint8)[:] = 0xFF  # NaN wherever packing leaves a hole
    at = 0
    for part in parts:
        raw = stored(part, src)[0]
        rows = part.shape[0]
        cpu.pack_linear(t, src, raw, rows, cols, packed, dtype, at, col_start=start, col_stop=stop)
        at += rows
    values = np.concatenate([stored(p, src)[1] for p in parts])[:, start:stop]
    x = rng.standard_normal((5, k), np.float32)
    out = linear(t, x, packed, n, dtype, None)
    check(out, x, stored(values.astype(np.float32), dtype)[1], None, t.level in ROUNDING and dtype == "BF16")


def test_rows_and_samples_are_counted_apart() -> None:
    t = team(LEVELS[-1], 2)
    x = np.ones((4, 3), np.float32)
    packed = pack(t, np.ones((5, 3), np.float32), "F32")
    out = np.zeros((4, 5), np.float32)
    program = cpu.Program(t)
    program.add(cpu.LINEAR, cpu.SAMPLES, [out.ctypes.data, x.ctypes.data, packed.address, 0], [5, 3, cpu.F32])
    program.run(step_of(4, 0))
    assert (out == 0).all()
    program.run_op(0, step_of(4, 2))
    assert (out[:2] == 3).all() and (out[2:] == 0).all()


def test_wrong_arguments_are_refused() -> None:
    t = team(LEVELS[-1], 1)
    w = np.zeros((4, 32), np.float32)
    dst = cpu.Buffer(cpu.packed_bytes(4, 32, "F32"))
    with pytest.raises(ValueError, match="source type 'F8' is not supported"):
        cpu.pack_linear(t, "F8", w, 4, 32, dst, "F32")
    with pytest.raises(ValueError, match="weight type 'Q8_0' is not supported"):
        cpu.pack_linear(t, "F32", w, 4, 32, dst, "Q8_0")
    with pytest.raises(ValueError, match="the source has 512 bytes where 640 are needed"):
        cpu.pack_linear(t, "F32", w, 5, 32, dst, "F32")
    with pytest.raises(ValueError, match="the packed weight has"):
        cpu.pack_linear(t, "F32", w, 4, 32, dst, "F32", 32)
    with pytest.raises(ValueError, match=r"columns 0\.\.33 do not lie"):
        cpu.pack_linear(t, "F32", w, 4, 32, dst, "F32", col_stop=33)
    with pytest.raises(ValueError, match="not whole Q4_K blocks of 256"):
        cpu.pack_linear(t, "Q4_K", w, 1, 32, dst, "F32")
    program = cpu.Program(t)
    with pytest.raises(ValueError, match="op code 99"):
        program.add(99, cpu.TOKENS, [])
    with pytest.raises(ValueError, match="rows must be"):
        program.add(cpu.LINEAR, 7, [])
    with pytest.raises(ValueError, match="at most 8 addresses"):
        program.add(cpu.LINEAR, cpu.TOKENS, [1] * 9)
    with pytest.raises(IndexError):
        program.run_op(0, step_of(1))
    with pytest.raises(ValueError, match="exceed the arrays"):
        step_of(3).set_counts(4, 0, 0)
