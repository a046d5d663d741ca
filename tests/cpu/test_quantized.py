"""Quantized rows, packing and integer linears against float64, on every instruction-set level."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from asyncengine._fast import cpu

from .one_op import LEVELS, run, team
from .one_op import quantized_linear as linear

PANEL = cpu.PANEL
CODES = {"Q8": cpu.Q8, "Q4": cpu.Q4}
FORMATS = [(dtype, minimum) for dtype in CODES for minimum in (False, True)]
GROUPS = [32, 64, 128]


# ---- the definitions of quantized.h ----


def groups_of(x: np.ndarray, group: int) -> np.ndarray:
    """[rows, K] -> [rows, groups, group], the last group filled with zeros."""
    padded: np.ndarray = np.pad(x, ((0, 0), (0, -x.shape[1] % group)))
    return padded.reshape(len(x), -1, group)


class Rows:
    """Quantized rows taken apart."""

    def __init__(self, rows: int, k: int, group: int) -> None:
        self.k, self.group, self.groups = k, group, -(-k // group)
        self.bytes = np.full((rows + 1, cpu.quantized_row_bytes(k, group)), 0xAA, np.uint8)

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        raw, kp, n = self.bytes[:-1], self.groups * self.group, self.groups
        q = raw[:, :kp].view(np.int8).reshape(len(raw), n, self.group)
        scale = np.ascontiguousarray(raw[:, kp : kp + 4 * n]).view(np.float32)
        return q, scale, np.ascontiguousarray(raw[:, kp + 4 * n : kp + 8 * n]).view(np.int32)

    def values(self) -> np.ndarray:
        q, scale, _ = self.parts()
        x = q.astype(np.float64) * scale[:, :, None]
        return x.reshape(len(x), -1)[:, : self.k]

    def check(self, x: np.ndarray) -> None:
        """These are the rows of x, and nothing was written behind them."""
        q, scale, total = self.parts()
        groups = groups_of(x.astype(np.float64), self.group)
        peak = np.abs(groups).max(axis=2)
        bad = ~np.isfinite(peak)
        assert np.isnan(scale[bad]).all() and (q[bad] == 0).all()
        np.testing.assert_allclose(scale[~bad], peak[~bad] / 127, rtol=1e-6)
        assert (q.astype(int).sum(axis=2) == total).all()
        error = np.abs(q * scale[:, :, None].astype(np.float64) - groups)[~bad]
        assert (error <= 0.5001 * scale[~bad][:, None]).all()
        assert (self.bytes[-1] == 0xAA).all()


def quantized(level: str, x: np.ndarray, group: int, threads: int = 1) -> Rows:
    rows = Rows(len(x), x.shape[1], group)
    p = [None, x, None, None, rows.bytes]
    run(team(level, threads), cpu.QUANTIZE, p, [x.shape[1], 0, 0, group], num_tokens=len(x))
    return rows


class Weight:
    """A weight of random codes and scales, laid out by the definition."""

    def __init__(self, n: int, k: int, dtype: str, group: int, minimum: bool, seed: int = 0) -> None:
        rng = np.random.default_rng([n, k, group, minimum, seed])
        self.n, self.k, self.dtype, self.group, self.minimum = n, k, dtype, group, minimum
        panels, groups, most = -(-n // PANEL), -(-k // group), 256 if dtype == "Q8" else 16
        q = rng.integers(0, most, (panels, PANEL, groups, group), np.uint8)
        d = (rng.standard_normal((panels, PANEL, groups)) * 0.01).astype(np.float16)
        m = (rng.standard_normal((panels, PANEL, groups)) * 0.1).astype(np.float16)
        values = q * d[..., None].astype(np.float64)
        values += m[..., None] if minimum else -(most // 2) * d[..., None].astype(np.float64)
        self.values = values.reshape(panels * PANEL, -1)[:n, :k]
        if dtype == "Q8":
            codes = q.reshape(panels, PANEL, groups, group // 4, 4)
        else:
            pairs = q.reshape(panels, PANEL, groups, group // 8, 2, 4)
            codes = pairs[..., 0, :] | pairs[..., 1, :] << 4
        scales = [d, m] if minimum else [d]
        parts = [np.ascontiguousarray(s.transpose(0, 2, 1)).view(np.uint8) for s in scales]
        parts.append(codes.transpose(0, 2, 3, 1, 4).reshape(panels, groups, -1))
        self.bytes = np.ascontiguousarray(np.concatenate(parts, axis=2))
        assert self.bytes.nbytes == cpu.packed_bytes(n, k, dtype, group, minimum)

    def sizes(self, mode: int = 0, out_group: int = 0) -> list[int]:
        return [self.n, self.k, CODES[self.dtype], out_group, self.group, self.minimum, mode]


# ---- quantized rows ----


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k", [1, 31, 32, 100, 576, 4100])
def test_quantize(level: str, group: int, k: int) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((9, k)) * 10.0 ** rng.integers(-20, 20, (9, 1))).astype(np.float32)
    x[1] = 0
    x[2] = 1e-42
    x[3, 0], x[4, -1], x[5, k // 2] = np.nan, np.inf, -np.inf
    x[6, rng.integers(k)] = -np.abs(x[6]).max() * 2
    rows = quantized(level, x, group)
    x[2] = 0  # too small to have a scale
    rows.check(x)
    assert (rows.bytes == quantized(level, x, group, threads=2).bytes).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("width", [33, 576, 1200])
def test_norms_and_selection_write_quantized_rows(level: str, group: int, width: int) -> None:
    rng = np.random.default_rng(width)
    x, weight = rng.standard_normal((5, width), np.float32), rng.standard_normal(width, np.float32)
    plain, both = np.empty_like(x), np.empty_like(x)
    run(team(level), cpu.RMS_NORM, [plain, x, weight], [width], [1e-5], num_tokens=5)
    expected = quantized(level, plain, group)
    for out in (both, None):
        rows = Rows(5, width, group)
        p = [out, x, weight, None, rows.bytes]
        run(team(level, 2), cpu.RMS_NORM, p, [width, 0, 0, group], [1e-5], num_tokens=5)
        assert (rows.bytes == expected.bytes).all()
    np.testing.assert_array_equal(both, plain)

    chosen = np.array([4, 1], np.int32)
    for out in (np.empty((2, width), np.float32), None):
        rows = Rows(2, width, group)
        p = [out, x, None, None, rows.bytes]
        fields = dict(rows=cpu.SAMPLES, num_tokens=5, num_samples=2, sample_rows=chosen)
        run(team(level, 2), cpu.SELECT, p, [width, 0, 0, group], **fields)
        rows.check(x[chosen])
        assert out is None or (out == x[chosen]).all()


# ---- products ----

SHAPES = [(1, 1, 1), (2, 33, 70), (1, 300, 576), (3, 64, 384), (5, 129, 1000), (6, 31, 129), (7, 160, 577)]
SHAPES += [(12, 96, 64), (13, 65, 2051), (97, 70, 400), (130, 40, 833), (300, 33, 100)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
def test_linear_matches_float64(level: str, group: int, dtype: str, minimum: bool) -> None:
    for m, n, k in SHAPES:
        weight = Weight(n, k, dtype, group, minimum)
        x = np.random.default_rng([m, k]).standard_normal((m, k), np.float32)
        rows = quantized(level, x, group)
        out = linear(level, rows, weight, m)
        values = rows.values()
        expected = values @ weight.values.T
        # Every group's product is rounded a few times, before its zero or minimum cancels.
        magnitude = np.abs(values) @ np.abs(weight.values).T + np.abs(values).sum(axis=1, keepdims=True) * 3
        np.testing.assert_array_less(np.abs(out - expected), 1e-6 * magnitude + 1e-30)
        np.testing.assert_array_equal(out, linear(level, rows, weight, m, threads=2))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
@pytest.mark.parametrize(("k", "group"), [(1100, 32), (330, 64), (333, 128)])
def test_a_row_is_the_same_in_every_batch(level: str, dtype: str, minimum: bool, k: int, group: int) -> None:
    n = 200
    weight = Weight(n, k, dtype, group, minimum)
    x = np.random.default_rng(5).standard_normal((130, k), np.float32)
    rows = quantized(level, x, group)
    alone = []
    for i in range(130):
        one = Rows(1, k, group)
        one.bytes[0] = rows.bytes[i]
        alone.append(linear(level, one, weight, 1))
    alone = np.concatenate(alone)
    for m in range(2, 131):
        np.testing.assert_array_equal(linear(level, rows, weight, m, threads=1 + m % 4), alone[:m])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("minimum", [False, True])
def test_the_largest_sums_are_exact(level: str, dtype: str, minimum: bool) -> None:
    """All codes at an end of their range: dot products of the largest magnitude there are."""
    most = 255 if dtype == "Q8" else 15
    for code in (0, most):
        weight = Weight(32, 256, dtype, 128, minimum)
        weight.bytes[:, :, 64 * (1 + minimum) :] = code | (code << 4 if dtype == "Q4" else 0)
        weight.bytes[:, :, :64].view(np.float16)[:] = 1
        if minimum:
            weight.bytes[:, :, 64:128].view(np.float16)[:] = -3
        value = code - 3 if minimum else code - (most + 1) // 2
        for sign in (-1, 1):
            x = np.full((2, 256), sign, np.float32)
            x[1, ::2] *= -1
            rows = quantized(level, x, 128)
            scale = rows.parts()[1][0, 0]
            out = linear(level, rows, weight, 2)
            if minimum:
                np.testing.assert_allclose(out[0], value * sign * 256, rtol=1e-6)
            else:
                # Two groups, each exact but for the scale.
                group = np.float32(value * sign * 127 * 128) * scale
                np.testing.assert_array_equal(out[0], np.float32(group + group))
            assert (out[1] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
def test_nonfinite_values_stay_in_their_row_and_column(level: str, dtype: str, minimum: bool) -> None:
    weight = Weight(40, 100, dtype, 32, minimum)
    weight.bytes[1, 0, 2 * 3 : 2 * 4].view(np.float16)[:] = np.nan  # d of output 35
    for m in (5, 14):
        x = np.ones((m, 100), np.float32)
        x[3, 99] = np.inf
        out = linear(level, quantized(level, x, 32), weight, m)
        assert np.isnan(out[:, 35]).all() and np.isnan(out[3]).all()
        assert np.isfinite(np.delete(np.delete(out, 3, 0), 35, 1)).all()


# ---- packing ----


def unpacked(packed: cpu.Buffer, n: int, k: int, dtype: str, group: int, minimum: bool) -> np.ndarray:
    """Rows of a packed weight, as an embedding reads them."""
    out = np.empty((n, k), np.float32)
    kind = {"F32": cpu.F32, "BF16": cpu.BF16, "F16": cpu.F16, **CODES}[dtype]
    sizes = [k, kind, 0, n, 1, group, minimum]
    run(team(LEVELS[-1]), cpu.EMBED, [out, packed.address], sizes, num_tokens=n, token_ids=np.arange(n))
    return out


def packed_as(
    w: np.ndarray, src: str, dtype: str, group: int, minimum: bool, shape: tuple[int, int] | None = None
) -> np.ndarray:
    n, k = shape or w.shape
    packed = cpu.Buffer(cpu.packed_bytes(n, k, dtype, group, minimum))
    cpu.pack_linear(team(LEVELS[-1], 2), src, w, n, k, packed, dtype, group=group, minimum=minimum)
    return unpacked(packed, n, k, dtype, group, minimum)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
def test_embedding_from_panels(level: str, group: int, dtype: str, minimum: bool) -> None:
    weight = Weight(70, 333, dtype, group, minimum)
    ids = np.array([10, 79, 9, 80, 11, 45, 45], np.int32)  # this shard has 10 .. 79
    out = np.empty((7, 333), np.float32)
    sizes = [333, CODES[dtype], 10, 70, 1, group, minimum]
    run(team(level, 2), cpu.EMBED, [out, weight.bytes], sizes, num_tokens=7, token_ids=ids)
    held = (ids >= 10) & (ids < 80)
    np.testing.assert_allclose(out[held], weight.values[ids[held] - 10], rtol=1e-6, atol=1e-6)
    assert (out[~held] == 0).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_embedding_from_plain_panels(dtype: str) -> None:
    w = np.arange(45 * 19, dtype=np.float32).reshape(45, 19) % 256
    np.testing.assert_array_equal(packed_as(w, "F32", dtype, 0, False), w)


EXACT = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("src", EXACT)
def test_stored_codes_are_kept(src: str) -> None:
    kind = GGMLQuantizationType[src]
    raw = quantize(np.random.default_rng(1).standard_normal((70, 352), np.float32), kind)
    bits, minimum = cpu.source_format(src) or (0, False)
    for dtype, with_minimum in {(f"Q{bits}", minimum), (f"Q{bits}", True), ("Q8", True)}:
        out = packed_as(raw, src, dtype, 32, with_minimum, (70, 352))
        np.testing.assert_allclose(out, dequantize(raw, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("src", ["Q4_K", "Q5_K", "Q6_K"])
def test_stored_codes_of_k_types(src: str) -> None:
    """Their scales are products, rounded once; Q6_K is rounded to 8 bits anew."""
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (40, 2, cpu.source_bytes(src, 256)), np.uint8)
    at = (208,) if src == "Q6_K" else (0, 2)
    for i in at:
        scales = rng.uniform(0.001, 0.01, (40, 2, 1)).astype(np.float16)
        raw[:, :, i : i + 2] = scales.view(np.uint8)
    raw = raw.reshape(40, -1)
    expected = dequantize(raw, GGMLQuantizationType[src])
    bits, minimum = cpu.source_format(src) or (0, False)
    out = packed_as(raw, src, f"Q{bits}", 32, minimum, (40, 512))
    groups = groups_of(expected, 32)
    peak, span = np.abs(groups).max(axis=2), np.ptp(groups, axis=2)
    bound = 0.51 / 127 * peak if src == "Q6_K" else 2.0**-10 * (peak + span)
    assert (np.abs(out - expected) <= bound.repeat(32, axis=1) + 1e-6).all()


@pytest.mark.parametrize("src", ["F32", "Q4_1"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("dtype", "minimum"), FORMATS)
def test_computed_scales(src: str, group: int, dtype: str, minimum: bool) -> None:
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((50, 320)) * 10.0 ** rng.uniform(-2, 2, (50, 1))).astype(np.float32)
    raw = w if src == "F32" else quantize(w, GGMLQuantizationType[src])
    if src != "F32":
        w = dequantize(raw, GGMLQuantizationType[src])
    out = packed_as(raw, src, dtype, group, minimum, w.shape)
    error = np.pad(out - w, ((0, 0), (0, -320 % group))).reshape(50, -1, group)
    groups = groups_of(w, group)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    if dtype == "Q8":
        assert (np.abs(error) <= 0.52 / 127 * peak).all()
        return
    # No worse than dividing the range evenly, group by group on average.
    span = groups.max(axis=2, keepdims=True) - groups.min(axis=2, keepdims=True)
    step = span / 15 if minimum else peak / 8
    assert (error**2).mean() <= 1.02 * (step**2 / 12).mean()


def test_a_search_beats_the_plain_range() -> None:
    """4 bits of normal weights: below the error of the format's own reference quantization."""
    w = np.random.default_rng(4).standard_normal((64, 1024), np.float32)
    for src, minimum in (("Q4_1", True), ("Q4_0", False)):
        kind = GGMLQuantizationType[src]
        plain = np.square(dequantize(quantize(w, kind), kind) - w).mean()
        assert np.square(packed_as(w, "F32", "Q4", 32, minimum) - w).mean() < 0.92 * plain


def test_uniform_and_nonfinite_groups() -> None:
    w = np.zeros((6, 64), np.float32)
    w[1, :32], w[2], w[3, 40], w[4, 0], w[5] = 7, -0.5, np.nan, -np.inf, 1e-30
    for dtype, minimum in FORMATS:
        out = packed_as(w, "F32", dtype, 32, minimum)
        np.testing.assert_allclose(out[:3], w[:3], rtol=1e-3)
        assert np.isnan(out[3, 32:]).all() and (out[3, :32] == 0).all()
        assert np.isnan(out[4, :32]).all() and (out[4, 32:] == 0).all()
        assert np.abs(out[5]).max() < 1e-7


@pytest.mark.parametrize(
    ("dtype", "group", "minimum"), [("F32", 0, 0), ("BF16", 0, 0), ("Q8", 64, 0), ("Q4", 32, 1)]
)
def test_slices_shards_and_alternating_panels(dtype: str, group: int, minimum: int) -> None:
    """Columns of a part, rows behind others, and the panels of two parts in turns."""
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 16, (2, 75, 400))
    codes[..., ::32] = 15  # so that every group has the same peak
    codes[..., 1::32] = 0
    w = (codes - 0.0).astype(np.float32)
    t, start, stop = team(LEVELS[-1], 2), 32, 390
    k, panels = stop - start, -(-75 // PANEL)
    taken = w[:, :, start:stop]
    packed = cpu.Buffer(cpu.packed_bytes(2 * panels * PANEL, k, dtype, group, bool(minimum)))
    options = dict(group=group, minimum=bool(minimum), col_start=start, col_stop=stop)
    for part in range(2):
        for first, last in ((0, 41), (41, 75)):
            source = np.ascontiguousarray(w[part, first:last])
            place = dict(panel_stride=2, panel_offset=part)
            cpu.pack_linear(t, "F32", source, last - first, 400, packed, dtype, first, **options, **place)
    out = unpacked(packed, 2 * panels * PANEL, k, dtype, group, bool(minimum))
    halves = out.reshape(panels, 2, PANEL, k).swapaxes(0, 1).reshape(2, panels * PANEL, k)[:, :75]
    np.testing.assert_allclose(halves, taken, atol=0.07 if dtype == "Q8" else 0.01)


def test_wrong_arguments_are_refused() -> None:
    t = team(LEVELS[-1])
    w = np.zeros((40, 64), np.float32)
    dst = cpu.Buffer(cpu.packed_bytes(40, 64, "Q4", 32, True))
    with pytest.raises(ValueError, match="groups of Q8 weights are 32, 64 or 128"):
        cpu.packed_bytes(4, 4, "Q8")
    with pytest.raises(ValueError, match="BF16 weights have no groups"):
        cpu.packed_bytes(4, 4, "BF16", 32)
    with pytest.raises(ValueError, match="weight type 'Q5' is not supported"):
        cpu.packed_bytes(4, 4, "Q5", 32)
    with pytest.raises(ValueError, match="quantized rows are 32, 64 or 128"):
        cpu.quantized_row_bytes(4, 16)
    with pytest.raises(ValueError, match="the packed weight has"):
        cpu.pack_linear(t, "F32", w, 40, 64, dst, "Q8", group=32)
    with pytest.raises(ValueError, match="the packed weight has"):
        cpu.pack_linear(t, "F32", w, 40, 64, dst, "Q4", group=32, minimum=True, panel_stride=2)
    with pytest.raises(ValueError, match="panel 2 does not lie in a stride of 2"):
        cpu.pack_linear(t, "F32", w, 40, 64, dst, "Q4", group=32, panel_stride=2, panel_offset=2)
    with pytest.raises(ValueError, match="weight type 'Q4' is not supported"):
        cpu.convert(t, "F32", w, 40, 64, dst, "Q4")
    assert cpu.source_format("F32") is None and cpu.source_format("I32") is None
