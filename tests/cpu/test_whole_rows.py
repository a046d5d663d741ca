"""Rows that are rotated and have one scale each, against float64, on every instruction-set level."""

from functools import cache

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from asyncengine._fast import cpu

from .one_op import LEVELS, run, team
from .one_op import quantized_linear as linear

PANEL, WHOLE = cpu.PANEL, cpu.WHOLE
CODES = {"Q8": cpu.Q8, "Q4": cpu.Q4, "Q16": cpu.Q16}
HIGH = 254
"""What the high part of 16 bits is worth."""
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
    norm = float(np.square(rotation(k)[0]).sum())
    assert cpu.rotation_norm(k) == round(norm)
    return norm


def padded(k: int) -> int:
    return -(-k // 32) * 32


def group_of(dtype: str) -> int:
    return cpu.WHOLE16 if dtype == "Q16" else WHOLE


class Rows:
    """Quantized rows taken apart: codes [rows, padded K], scales and sums [rows]; Q16 has two parts."""

    def __init__(self, rows: int, k: int, dtype: str = "Q8") -> None:
        self.k, self.parts = k, 2 if dtype == "Q16" else 1
        self.most = 127 * HIGH + 126 if dtype == "Q16" else 127
        self.bytes = np.full((rows + 1, cpu.quantized_row_bytes(k, group_of(dtype))), 0xAA, np.uint8)

    def codes(self, part: int = 0) -> np.ndarray:
        start = part * padded(self.k)
        return self.bytes[:-1, start : start + padded(self.k)].view(np.int8).astype(np.int64)

    def values(self) -> np.ndarray:
        return self.codes() if self.parts == 1 else HIGH * self.codes(0) + self.codes(1)

    def word(self, index: int, dtype: type) -> np.ndarray:
        at = self.parts * padded(self.k) + 4 * index
        return np.ascontiguousarray(self.bytes[:-1, at : at + 4]).view(dtype)[:, 0]

    @property
    def scale(self) -> np.ndarray:
        return self.word(0, np.float32)

    def check(self, x: np.ndarray) -> None:
        """These are the rows of x, and nothing was written behind them."""
        finite = np.isfinite(x).all(axis=1)
        assert np.isnan(self.scale[~finite]).all() and (self.values()[~finite] == 0).all()
        for part in range(self.parts):
            assert (self.codes(part).sum(axis=1) == self.word(1 + part, np.int32)).all()
            assert (self.codes(part)[:, self.k :] == 0).all() and (np.abs(self.codes(part)) <= 127).all()
        assert (self.bytes[-1] == 0xAA).all()
        rotated = x[finite].astype(np.float64) @ rotation(self.k)
        scale, values = self.scale[finite, None].astype(np.float64), self.values()[finite, : self.k]
        np.testing.assert_allclose(scale[:, 0], np.abs(rotated).max(axis=1) / self.most, rtol=1e-5)
        # Half a code, and the rotation's own rounding.
        assert (np.abs(values * scale - rotated) <= (0.5 + 2e-5 * self.most) * scale).all()


def quantized(level: str, x: np.ndarray, dtype: str = "Q8", threads: int = 1) -> Rows:
    rows = Rows(len(x), x.shape[1], dtype)
    p = [None, x, None, None, rows.bytes]
    run(team(level, threads), cpu.QUANTIZE, p, [x.shape[1], 0, 0, group_of(dtype)], num_tokens=len(x))
    return rows


class Weight:
    """Random codes and scales, laid out by the definition."""

    def __init__(self, n: int, k: int, dtype: str = "Q8") -> None:
        rng = np.random.default_rng([n, k])
        self.n, self.k, self.dtype, panels = n, k, dtype, -(-n // PANEL)
        self.d = (rng.standard_normal((panels, PANEL)) * 0.01).astype(np.float32)
        if dtype == "Q4":
            step = rng.integers(1, 16, (panels, PANEL, padded(k) // 32, 1), np.uint8)
            least = rng.integers(0, 256 - 15 * step.astype(int)).astype(np.uint8)
            nibbles = rng.integers(0, 16, (panels, PANEL, padded(k) // 32, 32), np.uint8)
            self.codes = [(least + step * nibbles).reshape(panels, PANEL, padded(k))]
            fours = nibbles.reshape(*nibbles.shape[:3], 4, 2, 4)
            both = np.ascontiguousarray((fours[..., 0, :] | fours[..., 1, :] << 4).transpose(0, 2, 3, 1, 4))
            steps = np.concatenate([least, step], axis=-1).swapaxes(1, 2)
            groups = [part.reshape(panels, padded(k) // 32, -1) for part in (steps, both)]
            packed = np.concatenate(groups, axis=2)
        else:
            shape = (panels, PANEL, padded(k))
            first, parts = (1, 2) if dtype == "Q16" else (0, 1)
            self.codes = [rng.integers(first, 256, shape, np.uint8) for _ in range(parts)]
            fours = [part.reshape(panels, PANEL, -1, 4).swapaxes(1, 2) for part in self.codes]
            packed = np.stack(fours, axis=2)
        self.bytes = np.concatenate([self.d.view(np.uint8), packed.reshape(panels, -1)], axis=1)
        assert self.bytes.nbytes == cpu.packed_bytes(n, k, dtype, group_of(dtype))

    def sizes(self, mode: int = 0) -> list[int]:
        return [self.n, self.k, CODES[self.dtype], 0, group_of(self.dtype), 0, mode]

    def part(self, index: int = 0) -> np.ndarray:
        return self.codes[index].reshape(-1, padded(self.k))[: self.n].astype(np.int64) - 128

    def values(self) -> np.ndarray:
        return HIGH * self.part(0) + self.part(1) if self.dtype == "Q16" else self.part()

    def check(self, out: np.ndarray, rows: Rows) -> None:
        """This is the product: to the bit, or for pairs but for roundings and low times low parts."""
        d, scale = self.d.reshape(-1)[: self.n], rows.scale[:, None]
        sums = rows.codes() @ self.part().T
        if self.dtype != "Q16":
            np.testing.assert_array_equal(out, sums.astype(np.float32) * (d * scale))
            return
        unit = np.abs(d.astype(np.float64) * scale)
        mixed = rows.codes(1) @ self.part(0).T + rows.codes(0) @ self.part(1).T
        rounding = 4 * np.finfo(np.float32).eps * HIGH * (HIGH * np.abs(sums) + np.abs(mixed)) * unit
        expected = HIGH * (HIGH * sums + mixed) * (d.astype(np.float64) * scale)
        assert (np.abs(out - expected) <= rounding).all()
        exact = (rows.values() @ self.values().T) * (d.astype(np.float64) * scale)
        low = np.abs(rows.codes(1) @ self.part(1).T) * unit
        assert (np.abs(out - exact) <= low + rounding).all()


# ---- rows ----


@pytest.mark.parametrize("k", [k for k in WIDTHS if k < 1000])
def test_the_rotation_is_its_own_inverse(k: int) -> None:
    product = rotation(k) @ rotation(k)
    np.testing.assert_allclose(product, norm_of(k) * np.eye(k), atol=1e-9 * k)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["Q8", "Q16"])
@pytest.mark.parametrize("k", WIDTHS)
def test_quantize(level: str, dtype: str, k: int) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((9, k)) * 10.0 ** rng.integers(-20, 20, (9, 1))).astype(np.float32)
    x[1] = x[2] = 0
    x[3, 0], x[4, -1], x[5, k // 2] = np.nan, np.inf, -np.inf
    x[6, rng.integers(k)] = -np.abs(x[6]).max() * 1000
    for row in x:
        quantized(level, row[None].copy(), dtype).check(row[None])
    rows = quantized(level, x, dtype, threads=2)
    alone = [quantized(level, row[None].copy(), dtype).bytes[0] for row in x]
    np.testing.assert_array_equal(rows.bytes[:-1], alone)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["Q8", "Q16"])
@pytest.mark.parametrize("width", [33, 576, 1200])
def test_norms_and_selection_write_whole_rows(level: str, dtype: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x, weight = rng.standard_normal((5, width), np.float32), rng.standard_normal(width, np.float32)
    plain, both = np.empty_like(x), np.empty_like(x)
    run(team(level), cpu.RMS_NORM, [plain, x, weight], [width], [1e-5], num_tokens=5)
    sizes = [width, 0, 0, group_of(dtype)]
    for out in (both, None):
        rows = Rows(5, width, dtype)
        p = [out, x, weight, None, rows.bytes]
        run(team(level, 2), cpu.RMS_NORM, p, sizes, [1e-5], num_tokens=5)
        np.testing.assert_array_equal(rows.bytes, quantized(level, plain, dtype).bytes)
    np.testing.assert_array_equal(both, plain)

    chosen = np.array([4, 1], np.int32)
    for out in (np.empty((2, width), np.float32), None):
        rows = Rows(2, width, dtype)
        fields = dict(rows=cpu.SAMPLES, num_tokens=5, num_samples=2, sample_rows=chosen)
        run(team(level, 2), cpu.SELECT, [out, x, None, None, rows.bytes], sizes, **fields)
        np.testing.assert_array_equal(rows.bytes, quantized(level, x[chosen], dtype).bytes)
        assert out is None or (out == x[chosen]).all()


# ---- products ----

SHAPES = [(1, 1, 1), (2, 33, 70), (1, 300, 576), (3, 64, 384), (6, 31, 129), (7, 160, 577), (12, 96, 64)]
SHAPES += [(13, 65, 2051), (50, 70, 1100), (97, 70, 400), (98, 161, 96), (130, 40, 833), (300, 130, 100)]
SHAPES += [(4, 40, 60000)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
def test_products_are_exact(level: str, dtype: str) -> None:
    for m, n, k in SHAPES:
        weight = Weight(n, k, dtype)
        x = np.random.default_rng([m, k]).standard_normal((m, k), np.float32)
        rows = quantized(level, x, dtype)
        for threads in (1, 2):
            weight.check(linear(level, rows, weight, m, threads), rows)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
def test_every_batch(level: str, dtype: str) -> None:
    n, k = 200, 333
    weight = Weight(n, k, dtype)
    rows = quantized(level, np.random.default_rng(5).standard_normal((130, k), np.float32), dtype)
    expected = linear(level, rows, weight, 130)
    weight.check(expected, rows)
    for m in range(1, 131):
        np.testing.assert_array_equal(linear(level, rows, weight, m, threads=1 + m % 4), expected[:m])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
def test_the_largest_sums(level: str, dtype: str) -> None:
    """All codes at an end of their range, in the widest row there is."""
    k = cpu.MOST_WHOLE16 if dtype == "Q16" else cpu.MOST_WHOLE
    rows = Rows(1, k, dtype)
    weight = Weight(32, k, dtype)
    for code, q in ((0, 127), (0, -127), (255, 127), (255, -127)):
        code = max(code, 1) if dtype == "Q16" else code
        for part in weight.codes:
            part[:] = code
        panel = weight.bytes[:, 4 * PANEL :]
        if dtype == "Q4":  # 15 steps of 15 from 30 on, or none from 0
            panel = panel.reshape(-1, 576)
            panel[:, 0:64:2], panel[:, 1:64:2], panel[:, 64:] = (30, 15, 255) if code else (0, 15, 0)
        else:
            panel[:] = code
        end = rows.parts * k
        rows.bytes[:, :end] = np.uint8(q % 256)
        rows.bytes[:, end : end + 4].view(np.float32)[:] = 1e-4
        rows.bytes[:, end + 4 : end + 4 + 4 * rows.parts].view(np.int32)[:] = k * q
        weight.check(linear(level, rows, weight, 1), rows)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("m", [5, 100])
def test_endings(level: str, dtype: str, m: int) -> None:
    """A bias; a sum with what is there; silu(gate) * up of panels in turns."""
    n, k = 70, 96
    rng = np.random.default_rng(m)
    rows = quantized(level, rng.standard_normal((m, k), np.float32), dtype)
    weight, bias = Weight(n, k, dtype), rng.standard_normal(n, np.float32)
    before = rng.standard_normal((m, n), np.float32)
    out = before.copy()
    run(team(level, 2), cpu.LINEAR, [out, rows.bytes, weight.bytes, bias], weight.sizes(1), num_tokens=m)
    product = linear(level, rows, weight, m)
    weight.check(product, rows)
    np.testing.assert_array_equal(out, before + (product + bias))

    pair = Weight(4 * PANEL, k, dtype)
    out = np.empty((m, 2 * PANEL), np.float32)
    p = [out, rows.bytes, pair.bytes, None]
    run(team(level, 2), cpu.LINEAR, p, pair.sizes(2), num_tokens=m)
    product = linear(level, rows, pair, m)
    pair.check(product, rows)
    parts = product.astype(np.float64).reshape(m, 2, 2, PANEL)
    gate, up = parts[:, :, 0].reshape(m, -1), parts[:, :, 1].reshape(m, -1)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
def test_nonfinite_values_stay_in_their_row_and_column(level: str, dtype: str) -> None:
    weight = Weight(40, 100, dtype)
    weight.bytes[1, 4 * 3 : 4 * 4].view(np.float32)[:] = np.nan  # d of output 35
    for m in (5, 14, 97):
        x = np.ones((m, 100), np.float32)
        x[3, 99] = np.inf
        out = linear(level, quantized(level, x, dtype), weight, m)
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


def unpacked(
    level: str, packed: cpu.Buffer | np.ndarray, dtype: str, n: int, k: int, ids: np.ndarray
) -> np.ndarray:
    """Rows of a packed weight, as an embedding reads them."""
    out = np.empty((len(ids), k), np.float32)
    address = packed.ctypes.data if isinstance(packed, np.ndarray) else packed.address
    sizes = [k, CODES[dtype], 0, n, 1, group_of(dtype), 0]
    run(team(level, 2), cpu.EMBED, [out, address], sizes, num_tokens=len(ids), token_ids=ids)
    return out


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("k", [1, 67, 333, 576])
def test_embedding_from_panels(level: str, dtype: str, k: int) -> None:
    weight = Weight(70, k, dtype)
    expected = weight.values()[:, :k] * weight.d.reshape(-1)[:70, None].astype(np.float64) @ rotation(k)
    out = unpacked(level, weight.bytes, dtype, 70, k, np.array([0, 69, 45, -1, 70], np.int32))
    np.testing.assert_allclose(out[:3], expected[[0, 69, 45]], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert (out[3:] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("src", ["F32", "Q4_1", "Q6_K"])
def test_packing(level: str, dtype: str, src: str) -> None:
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
    group = group_of(dtype)
    packed = cpu.Buffer(cpu.packed_bytes(2 * panels * PANEL, k, dtype, group))
    for part in range(2):
        for first, last in ((0, 41), (41, 75)):
            place = dict(col_start=start, col_stop=stop, panel_stride=2, panel_offset=part, group=group)
            source = np.ascontiguousarray(raw[part, first:last])
            cpu.pack_linear(t, src, source, last - first, 512, packed, dtype, first, **place)
    out = unpacked(level, packed, dtype, 2 * panels * PANEL, k, np.arange(2 * panels * PANEL, dtype=np.int32))
    halves = out.reshape(panels, 2, PANEL, k).swapaxes(0, 1).reshape(2, panels * PANEL, k)[:, :75]
    taken = w[:, :, start:stop].astype(np.float64)
    rotated = taken @ rotation(k)
    # Rotations keep lengths: what an error of one packed value is on the average.
    error = np.sqrt(np.square(halves - taken).sum(axis=2) * norm_of(k) / k)
    if dtype == "Q4":
        in_groups = np.sqrt(np.square(rounded_in_groups(rotated) - rotated).mean(axis=2))
        assert (error <= 1.05 * in_groups).all()
    else:
        step = np.abs(rotated).max(axis=2) / Rows(1, 1, dtype).most
        assert (error <= 0.51 * step).all()
        # Errors of rounding are even: a twelfth of a step in the square.
        assert np.sqrt(np.mean(np.square(error / step))) < 1.1 / np.sqrt(12)


def rounded_in_groups(values: np.ndarray) -> np.ndarray:
    """Rows [..., k] in groups of 32, each with 16 codes from its least value to its largest, at steps that
    are not rounded."""
    k = values.shape[-1]
    groups = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -k % 32)], mode="edge")
    groups = groups.reshape(*values.shape[:-1], -1, 32)
    least = groups.min(axis=-1, keepdims=True)
    step = np.maximum(groups.max(axis=-1, keepdims=True) - least, 1e-30) / 15
    rounded = np.round((groups - least) / step) * step + least
    return rounded.reshape(*values.shape[:-1], -1)[..., :k]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
def test_uniform_and_nonfinite_weights(level: str, dtype: str) -> None:
    w = np.zeros((6, 64), np.float32)
    w[1], w[2, 40], w[3, 0], w[4], w[5] = -0.5, np.nan, -np.inf, 1e-30, 3e38
    packed = cpu.Buffer(cpu.packed_bytes(6, 64, dtype, group_of(dtype)))
    cpu.pack_linear(team(level), "F32", w, 6, 64, packed, dtype, group=group_of(dtype))
    out = unpacked(level, packed, dtype, 6, 64, np.arange(6, dtype=np.int32))
    np.testing.assert_allclose(out[[0, 1, 4]], w[[0, 1, 4]], rtol=1e-6)
    assert np.isnan(out[[2, 3, 5]]).all()  # rotated, 3e38 is beyond float32


def test_wrong_arguments_are_refused() -> None:
    for dtype in CODES:
        with pytest.raises(ValueError, match="whole rows have no minima"):
            cpu.packed_bytes(4, 4, dtype, group_of(dtype), True)
    for dtype, group in (("Q16", WHOLE), ("Q8", cpu.WHOLE16), ("Q4", cpu.WHOLE16)):
        with pytest.raises(ValueError, match=f"Q16 weights, and no others, are in WHOLE16 rows, got {dtype}"):
            cpu.packed_bytes(4, 4, dtype, group)
    for group, most in ((WHOLE, cpu.MOST_WHOLE), (cpu.WHOLE16, cpu.MOST_WHOLE16)):
        with pytest.raises(ValueError, match=f"at most {most} columns, got {most + 1}"):
            cpu.quantized_row_bytes(most + 1, group)
    with pytest.raises(ValueError, match="BF16 weights have no groups"):
        cpu.packed_bytes(4, 4, "BF16", WHOLE)
