"""How linears end: stored, added to the residual, gated. Against float64, and the same bits for every cut."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS, TYPES, narrowed, run, team, widened

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


def rounds_x(level: str, dtype: str) -> bool:
    return level == "avx512bf16" and dtype == "bf16"


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
            expected = x[:m].astype(np.float64) @ values.T + (0 if b is None else b)
            tolerance = 0.1 if rounds_x(level, dtype) else 1e-4
            np.testing.assert_allclose(stored[:m], expected, rtol=0, atol=tolerance)


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
        g, u = (x.astype(np.float64) @ w.T + c for w, c in zip(weights, b, strict=True))
        tolerance = 0.5 if rounds_x(level, dtype) else 5e-4
        np.testing.assert_allclose(outs[-1], g / (1 + np.exp(-g)) * u, rtol=0, atol=tolerance)


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
