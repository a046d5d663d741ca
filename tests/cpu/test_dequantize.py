"""Stored tensors to float: against the gguf package for the quantized types, numpy for the plain ones."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from asyncengine._fast import cpu

QUANTIZED = dict.fromkeys(("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"), 32)
QUANTIZED |= dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), 256)
SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q6_K": (208,)}
SCALES |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))


@pytest.fixture(scope="module")
def team() -> cpu.Team:
    return cpu.Team(2)


def to_f32(
    team: cpu.Team, dtype: str, raw: np.ndarray, rows: int, cols: int, start: int = 0, stop: int | None = None
) -> np.ndarray:
    out = np.full((rows, (cols if stop is None else stop) - start), 7, np.float32)
    cpu.convert(team, dtype, raw, rows, cols, out, "F32", col_start=start, col_stop=stop)
    return out


def blocks(dtype: str, count: int, seed: int) -> np.ndarray:
    """Random bytes; half-precision scales random too, finite and sometimes subnormal, zero or the largest."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, cpu.source_bytes(dtype, QUANTIZED[dtype])), np.uint8)
    for at in SCALES[dtype]:
        scale = rng.integers(0, 0x7C00, count, np.uint16)
        scale[:4] = (0, 1, 0x03FF, 0x7BFF)
        scale |= rng.integers(0, 2, count).astype(np.uint16) << 15
        raw[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_blocks(team: cpu.Team, dtype: str) -> None:
    count = 400
    raw = blocks(dtype, count, 1)
    expected = dequantize(raw, GGMLQuantizationType[dtype])
    out = to_f32(team, dtype, raw, count, QUANTIZED[dtype])
    # Equal but for the contraction of multiply and add, where the compiler does that.
    tolerance = 4e-7 * np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(out.astype(np.float64) - expected) <= tolerance).all()


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_come_back(team: cpu.Team, dtype: str) -> None:
    w = np.random.default_rng(2).standard_normal((20, 96), np.float32)
    raw = quantize(w, GGMLQuantizationType[dtype])
    out = to_f32(team, dtype, raw, 20, 96)
    assert np.abs(out - w).max() < (0.02 if dtype == "Q8_0" else 0.4)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_any_column_range(team: cpu.Team, dtype: str) -> None:
    rows, cols = 9, 1024
    raw = blocks(dtype, rows * cols // QUANTIZED[dtype], 3)
    whole = to_f32(team, dtype, raw, rows, cols)
    for start, stop in [
        (0, 1024),
        (1, 1023),
        (255, 257),
        (256, 768),
        (31, 33),
        (5, 5),
        (700, 1024),
        (1023, 1024),
    ]:
        assert (to_f32(team, dtype, raw, rows, cols, start, stop) == whole[:, start:stop]).all()


def test_every_half_widens_exactly(team: cpu.Team) -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    out = to_f32(team, "F16", bits, 256, 256).reshape(-1)
    assert np.array_equal(out, bits.view(np.float16).astype(np.float32), equal_nan=True)
    assert (np.signbit(out) == (bits >> 15 == 1)).all()
    out = to_f32(team, "BF16", bits, 256, 256).reshape(-1)
    assert (out.view(np.uint32) == bits.astype(np.uint32) << 16).all()


def interesting_floats() -> np.ndarray:
    rng = np.random.default_rng(4)
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
    finite = halves[np.isfinite(halves)]
    middle = (finite[:-1] + finite[1:]) / 2  # the ties of f16
    near = [np.nextafter(middle, np.float32(s * np.inf)) for s in (1, -1)]
    ties = (rng.integers(0, 1 << 16, 5000).astype(np.uint32) << 16 | 0x8000).view(np.float32)  # of bf16
    every = rng.integers(0, 1 << 32, 20000, np.uint64).astype(np.uint32).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 1e9, np.inf, -np.inf, np.nan, 0, -0.0, 1e-45], np.float32)
    return np.concatenate([halves, middle, *near, ties, every, edges])


def test_narrowing_rounds_to_nearest_even(team: cpu.Team) -> None:
    x = interesting_floats()
    out = np.empty(x.size, np.uint16)
    cpu.convert(team, "F32", x, 1, x.size, out, "F16")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(out.view(np.float16), expected, equal_nan=True)
    assert (out >> 15 == np.signbit(x)).all()

    cpu.convert(team, "F32", x, 1, x.size, out, "BF16")
    bits = x.view(np.uint32).astype(np.uint64)
    low, up = bits & 0xFFFF, bits >> 16
    rounded = up + ((low > 0x8000) | ((low == 0x8000) & (up % 2 == 1)))
    nan = np.isnan(x)
    assert (out[~nan] == rounded[~nan]).all()
    assert np.isnan((out[nan].astype(np.uint32) << 16).view(np.float32)).all()


def test_convert_places_rows(team: cpu.Team) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.full((6, 2), -1, np.float16)
    cpu.convert(team, "F32", x, 3, 4, out, "F16", 2, col_start=1, col_stop=3)
    assert (out[2:5] == x[:, 1:3]).all() and (out[[0, 1, 5]] == -1).all()
    with pytest.raises(ValueError, match="the destination has 24 bytes where 28 are needed"):
        cpu.convert(team, "F32", x, 3, 4, out, "F16", 4, col_start=1, col_stop=3)
