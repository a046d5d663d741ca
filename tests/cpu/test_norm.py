"""RMS norms, embedding and row selection against float64."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from .one_op import LEVELS, TYPES, narrowed, run, team, widened

WIDTHS = [1, 5, 16, 33, 64, 576, 1000]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(level: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.normal(0, 30, (7, width)).astype(np.float32)
    x[3] = 0.0  # eps keeps it finite
    weight = rng.normal(1, 0.3, width).astype(np.float32)
    eps = float(np.float32(1e-5))

    out = np.empty_like(x)
    run(team(level), cpu.RMS_NORM, [out, x, weight], [width], [eps], num_tokens=7)
    np.testing.assert_allclose(out, rms_norm(x, weight, eps), rtol=2e-6, atol=1e-30)

    run(team(level, 2), cpu.RMS_NORM, [x, x, weight], [width], [eps], num_tokens=7)  # in place
    np.testing.assert_array_equal(x, out)


@pytest.mark.parametrize("level", LEVELS)
def test_samples_are_the_rows_where_the_op_says_so(level: str) -> None:
    x = np.ones((5, 8), np.float32)
    out = np.zeros_like(x)
    run(team(level), cpu.RMS_NORM, [out, x, x[0]], [8], [0.0], rows=cpu.SAMPLES, num_tokens=5, num_samples=3)
    assert (out[:3] == 1).all() and (out[3:] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [16, 33, 576])
def test_embedding_of_a_shard(level: str, dtype: str, width: int) -> None:
    rng = np.random.default_rng(width)
    table = narrowed(rng.normal(size=(20, width)).astype(np.float32), dtype)
    ids = np.array([10, 29, 9, 30, 0, 15, 15], np.int32)  # this shard has 10 .. 29
    out = np.full((7, width), 7.0, np.float32)
    run(team(level, 2), cpu.EMBED, [out, table], [width, TYPES[dtype], 10, 20], num_tokens=7, token_ids=ids)
    expected = np.zeros((7, width))
    for row, i in enumerate(ids):
        if 10 <= i < 30:
            expected[row] = widened(table[i - 10])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_select(level: str) -> None:
    x = np.random.default_rng(0).normal(size=(9, 33)).astype(np.float32)
    rows = np.array([8, 0, 4, 4], np.int32)
    out = np.empty((4, 33), np.float32)
    run(
        team(level, 2),
        cpu.SELECT,
        [out, x],
        [33],
        rows=cpu.SAMPLES,
        num_tokens=9,
        num_samples=4,
        sample_rows=rows,
    )
    np.testing.assert_array_equal(out, x[rows])
