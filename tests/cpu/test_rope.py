"""Per-head norm, rotation and the write into the paged cache, against float64 and transformers."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from .kv_int8 import blocks_of, quantized
from .one_op import LEVELS, TYPES, narrowed, run, team
from .test_whole_rows import norm_of, rotation

# heads, KV heads, head size, rotary dim, block
SHAPES = [
    (9, 3, 64, 64, 16),
    (4, 4, 80, 32, 32),
    (2, 1, 33, 10, 16),
    (2, 2, 96, 96, 16),
    (3, 1, 128, 128, 16),
    (2, 2, 256, 64, 32),
]


def tables(positions: int, rotary: int) -> np.ndarray:
    """[positions, rotary]: cosines, then sines."""
    angles = np.arange(positions)[:, None] * 10_000.0 ** (-np.arange(0, rotary, 2) / rotary)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def embedded(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """x [tokens, heads, D] with every token's rotary embedding."""
    half = cos_sin.shape[1] // 2
    cos, sin = (part[:, None].astype(np.float64) for part in (cos_sin[:, :half], cos_sin[:, half:]))
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_and_write(level: str, dtype: str, norm: bool, shape: tuple[int, int, int, int, int]) -> None:
    Hq, Hk, D, rotary, block = shape
    rng = np.random.default_rng(D)
    starts, counts = np.array([0, 37, 5]), np.array([20, 1, 33])
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
    token_row, T = np.repeat(np.arange(3), counts), int(counts.sum())
    row_slot = np.array([4, 0, 2])
    blocks = 5 * 4
    table = rng.permutation(blocks).reshape(5, 4)
    qkv = rng.normal(0, 2, (T, Hq + 2 * Hk, D)).astype(np.float32)
    before = qkv.copy()
    cos_sin = tables(64, rotary)
    weights = [rng.normal(1, 0.3, D).astype(np.float32) for _ in "qk"] if norm else [None, None]
    empty = narrowed(np.full((blocks, Hk, block, D), 7.0, np.float32), dtype)
    keys, values = empty.copy(), empty.copy()
    eps = float(np.float32(1e-6))
    run(
        team(level, 2),
        cpu.ROPE_KV,
        [qkv, cos_sin, keys, values, *weights],
        [Hq, Hk, D, rotary, block, TYPES[dtype], 0, 0, keys[0].nbytes],
        [eps],
        num_tokens=T,
        num_seqs=3,
        positions=positions,
        token_row=token_row,
        row_slot=row_slot,
        block_table=table,
    )
    exact = before.astype(np.float64)
    for part, weight in ((slice(0, Hq), weights[0]), (slice(Hq, Hq + Hk), weights[1])):
        x = exact[:, part]
        if weight is not None:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
        exact[:, part] = embedded(x, cos_sin[positions])
    np.testing.assert_allclose(qkv, exact, atol=3e-6, rtol=3e-6)
    np.testing.assert_array_equal(qkv[:, Hq + Hk :], before[:, Hq + Hk :])

    # The cache holds the rounded rows at their places, and nothing else was touched.
    expected_keys, expected_values = empty.copy(), empty.copy()
    for t, position in enumerate(positions):
        b = table[row_slot[token_row[t]], position // block]
        expected_keys[b, :, position % block] = narrowed(qkv[t, Hq : Hq + Hk], dtype)
        expected_values[b, :, position % block] = narrowed(qkv[t, Hq + Hk :], dtype)
    np.testing.assert_array_equal(keys, expected_keys)
    np.testing.assert_array_equal(values, expected_values)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("heads", "D", "block"), [((3, 1), 64, 16), ((4, 2), 80, 32), ((2, 3), 34, 8)], ids=str
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_rows(level: str, heads: tuple[int, int], D: int, block: int, has_bias: bool) -> None:
    (Hq, Hk), T = heads, 29
    rng = np.random.default_rng(D)
    qkv = rng.normal(0, 2, (T, Hq + 2 * Hk, D)).astype(np.float32)
    qkv[3, Hq + Hk], qkv[4, -1, 5], qkv[5, -1, 7] = 0, np.inf, np.nan
    before, cos_sin = qkv.astype(np.float64), tables(T, D)
    bias = rng.normal(0, 40, (Hq + 2 * Hk, D)).astype(np.float32) if has_bias else None
    mean = cos_sin.mean(axis=0)
    blocks = -(-T // block)
    table = rng.permutation(blocks)[None]
    keys, values = np.zeros((2, blocks, cpu.kv_block_bytes("I8", Hk, block, D)), np.uint8)
    run(
        team(level, 2),
        cpu.ROPE_KV,
        [qkv, cos_sin, keys, values, None, None, bias, mean],
        [Hq, Hk, D, D, block, cpu.I8, 0, 0, keys[0].nbytes],
        num_tokens=T,
        num_seqs=1,
        positions=np.arange(T),
        block_table=table,
    )
    exact = embedded(before[:, : Hq + Hk], cos_sin)
    if bias is not None:  # what all keys have in common is left out
        exact[:, Hq:] -= embedded(bias[None, Hq : Hq + Hk].astype(np.float64), mean[None])
    exact = exact @ rotation(D)
    atol = (1e-5 if has_bias else 1e-6) * norm_of(D) ** 0.5
    np.testing.assert_allclose(qkv[:, : Hq + Hk], exact, atol=atol, rtol=3e-6)
    for cache, rows in ((keys, qkv[:, Hq : Hq + Hk]), (values, qkv[:, Hq + Hk :])):
        codes = np.zeros((blocks, Hk, block, D), np.int8)
        scales = np.zeros((blocks, Hk, block), np.float32)
        at = table[0, np.arange(T) // block], slice(None), np.arange(T) % block
        codes[at], scales[at] = quantized(rows)
        expected = blocks_of(codes, scales)
        end = -(-codes[0].size // 64) * 64
        np.testing.assert_array_equal(cache[:, :end], expected[:, :end])
        got, expected = (np.ascontiguousarray(part[:, end:]).view(np.float32) for part in (cache, expected))
        np.testing.assert_array_equal(got, expected)  # a NaN equals a NaN


def test_the_rotation_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(12, 4, 64)).astype(np.float32)  # 2 heads, 1 KV head
    cos_sin = tables(12, 64)
    q, k = (
        torch.from_numpy(qkv[:, part].copy()).transpose(0, 1)[None] for part in (slice(0, 2), slice(2, 3))
    )
    cos, sin = (torch.from_numpy(np.tile(c, 2))[None] for c in (cos_sin[:, :32], cos_sin[:, 32:]))
    q, k = llama.apply_rotary_pos_emb(q, k, cos, sin)
    cache = np.zeros((1, 1, 16, 64), np.float32)
    run(
        team(LEVELS[-1]),
        cpu.ROPE_KV,
        [qkv, cos_sin, cache, cache.copy(), None, None],
        [2, 1, 64, 64, 16, cpu.F32, 0, 0, cache[0].nbytes],
        num_tokens=12,
        num_seqs=1,
        positions=np.arange(12),
    )
    np.testing.assert_allclose(qkv[:, :2], q[0].transpose(0, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(cache[0, 0, :12], k[0, 0].numpy(), atol=1e-6)
