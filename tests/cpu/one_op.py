"""Runs one op of the native backend on numpy arrays; what the suites of single ops share."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from asyncengine._fast import cpu

LEVELS = cpu.levels()
ARRAYS = ["token_ids", "positions", "token_row", "query_start", "context_len", "row_slot", "sample_rows"]
# Levels whose instructions for bf16 take both sides in it.
ROUNDING = ["avx512bf16", "amx", "neonbf16"]
TYPES = {"f32": cpu.F32, "bf16": cpu.BF16, "f16": cpu.F16}


@cache
def team(level: str, threads: int = 1) -> cpu.Team:
    return cpu.Team(threads, level)


def run(
    t: cpu.Team,
    code: int,
    p: Sequence[np.ndarray | int | None],
    n: Sequence[int],
    f: Sequence[float] = (),
    *,
    rows: int = cpu.TOKENS,
    num_tokens: int = 0,
    num_seqs: int = 0,
    num_samples: int = 0,
    **arrays: Any,
) -> None:
    table = np.ascontiguousarray(arrays.pop("block_table", [[0]]), np.int32)
    # Arrays that the op does not read are zeros.
    fields = {name: np.zeros(max(num_tokens, num_seqs + 1, num_samples), np.int32) for name in ARRAYS}
    for name, values in arrays.items():
        fields[name] = np.ascontiguousarray(values, np.int32)
    step = cpu.Step(block_table=table, **fields)
    step.set_counts(num_tokens, num_seqs, num_samples)
    program = cpu.Program(t)
    program.add(code, rows, [_address(a) for a in p], n, f)
    program.run(step)


def quantized_linear(level: str, rows: Any, weight: Any, m: int, threads: int = 1) -> np.ndarray:
    """`rows.bytes` times `weight.bytes`, [m, weight.n]; `weight.sizes()` are the sizes of LINEAR."""
    out = np.full((m + 1, weight.n), np.nan, np.float32)
    p = [out, rows.bytes, weight.bytes, None]
    run(team(level, threads), cpu.LINEAR, p, weight.sizes(), num_tokens=m)
    assert np.isnan(out[m]).all(), "wrote past the output"
    return out[:m]


def _address(a: np.ndarray | int | None) -> int:
    if isinstance(a, np.ndarray):
        assert a.flags.c_contiguous
        return a.ctypes.data
    return a or 0


def narrowed(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is stored in `dtype`; bf16 as uint16 bits, rounded to nearest even."""
    if dtype != "bf16":
        return x.astype(np.float16 if dtype == "f16" else np.float32)
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    return (high + ((low > 0x8000) | ((low == 0x8000) & (high & 1 == 1)))).astype(np.uint16)


def widened(x: np.ndarray) -> np.ndarray:
    """The values of `narrowed` in float64."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)
