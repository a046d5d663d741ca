"""Rounded rows: what operations write for linears of bfloat16, and what these make of them."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS, narrowed, run, team
from .test_gemm import pack

READERS = [level for level in LEVELS if level in ("avx512bf16", "neonbf16")]


def rows_for(m: int, k: int) -> np.ndarray:
    """[m + 1, bytes / 2], of which the last row stays as it is."""
    return np.full((m + 1, cpu.quantized_row_bytes(k, cpu.ROUNDED) // 2), 0xAAAA, np.uint16)


def check(rows: np.ndarray, x: np.ndarray) -> None:
    """Rows of x to nearest even, then a zero where it takes one to fill a pair; nothing behind."""
    m, k = x.shape
    np.testing.assert_array_equal(rows[:m, :k], narrowed(x, "bf16"))
    assert (rows[:m, k : k + k % 2] == 0).all()
    assert (rows[m] == 0xAAAA).all()


def test_bytes_of_a_row() -> None:
    assert [cpu.quantized_row_bytes(k, cpu.ROUNDED) for k in (0, 1, 31, 32, 33, 576)] == [
        *(0, 64, 64, 64, 128, 1152)
    ]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", [1, 5, 33, 64, 576, 2051, 4099])
def test_quantize_norm_and_select(level: str, k: int) -> None:
    m, rng = 5, np.random.default_rng(k)
    x, weight = rng.normal(0, 3, (m, k)).astype(np.float32), rng.normal(1, 0.3, k).astype(np.float32)
    rows = rows_for(m, k)
    run(team(level, 2), cpu.QUANTIZE, [None, x, None, None, rows], [k, 0, 0, cpu.ROUNDED], num_tokens=m)
    check(rows, x)

    out, rows, alone = np.zeros_like(x), rows_for(m, k), rows_for(m, k)
    sizes = [k, 0, 0, cpu.ROUNDED]
    run(team(level, 2), cpu.RMS_NORM, [out, x, weight, None, rows], sizes, [1e-5], num_tokens=m)
    run(team(level), cpu.RMS_NORM, [None, x, weight, None, alone], sizes, [1e-5], num_tokens=m)
    check(rows, out)
    np.testing.assert_array_equal(alone[:, :k], rows[:, :k])

    chosen, rows = [4, 0, 4], rows_for(3, k)
    run(
        *(team(level, 2), cpu.SELECT, [None, x, None, None, rows], sizes),
        rows=cpu.SAMPLES,
        num_tokens=m,
        num_samples=3,
        sample_rows=chosen,
    )
    check(rows, x[chosen])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("m", "inner"), [(1, 33), (7, 96), (130, 100)])
def test_gated(level: str, m: int, inner: int) -> None:
    k, rng = 48, np.random.default_rng(inner)
    halves = -(-inner // cpu.PANEL) * cpu.PANEL
    w = np.zeros((2, halves, k), np.float32)
    w[:, :inner] = rng.normal(0, 0.3, (2, inner, k))
    weight = pack(team(level), w.reshape(2, -1, cpu.PANEL, k).swapaxes(0, 1).reshape(-1, k), "F32")
    x, out, rows = (
        rng.normal(size=(m, k)).astype(np.float32),
        np.zeros((m, inner), np.float32),
        rows_for(m, inner),
    )
    run(
        *(team(level, 2), cpu.LINEAR, [out, x, weight.address, None, rows]),
        [2 * inner, k, cpu.F32, cpu.ROUNDED, 0, 0, 2],
        num_tokens=m,
    )
    gate, up = (x.astype(np.float64) @ half[:inner].T for half in w)
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-5)
    check(rows, out)


@pytest.mark.parametrize("level", LEVELS)
def test_attention(level: str) -> None:
    """Of one token, which sees itself: its value, for every query head."""
    Hq, Hk, D, block = 6, 2, 80, 16
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(1, (Hq + 2 * Hk) * D)).astype(np.float32)
    keys, values = np.zeros((2, 1, Hk, block, D), np.float32)
    values[0, :, 0] = rng.normal(size=(Hk, D))
    out, rows = np.zeros((1, Hq * D), np.float32), rows_for(1, Hq * D)
    run(
        *(team(level, 2), cpu.ATTENTION, [out, qkv, keys, values, rows]),
        [Hq, Hk, D, cpu.ROUNDED, block, cpu.F32, 0, 0, keys[0].nbytes],
        [D**-0.5],
        num_tokens=1,
        num_seqs=1,
        query_start=[0, 1],
        context_len=[1],
    )
    np.testing.assert_allclose(out[0].reshape(Hk, -1, D), values[0, :, :1].repeat(Hq // Hk, 1), rtol=1e-6)
    check(rows, out)


@pytest.mark.skipif(not READERS, reason="no products of bfloat16 on this machine")
@pytest.mark.parametrize("m", [1, 2, 11, 12, 13, 64, 97, 130])
@pytest.mark.parametrize(("n", "k"), [(33, 1), (70, 33), (96, 576), (64, 1600)])
def test_linears_of_rounded_rows_are_those_of_the_values_before(m: int, n: int, k: int) -> None:
    """These round x in the same way; test_gemm compares them with float64."""
    rng = np.random.default_rng(m * n + k)
    x, w = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(n, k)).astype(np.float32)
    rows = rows_for(m, k)
    rows[:m, :k] = narrowed(x, "bf16")
    rows[:m, k:] = 0
    for level in READERS:
        weight = pack(team(level), w, "BF16")
        expected, got = np.zeros((2, m, n), np.float32)
        run(team(level, 2), cpu.LINEAR, [expected, x, weight.address, None], [n, k, cpu.BF16], num_tokens=m)
        sizes = [n, k, cpu.BF16, 0, 0, 0, 0, 1]
        run(team(level, 2), cpu.LINEAR, [got, rows, weight.address, None], sizes, num_tokens=m)
        np.testing.assert_array_equal(got, expected)
