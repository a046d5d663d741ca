"""8-bit rows that are rotated and have one scale each, against float64, on every instruction-set level."""

from functools import cache

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from asyncengine._fast import cpu

from .one_op import LEVELS, run, team
from .one_op import quantized_linear as linear

PANEL, WHOLE = cpu.PANEL, cpu.WHOLE
WIDTHS = [1, 2, 5, 31, 32, 48, 67, 100, 128, 268, 576, 896, 1536, 2310, 3721, 4100]
"""Powers of two, many odd factors, and 67, which is too great a prime to be one."""


# ---- the definitions of rotate.h and quantized.h ----


@cache
def rotation(k: int) -> np.ndarray:
    """R [k, k], times a scalar orthogonal."""
    product, rest = np.ones((1, 1)), k
    for factor in range(2, 62):
        while rest % factor == 0:
            angle = 2 * np.pi * np.outer(range(factor), range(factor)) / factor
            product, rest = np.kron(np.cos(angle) + np.sin(angle), product), rest // factor
    return np.kron(np.eye(rest), product)


def norm_of(k: int) -> float:
    return float(np.square(rotation(k)[0]).sum())


def padded(k: int) -> int:
    return -(-k // 32) * 32


class Rows:
    """Quantized rows taken apart: codes [rows, padded K], scales and sums [rows]."""

    def __init__(self, rows: int, k: int) -> None:
        self.k = k
        self.bytes = np.full((rows + 1, cpu.quantized_row_bytes(k, WHOLE)), 0xAA, np.uint8)

    @property
    def codes(self) -> np.ndarray:
        return self.bytes[:-1, : padded(self.k)].view(np.int8).astype(np.int64)

    def _word(self, index: int, dtype: type) -> np.ndarray:
        at = padded(self.k) + 4 * index
        return np.ascontiguousarray(self.bytes[:-1, at : at + 4]).view(dtype)[:, 0]

    @property
    def scale(self) -> np.ndarray:
        return self._word(0, np.float32)

    def check(self, x: np.ndarray) -> None:
        """These are the rows of x, and nothing was written behind them."""
        finite = np.isfinite(x).all(axis=1)
        assert np.isnan(self.scale[~finite]).all() and (self.codes[~finite] == 0).all()
        assert (self.codes.sum(axis=1) == self._word(1, np.int32)).all()
        assert (self.codes[:, self.k :] == 0).all() and (self.bytes[-1] == 0xAA).all()
        rotated = x[finite].astype(np.float64) @ rotation(self.k)
        scale, codes = self.scale[finite, None].astype(np.float64), self.codes[finite, : self.k]
        np.testing.assert_allclose(scale[:, 0], np.abs(rotated).max(axis=1) / 127, rtol=1e-5)
        assert (np.abs(codes * scale - rotated) <= 0.502 * scale).all()


def quantized(level: str, x: np.ndarray, threads: int = 1) -> Rows:
    rows = Rows(len(x), x.shape[1])
    p = [None, x, None, None, rows.bytes]
    run(team(level, threads), cpu.QUANTIZE, p, [x.shape[1], 0, 0, WHOLE], num_tokens=len(x))
    return rows


class Weight:
    """Random codes and scales, laid out by the definition."""

    def __init__(self, n: int, k: int) -> None:
        rng = np.random.default_rng([n, k])
        self.n, self.k, panels = n, k, -(-n // PANEL)
        self.codes = rng.integers(0, 256, (panels, PANEL, padded(k)), np.uint8)
        self.d = (rng.standard_normal((panels, PANEL)) * 0.01).astype(np.float32)
        codes = self.codes.reshape(panels, PANEL, -1, 4).swapaxes(1, 2).reshape(panels, -1)
        self.bytes = np.concatenate([self.d.view(np.uint8), codes], axis=1)
        assert self.bytes.nbytes == cpu.packed_bytes(n, k, "Q8", WHOLE)

    def sizes(self, mode: int = 0) -> list[int]:
        return [self.n, self.k, cpu.Q8, 0, WHOLE, 0, mode]

    def times(self, rows: Rows) -> np.ndarray:
        """The product, to the bit."""
        codes = self.codes.reshape(-1, self.codes.shape[2])[: self.n].astype(np.int64) - 128
        sums = (rows.codes @ codes.T).astype(np.float32)
        return sums * (self.d.reshape(-1)[: self.n] * rows.scale[:, None])


# ---- rows ----


@pytest.mark.parametrize("k", [k for k in WIDTHS if k < 1000])
def test_the_rotation_is_its_own_inverse(k: int) -> None:
    product = rotation(k) @ rotation(k)
    np.testing.assert_allclose(product, norm_of(k) * np.eye(k), atol=1e-9 * k)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", WIDTHS)
def test_quantize(level: str, k: int) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((9, k)) * 10.0 ** rng.integers(-20, 20, (9, 1))).astype(np.float32)
    x[1] = x[2] = 0
    x[3, 0], x[4, -1], x[5, k // 2] = np.nan, np.inf, -np.inf
    x[6, rng.integers(k)] = -np.abs(x[6]).max() * 1000
    for row in x:
        quantized(level, row[None].copy()).check(row[None])
    rows = quantized(level, x, threads=2)
    alone = [quantized(level, row[None].copy()).bytes[0] for row in x]
    np.testing.assert_array_equal(rows.bytes[:-1], alone)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("width", [33, 576, 1200])
def test_norms_and_selection_write_whole_rows(level: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x, weight = rng.standard_normal((5, width), np.float32), rng.standard_normal(width, np.float32)
    plain, both = np.empty_like(x), np.empty_like(x)
    run(team(level), cpu.RMS_NORM, [plain, x, weight], [width], [1e-5], num_tokens=5)
    for out in (both, None):
        rows = Rows(5, width)
        p = [out, x, weight, None, rows.bytes]
        run(team(level, 2), cpu.RMS_NORM, p, [width, 0, 0, WHOLE], [1e-5], num_tokens=5)
        np.testing.assert_array_equal(rows.bytes, quantized(level, plain).bytes)
    np.testing.assert_array_equal(both, plain)

    chosen = np.array([4, 1], np.int32)
    for out in (np.empty((2, width), np.float32), None):
        rows = Rows(2, width)
        fields = dict(rows=cpu.SAMPLES, num_tokens=5, num_samples=2, sample_rows=chosen)
        run(team(level, 2), cpu.SELECT, [out, x, None, None, rows.bytes], [width, 0, 0, WHOLE], **fields)
        np.testing.assert_array_equal(rows.bytes, quantized(level, x[chosen]).bytes)
        assert out is None or (out == x[chosen]).all()


# ---- products ----

SHAPES = [(1, 1, 1), (2, 33, 70), (1, 300, 576), (3, 64, 384), (6, 31, 129), (7, 160, 577), (12, 96, 64)]
SHAPES += [(13, 65, 2051), (50, 70, 1100), (97, 70, 400), (98, 161, 96), (130, 40, 833), (300, 130, 100)]
SHAPES += [(4, 40, 70000)]


@pytest.mark.parametrize("level", LEVELS)
def test_products_are_exact(level: str) -> None:
    for m, n, k in SHAPES:
        weight = Weight(n, k)
        x = np.random.default_rng([m, k]).standard_normal((m, k), np.float32)
        rows = quantized(level, x)
        for threads in (1, 2):
            np.testing.assert_array_equal(linear(level, rows, weight, m, threads), weight.times(rows))


@pytest.mark.parametrize("level", LEVELS)
def test_every_batch(level: str) -> None:
    n, k = 200, 333
    weight = Weight(n, k)
    rows = quantized(level, np.random.default_rng(5).standard_normal((130, k), np.float32))
    expected = weight.times(rows)
    for m in range(1, 131):
        np.testing.assert_array_equal(linear(level, rows, weight, m, threads=1 + m % 4), expected[:m])


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_sums(level: str) -> None:
    """All codes at an end of their range, in the widest row there is."""
    k = cpu.MOST_WHOLE
    rows = Rows(1, k)
    weight = Weight(32, k)
    for code, q in ((0, 127), (0, -127), (255, 127), (255, -127)):
        weight.codes[:] = weight.bytes[:, 4 * PANEL :] = code
        rows.bytes[:, :k] = np.uint8(q % 256)
        rows.bytes[:, k : k + 4].view(np.float32)[:] = 1e-4
        rows.bytes[:, k + 4 : k + 8].view(np.int32)[:] = k * q
        np.testing.assert_array_equal(linear(level, rows, weight, 1), weight.times(rows))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [5, 100])
def test_endings(level: str, m: int) -> None:
    """A bias; a sum with what is there; silu(gate) * up of panels in turns."""
    n, k = 70, 96
    rng = np.random.default_rng(m)
    rows = quantized(level, rng.standard_normal((m, k), np.float32))
    weight, bias = Weight(n, k), rng.standard_normal(n, np.float32)
    before = rng.standard_normal((m, n), np.float32)
    out = before.copy()
    run(team(level, 2), cpu.LINEAR, [out, rows.bytes, weight.bytes, bias], weight.sizes(1), num_tokens=m)
    np.testing.assert_array_equal(out, before + (weight.times(rows) + bias))

    pair = Weight(4 * PANEL, k)
    out = np.empty((m, 2 * PANEL), np.float32)
    p = [out, rows.bytes, pair.bytes, None]
    run(team(level, 2), cpu.LINEAR, p, pair.sizes(2), num_tokens=m)
    parts = pair.times(rows).astype(np.float64).reshape(m, 2, 2, PANEL)
    gate, up = parts[:, :, 0].reshape(m, -1), parts[:, :, 1].reshape(m, -1)
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_nonfinite_values_stay_in_their_row_and_column(level: str) -> None:
    weight = Weight(40, 100)
    weight.bytes[1, 4 * 3 : 4 * 4].view(np.float32)[:] = np.nan  # d of output 35
    for m in (5, 14, 97):
        x = np.ones((m, 100), np.float32)
        x[3, 99] = np.inf
        out = linear(level, quantized(level, x), weight, m)
        assert np.isnan(out[:, 35]).all() and np.isnan(out[3]).all()
        assert np.isfinite(np.delete(np.delete(out, 3, 0), 35, 1)).all()


@pytest.mark.parametrize("level", LEVELS)
def test_outliers_cost_little(level: str) -> None:
    """One input is a hundred times the others: that is what the rotation is for."""
    rng = np.random.default_rng(7)
    for k in (576, 1536, 4864):
        w, x = rng.standard_normal((64, k), np.float32), rng.standard_normal((20, k), np.float32)
        x[:, 7] *= 100
        w[:, 7] /= 100  # as models have it: outliers do not dominate what comes of them
        packed = cpu.Buffer(cpu.packed_bytes(64, k, "Q8", WHOLE))
        cpu.pack_linear(team(level, 2), "F32", w, 64, k, packed, "Q8", group=WHOLE)
        out = np.empty((20, 64), np.float32)
        sizes = [64, k, cpu.Q8, 0, WHOLE, 0, 0]
        p = [out, quantized(level, x).bytes, packed.address, None]
        run(team(level), cpu.LINEAR, p, sizes, num_tokens=20)
        expected = x.astype(np.float64) @ w.T.astype(np.float64)
        step = np.abs(x).max(axis=1, keepdims=True) / 127
        plain = np.round(x / step) * step @ w.T
        assert np.square(out - expected).mean() < 0.1 * np.square(plain - expected).mean()


# ---- packing ----


def unpacked(level: str, packed: cpu.Buffer | np.ndarray, n: int, k: int, ids: np.ndarray) -> np.ndarray:
    """Rows of a packed weight, as an embedding reads them."""
    out = np.empty((len(ids), k), np.float32)
    address = packed.ctypes.data if isinstance(packed, np.ndarray) else packed.address
    sizes = [k, cpu.Q8, 0, n, 1, WHOLE, 0]
    run(team(level, 2), cpu.EMBED, [out, address], sizes, num_tokens=len(ids), token_ids=ids)
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", [1, 67, 333, 576])
def test_embedding_from_panels(level: str, k: int) -> None:
    weight = Weight(70, k)
    values = (weight.codes[..., :k].astype(np.float64) - 128) * weight.d[..., None]
    expected = values.reshape(-1, k)[:70] @ rotation(k)
    out = unpacked(level, weight.bytes, 70, k, np.array([0, 69, 45, -1, 70], np.int32))
    np.testing.assert_allclose(out[:3], expected[[0, 69, 45]], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert (out[3:] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("src", ["F32", "Q4_1", "Q6_K"])
def test_packing(level: str, src: str) -> None:
    """Slices of columns, rows behind others, and the panels of two parts in turns."""
    rng = np.random.default_rng(6)
    w = (rng.standard_normal((2, 75, 512)) * 10.0 ** rng.uniform(-3, 3, (2, 75, 1))).astype(np.float32)
    raw = w
    if src == "Q6_K":  # which the reference cannot make
        raw = rng.integers(0, 256, (2, 75, cpu.source_bytes(src, 512)), np.uint8)
        scales = rng.uniform(0.001, 0.01, (2, 75, 2, 1)).astype(np.float16).view(np.uint8)
        raw.reshape(2, 75, 2, -1)[..., -2:] = scales
    elif src != "F32":
        raw = quantize(w, GGMLQuantizationType[src])
    if src != "F32":
        w = dequantize(raw, GGMLQuantizationType[src])
    t, start, stop = team(level, 2), 32, 390
    k, panels = stop - start, 3
    packed = cpu.Buffer(cpu.packed_bytes(2 * panels * PANEL, k, "Q8", WHOLE))
    for part in range(2):
        for first, last in ((0, 41), (41, 75)):
            place = dict(col_start=start, col_stop=stop, panel_stride=2, panel_offset=part, group=WHOLE)
            source = np.ascontiguousarray(raw[part, first:last])
            cpu.pack_linear(t, src, source, last - first, 512, packed, "Q8", first, **place)
    out = unpacked(level, packed, 2 * panels * PANEL, k, np.arange(2 * panels * PANEL, dtype=np.int32))
    halves = out.reshape(panels, 2, PANEL, k).swapaxes(0, 1).reshape(2, panels * PANEL, k)[:, :75]
    taken = w[:, :, start:stop].astype(np.float64)
    step = np.abs(taken @ rotation(k)).max(axis=2) / 127
    # Half a step at most of every rotated value, and rotations keep lengths.
    error = np.sqrt(np.square(halves - taken).sum(axis=2) * norm_of(k))
    assert (error <= 0.51 * step * np.sqrt(k)).all()
    # Errors of rounding are even: a twelfth of a step in the square.
    assert np.sqrt(np.mean(np.square(error / step) / k)) < 1.1 / np.sqrt(12)


@pytest.mark.parametrize("level", LEVELS)
def test_uniform_and_nonfinite_weights(level: str) -> None:
    w = np.zeros((5, 64), np.float32)
    w[1], w[2, 40], w[3, 0], w[4] = -0.5, np.nan, -np.inf, 1e-30
    packed = cpu.Buffer(cpu.packed_bytes(5, 64, "Q8", WHOLE))
    cpu.pack_linear(team(level), "F32", w, 5, 64, packed, "Q8", group=WHOLE)
    out = unpacked(level, packed, 5, 64, np.arange(5, dtype=np.int32))
    np.testing.assert_allclose(out[[0, 1, 4]], w[[0, 1, 4]], rtol=1e-6)
    assert np.isnan(out[2:4]).all()


def test_wrong_arguments_are_refused() -> None:
    most = cpu.MOST_WHOLE
    with pytest.raises(ValueError, match="WHOLE rows are Q8 without minima"):
        cpu.packed_bytes(4, 4, "Q4", WHOLE)
    with pytest.raises(ValueError, match="WHOLE rows are Q8 without minima"):
        cpu.packed_bytes(4, 4, "Q8", WHOLE, True)
    with pytest.raises(ValueError, match=f"at most {most} columns, got {most + 1}"):
        cpu.quantized_row_bytes(most + 1, WHOLE)
    with pytest.raises(ValueError, match="BF16 weights have no groups"):
        cpu.packed_bytes(4, 4, "BF16", WHOLE)
