"""How linears end: stored, added to the residual, gated. Against float64, and the same bits for every cut."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS, ROUNDING, TYPES, narrowed, run, team, widened
from .test_quantized import FORMATS, Rows, Weight, quantized

PANEL = 32
STORE, ADD, GATED = range(3)
SOURCES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
ROWS = [1, 2, 7, 12, 13, 31, 97, 130]


def pack(w: np.ndarray, dtype: str) -> tuple[cpu.Buffer, np.ndarray]:
    """The packed weight and the values it stands for."""
    n, k = w.shape
    stored = narrowed(w, dtype)
    packed = cpu.Buffer(cpu.packed_bytes(n, k, SOURCES[dtype]))
    cpu.pack_linear(team(LEVELS[-1]), SOURCES[dtype], stored, n, k, packed, SOURCES[dtype])
    return packed, widened(stored)


def alternating(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of both in panels that alternate; each is padded to whole panels with NaN, never to be seen."""
    half = -(-gate.shape[0] // PANEL) * PANEL
    both = np.full((2, half, *gate.shape[1:]), np.nan, np.float32)
    both[0, : gate.shape[0]], both[1, : up.shape[0]] = gate, up
    panels = both.reshape(2, half // PANEL, PANEL, *gate.shape[1:])
    return np.ascontiguousarray(panels.swapaxes(0, 1).reshape(2 * half, *gate.shape[1:]))


def guarded(m: int, n: int) -> np.ndarray:
    """NaN [m + 1, n]: the last row must stay."""
    return np.full((m + 1, n), np.nan, np.float32)


def multiplied(x: np.ndarray, level: str, dtype: str) -> np.ndarray:
    """What is multiplied, in float64: instructions for bf16 take both sides in it."""
    return widened(narrowed(x, dtype)) if level in ROUNDING and dtype == "bf16" else widened(x)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize(("n", "k"), [(1, 5), (33, 70), (320, 129)])
def test_add(level: str, dtype: str, n: int, k: int) -> None:
    """What is added is what would have been stored."""
    rng = np.random.default_rng([n, k])
    x, w = rng.standard_normal((ROWS[-1], k), np.float32), rng.standard_normal((n, k), np.float32)
    bias, before = rng.standard_normal(n, np.float32), rng.standard_normal((ROWS[-1], n), np.float32)
    packed, values = pack(w, dtype)
    for m in ROWS:
        for b in (None, bias):
            sizes = [n, k, TYPES[dtype], 0, 0, 0]
            stored, added = guarded(m, n), guarded(m, n)
            added[:m] = before[:m]
            run(team(level, 1), cpu.LINEAR, [stored, x, packed.address, b], [*sizes, STORE], num_tokens=m)
            run(team(level, 2), cpu.LINEAR, [added, x, packed.address, b], [*sizes, ADD], num_tokens=m)
            np.testing.assert_array_equal(added[:m], before[:m] + stored[:m])
            assert np.isnan(stored[m]).all() and np.isnan(added[m]).all()
            expected = multiplied(x[:m], level, dtype) @ values.T + (0 if b is None else b)
            np.testing.assert_allclose(stored[:m], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize(("n", "k"), [(1, 5), (32, 64), (70, 33), (576, 100)])
def test_gated(level: str, dtype: str, n: int, k: int) -> None:
    rng = np.random.default_rng([n, k, 1])
    x = rng.standard_normal((ROWS[-1], k), np.float32)
    gate, up = (rng.standard_normal((n, k), np.float32) for _ in range(2))
    biases = rng.standard_normal((2, n), np.float32)
    packed, _ = pack(alternating(gate, up), dtype)
    sizes = [2 * n, k, TYPES[dtype], 0, 0, 0, GATED]
    for b in (np.zeros_like(biases), biases):
        outs = []
        for m in ROWS:
            out = guarded(m, n)
            p = [out, x, packed.address, alternating(*b) if b.any() else None]
            run(team(level, 1 + m % 2), cpu.LINEAR, p, sizes, num_tokens=m)
            assert np.isnan(out[m]).all()
            outs.append(out[:m])
        for out in outs[:-1]:
            np.testing.assert_array_equal(out, outs[-1][: len(out)])
        weights = [widened(narrowed(w, dtype)) for w in (gate, up)]
        g, u = (multiplied(x, level, dtype) @ w.T + c for w, c in zip(weights, b, strict=True))
        np.testing.assert_allclose(outs[-1], g / (1 + np.exp(-g)) * u, rtol=0, atol=5e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_gates_at_their_ends(level: str) -> None:
    """With one input of 1, gates are the weights themselves: exp of them over- and underflows, NaN stays."""
    gate = np.array([-1000.0, 1000.0, -87.5, 88.5, 0.0, -0.0, 1e-30, -20.0, 3.0], np.float32)[:, None]
    up = np.linspace(-2, 2, len(gate), dtype=np.float32)[:, None]
    sizes = [2 * len(gate), 1, TYPES["f32"], 0, 0, 0, GATED]
    out, one = guarded(1, len(gate)), np.ones((1, 1), np.float32)
    packed, _ = pack(alternating(gate, up), "f32")
    run(team(level), cpu.LINEAR, [out, one, packed.address, None], sizes, num_tokens=1)
    g, u = gate[:, 0].astype(np.float64), up[:, 0].astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out[0], g / (1 + np.exp(-g)) * u, rtol=2e-6, atol=1e-30)
    gate[4], up[5] = np.nan, np.inf
    gate[5] = 1.0
    packed, _ = pack(alternating(gate, up), "f32")
    run(team(level), cpu.LINEAR, [out, one, packed.address, None], sizes, num_tokens=1)
    assert np.isnan(out[0, 4]) and np.isinf(out[0, 5])


def product(rows: Rows, values: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """rows @ values.T + bias in float64, and how far float32 may be from it (as in `test_quantized`)."""
    x = rows.values()
    magnitude = np.abs(x) @ np.abs(values).T + np.abs(x).sum(axis=1, keepdims=True) * 3 + np.abs(bias)
    return x @ values.T + bias, 1e-6 * magnitude


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
@pytest.mark.parametrize(("n", "k", "group"), [(1, 5, 32), (33, 170, 64), (320, 129, 128)])
def test_quantized_add(level: str, dtype: str, minimum: bool, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng([n, k])
    weight, bias = Weight(n, k, dtype, group, minimum), rng.standard_normal(n, np.float32)
    rows = quantized(level, rng.standard_normal((ROWS[-1], k), np.float32), group)
    expected, error = product(rows, weight.values, bias)
    before = rng.standard_normal((ROWS[-1], n), np.float32)
    for m in ROWS:
        stored, added = guarded(m, n), guarded(m, n)
        added[:m] = before[:m]
        p = [rows.bytes, weight.bytes, bias]
        run(team(level, 1), cpu.LINEAR, [stored, *p], weight.sizes(STORE), num_tokens=m)
        run(team(level, 3), cpu.LINEAR, [added, *p], weight.sizes(ADD), num_tokens=m)
        np.testing.assert_array_equal(added[:m], before[:m] + stored[:m])
        assert np.isnan(stored[m]).all() and np.isnan(added[m]).all()
        assert (np.abs(stored[:m] - expected[:m]) <= error[:m]).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
@pytest.mark.parametrize(
    ("n", "k", "group", "out_group"), [(1, 5, 32, 64), (70, 33, 64, 32), (200, 130, 128, 128)]
)
def test_quantized_gated(
    level: str, dtype: str, minimum: bool, n: int, k: int, group: int, out_group: int
) -> None:
    """As floats, and as the quantized rows of them, with or without the floats."""
    rng = np.random.default_rng([n, k])
    half = -(-n // PANEL) * PANEL
    weight = Weight(2 * half, k, dtype, group, minimum)
    weight.n = 2 * n
    parts = weight.values.reshape(half // PANEL, 2, PANEL, k).swapaxes(0, 1).reshape(2, half, k)[:, :n]
    biases = rng.standard_normal((2, n), np.float32)
    rows = quantized(level, rng.standard_normal((ROWS[-1], k), np.float32), group)
    (g, g_error), (u, u_error) = (product(rows, w, b) for w, b in zip(parts, biases, strict=True))
    silu = g / (1 + np.exp(-g))
    error = 1.1 * g_error * np.abs(u) + np.abs(silu) * u_error + 1e-6 * np.abs(silu * u) + 1e-6
    for m in ROWS:
        out, alone = guarded(m, n), None
        p = [rows.bytes, weight.bytes, alternating(*biases)]
        run(team(level, 1), cpu.LINEAR, [out, *p], weight.sizes(GATED), num_tokens=m)
        assert np.isnan(out[m]).all() and (np.abs(out[:m] - silu[:m] * u[:m]) <= error[:m]).all()
        for threads, floats in ((2, guarded(m, n)), (3, None)):
            row8 = Rows(m, n, out_group)
            run(
                *(team(level, threads), cpu.LINEAR, [floats, *p, row8.bytes]),
                weight.sizes(GATED, out_group),
                num_tokens=m,
            )
            row8.check(out[:m])
            if floats is not None:
                np.testing.assert_array_equal(floats, out)
            if alone is not None:
                np.testing.assert_array_equal(row8.bytes, alone)
            alone = row8.bytes
