"""Codes in words, packed and dequantized, against their definition."""

import numpy as np
import pytest

from asyncengine._fast import cpu

from ..codes import LAYOUTS, Coded
from .one_op import team

PANEL = cpu.PANEL
NAMES = {
    "awq": ("qweight", "scales", "qzeros"),
    "gptq": ("qweight", "scales", "qzeros"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point"),
}
CASES = [(layout, 4) for layout in LAYOUTS] + [("gptq", 8), ("compressed-tensors", 8)]
FORMATS = pytest.mark.parametrize(("layout", "bits"), CASES)


def native(coded: Coded, layout: str, *, index: bool = False) -> cpu.Codes:
    found = coded.stored(layout)
    codes, scales, zeros = NAMES[layout]
    return cpu.Codes(
        layout,
        coded.bits,
        coded.n,
        coded.k,
        coded.group,
        found[codes],
        "F16",
        found[scales],
        None if coded.symmetric else found[zeros],
        1 if layout == "gptq" else 0,
        coded.index.astype(np.int32) if index else None,
    )


def values(coded: Coded, layout: str, rows: range, columns: range, index: bool = False) -> np.ndarray:
    out = np.full((len(rows), len(columns)), np.nan, np.float32)
    cpu.convert(
        team(cpu.levels()[-1], 2),
        "CODES",
        native(coded, layout, index=index),
        len(rows),
        coded.k,
        out,
        "F32",
        row_start=rows.start,
        col_start=columns.start,
        col_stop=columns.stop,
    )
    return out


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(8, 32, 32), (40, 96, 32), (72, 640, 128), (24, 384, -1)])
def test_values(layout: str, bits: int, symmetric: bool, n: int, k: int, group: int) -> None:
    coded = Coded(n, k, group, bits=bits, symmetric=symmetric)
    for rows in (range(n), range(3, n - 1), range(n - 2, n), range(2, 2)):
        for columns in (range(k), range(32, k), range(5, k - 3)):
            out = values(coded, layout, rows, columns)
            np.testing.assert_array_equal(
                out, coded.weight[rows.start : rows.stop, columns.start : columns.stop]
            )


@pytest.mark.parametrize("bits", [4, 8])
def test_values_of_scattered_groups(bits: int) -> None:
    index = np.random.default_rng(0).permutation(np.arange(256) // 64)
    coded = Coded(16, 256, 64, bits=bits, index=index)
    out = values(coded, "gptq", range(1, 15), range(7, 250), index=True)
    np.testing.assert_array_equal(out, coded.weight[1:15, 7:250])


def unpacked(raw: np.ndarray, n: int, k: int, dtype: str, group: int, minimum: bool) -> np.ndarray:
    """What packed bytes stand for, in float64, by quantized.h."""
    panels, groups = -(-n // PANEL), -(-k // group)
    parts = raw.reshape(panels, groups, -1)
    d = np.ascontiguousarray(parts[..., :64]).view(np.float16).astype(np.float64)
    codes = parts[..., 128 if minimum else 64 :]
    if dtype == "Q8":
        q = codes.reshape(panels, groups, group // 4, PANEL, 4)
    else:
        pairs = codes.reshape(panels, groups, group // 8, PANEL, 4)
        q = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
    q = q.swapaxes(2, 3).reshape(panels, groups, PANEL, group).astype(np.float64)
    if minimum:
        m = np.ascontiguousarray(parts[..., 64:128]).view(np.float16).astype(np.float64)
        w = d[..., None] * q + m[..., None]
    else:
        w = d[..., None] * (q - (128 if dtype == "Q8" else 8))
    return w.swapaxes(1, 2).reshape(panels * PANEL, -1)[:n, :k]


def packed(
    coded: Coded, layout: str, dtype: str, group: int, minimum: bool, rows: range, columns: range
) -> np.ndarray:
    out = np.zeros(cpu.packed_bytes(len(rows), len(columns), dtype, group, minimum), np.uint8)
    cpu.pack_linear(
        team(cpu.levels()[-1], 2),
        "CODES",
        native(coded, layout),
        len(rows),
        coded.k,
        out,
        dtype,
        group=group,
        minimum=minimum,
        row_start=rows.start,
        col_start=columns.start,
        col_stop=columns.stop,
    )
    return unpacked(out, len(rows), len(columns), dtype, group, minimum)


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("stored", "group"), [(32, 32), (128, 128), (128, 32), (64, 64), (384, 128), (-1, 64)]
)
def test_codes_stay(layout: str, bits: int, symmetric: bool, stored: int, group: int) -> None:
    n, k = 72, 384
    coded = Coded(n, k, stored, bits=bits, symmetric=symmetric)
    for rows in (range(n), range(8, n), range(13, 60)):
        for columns in (range(k), range(128, k), range(256)):
            w = packed(coded, layout, f"Q{bits}", group, not symmetric, rows, columns)
            expected = coded.weight if symmetric else coded.rounded_weight
            part = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
            np.testing.assert_array_equal(w, expected[part])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_four_bits_fit_into_eight(layout: str, symmetric: bool) -> None:
    """Exactly, without a minimum too: the difference of code and zero point is a code."""
    coded = Coded(40, 256, 128, symmetric=symmetric)
    np.testing.assert_array_equal(packed(coded, layout, "Q8", 64, False, range(40), range(256)), coded.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_forms_are_made_from_the_values(layout: str) -> None:
    coded = Coded(40, 256, 128)
    out = np.zeros(cpu.packed_bytes(40, 256, "F32"), np.uint8)
    cpu.pack_linear(team(cpu.levels()[-1]), "CODES", native(coded, layout), 40, 256, out, "F32")
    panels = out.view(np.float32).reshape(-1, 256, PANEL).swapaxes(1, 2).reshape(-1, 256)
    np.testing.assert_array_equal(panels[:40], coded.weight)
    # Without minima 4 bits do not hold zero points: scales of their own.
    w = packed(coded, layout, "Q4", 32, False, range(40), range(256))
    assert np.abs(w - coded.weight).max() < np.abs(coded.weight).max() / 6
    # Columns from inside a group: the same.
    part = packed(coded, layout, "Q4", 128, True, range(40), range(40, 256))
    assert np.abs(part - coded.weight[:, 40:]).max() < np.abs(coded.weight).max() / 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_rows(layout: str) -> None:
    """Rotated and rounded, they are what the same values as floats make."""
    coded = Coded(40, 256, 128)
    found = []
    for dtype, source in (("CODES", native(coded, layout)), ("F32", coded.weight.astype(np.float32))):
        out = np.zeros(cpu.packed_bytes(32, 200, "Q8", cpu.WHOLE), np.uint8)
        where = dict(group=cpu.WHOLE, row_start=8, col_start=56)
        cpu.pack_linear(team(cpu.levels()[-1]), dtype, source, 32, 256, out, "Q8", **where)
        found.append(out)
    assert found[0].any()
    np.testing.assert_array_equal(*found)


def test_short_last_group() -> None:
    """A rank's columns need not be whole groups where there is one for all."""
    coded = Coded(33, 200, -1, symmetric=True)
    w = packed(coded, "gptq", "Q4", 128, False, range(33), range(100, 200))
    np.testing.assert_array_equal(w, coded.weight[:, 100:])


def test_float_and_bfloat16_scales() -> None:
    coded = Coded(16, 64, 32, symmetric=True).bfloat16_scales()
    found = coded.stored("compressed-tensors")
    for name, scales in (("BF16", coded.patterns), ("F32", coded.scale)):
        codes = cpu.Codes("compressed-tensors", 4, 16, 64, 32, found["weight_packed"], name, scales)
        out = np.empty((16, 64), np.float32)
        cpu.convert(team(cpu.levels()[-1]), "CODES", codes, 16, 64, out, "F32")
        np.testing.assert_array_equal(out, coded.weight)


def test_wrong_sources_are_refused() -> None:
    coded = Coded(16, 64, 32)
    found = coded.stored("gptq")
    parts = [found["qweight"], "F16", found["scales"], found["qzeros"]]
    make = cpu.Codes
    with pytest.raises(ValueError, match="codes of 3 bits"):
        make("gptq", 3, 16, 64, 32, *parts)
    with pytest.raises(ValueError, match="codes of 8 bits in layout 'awq'"):
        make("awq", 8, 16, 64, 32, *parts)
    with pytest.raises(ValueError, match="layout 'marlin'"):
        make("marlin", 4, 16, 64, 32, *parts)
    with pytest.raises(ValueError, match="scales of type 'F64'"):
        make("gptq", 4, 16, 64, 32, parts[0], "F64", parts[2])
    with pytest.raises(ValueError, match="in groups of 0"):
        make("gptq", 4, 16, 64, 0, *parts)
    for index, what in ((0, "codes"), (2, "scales"), (3, "zeros")):
        short = [part[:-1] if i == index else part for i, part in enumerate(parts)]
        with pytest.raises(ValueError, match=f"{what} has"):
            make("gptq", 4, 16, 64, 32, *short)
    with pytest.raises(ValueError, match="group_index holds 2, and there are 2 groups"):
        make("gptq", 4, 16, 64, 32, *parts, 1, np.full(64, 2, np.int32))
    codes, out = make("gptq", 4, 16, 64, 32, *parts), np.zeros((16, 64), np.float32)
    for rows, start in ((17, 0), (16, 1), (1, -1)):
        with pytest.raises(ValueError, match="do not lie in"):
            cpu.convert(cpu.Team(1), "CODES", codes, rows, 64, out, "F32", row_start=start)
    with pytest.raises(ValueError, match="of 32 columns do not lie in"):
        cpu.convert(cpu.Team(1), "CODES", codes, 16, 32, out, "F32")
    with pytest.raises(TypeError):
        cpu.convert(cpu.Team(1), "CODES", out, 16, 64, out, "F32")
