"""Paged attention against float64, and the promise that results depend on nothing but the query."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncengine._fast import cpu

from .kv_int8 import blocks_of, quantized
from .one_op import LEVELS, TYPES, narrowed, run, team, widened

KV_TYPES = {**TYPES, "i8": cpu.I8}
# Levels that multiply pairs of bf16 where the cache has them.
PAIRS = ("avx512bf16", "neonbf16")
# Levels that multiply the codes of an int8 cache in integers.
INTEGERS = ("avxvnni", "avx512vnni", "avx512bf16", "amx", "neonbf16")


@dataclass
class Batch:
    """Sequences with known keys and values; row r computes positions [start, start + count)."""

    rows: list[tuple[int, int]]
    q_heads: int
    kv_heads: int
    dim: int
    block: int = 16
    dtype: str = "f32"
    window: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        lengths = [start + count for start, count in self.rows]
        needed = [-(-n // self.block) for n in lengths]
        used = sum(needed)
        # Blocks that nobody has, and rows past the end, hold NaN: reading one shows.
        shape = (used + 3, self.kv_heads, self.block, self.dim)
        caches = np.full((2, *shape), np.nan, np.float32)
        self.table = np.full((len(self.rows) + 2, max(needed) + 1), used + 2, np.int32)
        self.slots = rng.permutation(len(self.table))[: len(self.rows)].astype(np.int32)
        free = iter(rng.permutation(used + 2))
        self.sequences = []
        for length, blocks, slot in zip(lengths, needed, self.slots, strict=True):
            self.table[slot, :blocks] = [next(free) for _ in range(blocks)]
            x = rng.normal(size=(2, length, self.kv_heads, self.dim)).astype(np.float32)
            at = np.arange(length)
            caches[:, self.table[slot, at // self.block], :, at % self.block] = x.swapaxes(0, 1)
            self.sequences.append(self.stored(x))
        if self.dtype == "i8":
            self.keys, self.values = (blocks_of(*quantized(cache)) for cache in caches)
        else:
            self.keys, self.values = (narrowed(cache, self.dtype) for cache in caches)
        tokens = sum(count for _, count in self.rows)
        self.qkv = rng.normal(0, 1.5, (tokens, self.q_heads + 2 * self.kv_heads, self.dim)).astype(np.float32)
        self.scale = float(np.float32(self.dim**-0.5))

    def stored(self, x: np.ndarray) -> np.ndarray:
        """What the cache makes of x, in float64."""
        if self.dtype != "i8":
            return widened(narrowed(x, self.dtype))
        codes, scales = quantized(x)
        return codes * scales.astype(np.float64)[..., None]

    def run(
        self,
        level: str,
        threads: int = 1,
        rows: list[tuple[int, int, int]] | None = None,
        workspace: int = 1 << 22,
        row8_group: int = 0,
    ) -> np.ndarray:
        """The output [tokens, heads, dim]; `rows` may name parts: (row, first, count) of its new tokens.

        With `row8_group` its quantized rows instead, [tokens, bytes].
        """
        parts = rows if rows is not None else [(r, 0, count) for r, (_, count) in enumerate(self.rows)]
        first = np.cumsum([0] + [count for _, count in self.rows])
        tokens = np.concatenate([np.arange(first[r] + i, first[r] + i + n) for r, i, n in parts])
        starts = [self.rows[r][0] + i for r, i, _ in parts]
        counts = [n for _, _, n in parts]
        qkv = np.ascontiguousarray(self.qkv[tokens])
        out = np.full((len(tokens), self.q_heads, self.dim), np.nan, np.float32)
        space = np.full(workspace, 0xFF, np.uint8)  # NaNs
        width = self.q_heads * self.dim
        row8 = (
            np.zeros((len(tokens), (width + width // row8_group * 8 + 63) // 64 * 64), np.uint8)
            if row8_group
            else None
        )
        run(
            team(level, threads),
            cpu.ATTENTION,
            [None if row8_group else out, qkv, self.keys, self.values, row8, 0, 0, space],
            [
                *(
                    self.q_heads,
                    self.kv_heads,
                    self.dim,
                    row8_group,
                    self.block,
                    KV_TYPES[self.dtype],
                    self.window,
                ),
                *(workspace, self.keys[0].nbytes),
            ],
            [self.scale],
            num_tokens=len(tokens),
            num_seqs=len(parts),
            positions=np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]),
            token_row=np.repeat(np.arange(len(parts)), counts),
            query_start=np.cumsum([0, *counts]),
            context_len=np.add(starts, counts),
            row_slot=self.slots[[r for r, _, _ in parts]],
            block_table=self.table,
        )
        return out if row8 is None else row8

    def rounded_queries(self) -> np.ndarray:
        """As integers take them: in 8 bits, one scale for each line."""
        codes, scales = quantized(self.qkv[:, : self.q_heads])
        return codes * scales[..., None].astype(np.float64)

    def rounding(self) -> np.ndarray:
        """How far the output of these may be off where weights are rounded to 16 bits, tile by tile."""
        return np.array(
            [
                (p.shape[1] * 0.51 / 65535 * p.max(1) * np.abs(v).max(axis=(0, 2)))[:, None]
                for p, v in self.weighted(self.rounded_queries())
            ]
        )

    def exact(self, queries: np.ndarray | None = None, magnitudes: bool = False) -> np.ndarray:
        """Of `queries`, its own unless given; `magnitudes`: with the values' magnitudes for values."""
        queries = self.qkv[:, : self.q_heads].astype(np.float64) if queries is None else queries
        return np.array(
            [np.einsum("hj,jhd->hd", p, np.abs(v) if magnitudes else v) for p, v in self.weighted(queries)]
        )

    def weighted(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For every token, the weights [heads, seen] and values [seen, heads, D] of what it sees."""
        group, each = self.q_heads // self.kv_heads, iter(queries)
        for (start, count), x in zip(self.rows, self.sequences, strict=True):
            k, v = (np.repeat(part, group, axis=1) for part in x)
            for position in range(start, start + count):
                low = max(0, position - self.window + 1) if self.window else 0
                s = np.einsum("hd,jhd->hj", next(each), k[low : position + 1]) * self.scale
                s = np.exp(s - s.max(axis=1, keepdims=True))
                yield s / s.sum(axis=1, keepdims=True), v[low : position + 1]

    def assert_right(self, level: str, threads: int = 2) -> None:
        self.compare(self.run(level, threads), level)

    def compare(self, got: np.ndarray, level: str, tokens: slice = slice(None)) -> None:
        """`got` of `tokens` is right."""
        if self.dtype == "i8" and level in INTEGERS:
            exact = self.exact(self.rounded_queries())[tokens]
            assert (np.abs(got - exact) <= self.rounding()[tokens] + 4e-6 + 1e-5 * np.abs(exact)).all()
            return
        if not (self.dtype == "bf16" and level in PAIRS):
            np.testing.assert_allclose(got, self.exact()[tokens], atol=4e-6, rtol=1e-5)
            return
        # Queries are rounded to bf16, and every weight, by 2^-8 of itself at the most.
        queries = widened(narrowed(self.qkv[:, : self.q_heads], "bf16"))
        slack = 2.0**-8 * self.exact(queries, magnitudes=True)[tokens]
        assert (np.abs(got - self.exact(queries)[tokens]) <= 1.01 * slack + 4e-6).all()


MIXED = [(40, 1), (0, 21), (600, 1), (0, 1), (13, 70), (1029, 3), (63, 2)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 33, 512, 4])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (9, 3), (8, 1)], ids=str)
def test_mixed_batches(level: str, dim: int, heads: tuple[int, int]) -> None:
    batch = Batch(MIXED, *heads, dim, block=32 if dim % 3 else 16)
    np.testing.assert_allclose(batch.run(level, 2), batch.exact(), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", KV_TYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 512, 33, 4])
@pytest.mark.parametrize("heads", [(6, 2), (5, 1)], ids=str)
def test_cache_types(level: str, dtype: str, dim: int, heads: tuple[int, int]) -> None:
    Batch(MIXED, *heads, dim, dtype=dtype).assert_right(level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8"])
@pytest.mark.parametrize("window", [1, 7, 64, 100, 512, 700])
def test_windows(level: str, dtype: str, window: int) -> None:
    batch = Batch(MIXED, 4, 2, 64, dtype=dtype, window=window)
    # Blocks before the window are given back: their entries may say anything.
    for (start, _), slot in zip(batch.rows, batch.slots, strict=True):
        batch.table[slot, : max(0, start - window + 1) // batch.block] = 1 << 30
    batch.assert_right(level)


@pytest.mark.parametrize("level", LEVELS)
def test_many_query_heads_share_one_kv_head(level: str) -> None:
    batch = Batch([(30, 3), (600, 1)], 71, 1, 16)  # more lines per token than fit a tile
    np.testing.assert_allclose(batch.run(level, 2), batch.exact(), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_large_scores(level: str) -> None:
    batch = Batch(MIXED, 2, 1, 64)
    batch.qkv *= 300.0  # one key takes all the weight; others underflow
    np.testing.assert_allclose(batch.run(level), batch.exact(), atol=3e-3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bits_depend_on_nothing_but_the_query(data: st.DataObject) -> None:
    """Any chunking, order, company, number of threads and workspace gives the same bits."""
    level = data.draw(st.sampled_from(LEVELS))
    sizes = st.tuples(st.sampled_from([0, 3, 64, 500, 511, 512, 1100]), st.sampled_from([1, 2, 30, 65, 150]))
    rows = data.draw(st.lists(sizes, min_size=1, max_size=3))
    heads = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 1), (7, 1)]))
    batch = Batch(
        rows,
        *heads,
        data.draw(st.sampled_from([16, 33, 64])),
        dtype=data.draw(st.sampled_from(list(KV_TYPES))),
        window=data.draw(st.sampled_from([0, 0, 90])),
    )
    whole = batch.run(level, 1, workspace=0)
    assert np.isfinite(whole).all()
    first = np.cumsum([0] + [count for _, count in rows])
    parts = []
    for r, (_, count) in enumerate(rows):
        cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=3))) if count > 1 else []
        parts += [(r, a, b - a) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    parts = data.draw(st.permutations(parts))
    got = batch.run(level, 2, parts, workspace=data.draw(st.sampled_from([0, 20_000, 1 << 22])))
    order = np.concatenate([np.arange(first[r] + i, first[r] + i + n) for r, i, n in parts])
    np.testing.assert_array_equal(got, whole[order])


def test_a_long_context_is_divided_among_threads() -> None:
    batch = Batch([(9000, 1)], 4, 2, 64)
    enough = cpu.attention_workspace(2, 4, 2, 64, 9001)
    exact = batch.exact()
    for level in LEVELS:
        divided = batch.run(level, 2, workspace=enough)
        np.testing.assert_allclose(divided, exact, atol=4e-6, rtol=1e-5)
        np.testing.assert_array_equal(divided, batch.run(level, 1, workspace=0))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", KV_TYPES)
def test_a_damaged_sequence_leaves_the_others_alone(level: str, dtype: str) -> None:
    batch = Batch(MIXED, 4, 2, 64, dtype=dtype)
    batch.assert_right(level)
    clean = batch.run(level, 2)
    batch.qkv[0] = np.nan
    out = batch.run(level, 2)
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1:], clean[1:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", KV_TYPES)
@pytest.mark.parametrize("position", [64, 65])
def test_what_a_token_does_not_see_does_not_reach_it(level: str, dtype: str, position: int) -> None:
    """Neither the NaNs of later tokens nor, with a window, those of earlier ones."""
    batch = Batch([(0, 130)], 6, 2, 64, dtype=dtype, window=20)
    clean = batch.run(level)
    block, at = batch.table[batch.slots[0], position // batch.block], position % batch.block
    for cache in (batch.keys, batch.values):
        if dtype == "i8":  # in the scales
            cache[block, batch.kv_heads * batch.block * 64 :].view(np.float32).reshape(2, -1)[:, at] = np.nan
        else:
            cache[block, :, at] = 0x7FC0 if dtype == "bf16" else np.nan
    out = batch.run(level)
    sees = np.arange(130)
    sees = (sees >= position) & (sees < position + 20)
    assert np.isnan(out[sees]).all()
    np.testing.assert_array_equal(out[~sees], clean[~sees])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("heads", "group"), [((9, 3), 64), ((4, 1), 32)], ids=str)
def test_quantized_rows(level: str, heads: tuple[int, int], group: int) -> None:
    batch = Batch(MIXED, *heads, 64)
    rows, exact = batch.run(level, 2, row8_group=group), batch.exact().reshape(-1, heads[0] * 64)
    width = exact.shape[1]
    codes = rows[:, :width].view(np.int8).reshape(len(rows), -1, group).astype(np.float64)
    scales, sums = rows[:, width : width + width // group * 8].reshape(len(rows), 2, -1).swapaxes(0, 1)
    scales, sums = np.ascontiguousarray(scales).view(np.float32), np.ascontiguousarray(sums).view(np.int32)
    peaks = np.abs(exact.reshape(codes.shape)).max(-1)
    np.testing.assert_allclose(scales, peaks / 127, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(sums, codes.sum(-1))
    error = np.abs(codes * scales[..., None] - exact.reshape(codes.shape)).max(-1)
    assert (error <= 0.502 * scales + 1e-5).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_of_int8_that_overflowed_shows(level: str) -> None:
    batch = Batch([(40, 1), (40, 1)], 3, 1, 64, dtype="i8")
    scales = batch.keys[batch.table[batch.slots[0], 0], 16 * 64 :].view(np.float32)
    scales[5] = np.nan
    out = batch.run(level)
    assert np.isnan(out[0]).all()
    batch.compare(out[1:], level, slice(1, None))


def test_bytes_of_a_block() -> None:
    for name, size in (("F32", 4), ("BF16", 2), ("F16", 2)):
        assert cpu.kv_block_bytes(name, 3, 16, 80) == 3 * 16 * 80 * size
    assert cpu.kv_block_bytes("I8", 3, 16, 80) == 3 * 16 * 80 + 192
    assert cpu.kv_block_bytes("I8", 1, 8, 33) == 320 + 64
    for bad in [("Q4", 3, 16, 80), ("I8", 0, 16, 80), ("I8", 3, 0, 80), ("I8", 3, 16, 513)]:
        with pytest.raises(ValueError, match=r"KV|no blocks"):
            cpu.kv_block_bytes(*bad)


def test_the_workspace_refuses_impossible_heads() -> None:
    for bad in [
        (0, 4, 2, 64, 10),
        (2, 3, 2, 64, 10),
        (2, 4, 0, 64, 10),
        (2, 4, 2, 513, 10),
        (2, 4, 2, 64, -1),
    ]:
        with pytest.raises(ValueError, match=r"attention of|head_dim"):
            cpu.attention_workspace(*bad)
    assert cpu.attention_workspace(1, 9, 3, 64, 8192) == 0
