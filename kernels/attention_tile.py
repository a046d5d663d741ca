"""What the attention kernels share: a tile of queries against a row's paged keys and values.

A tile packs the query tokens of one row and the query heads of one KV head: its line i is token i // GROUP,
head i % GROUP. So a key is loaded once for all heads that look at it. Scores are held in units of log2(e),
for exp2 (online softmax: Milakov and Gimelshein, arXiv 1805.02867; tiles: Dao, arXiv 2307.08691).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "ROWS",
    "Cache",
    "Lines",
    "Spec",
    "attend",
    "cache_of",
    "first_visible",
    "lines_of",
    "load_query",
    "scales_of",
    "slopes_of",
    "store_output",
]

LOG2E = tl.constexpr(1.4426950408889634)
ROWS = tl.constexpr(256)
"""How many rows a program looks at together when it searches its own."""


class Spec(NamedTuple):
    """The constants that a kernel is compiled for."""

    HEAD_DIM: int
    BLOCK_D: int
    """HEAD_DIM made a power of two."""
    BLOCK_SIZE: int
    KV_HEADS: int
    GROUP: int
    """Query heads per KV head."""
    BLOCK_M: int
    """Lines of a tile."""
    BLOCK_N: int
    """Keys of a tile."""
    WINDOW: int = 0
    """A token sees itself and the WINDOW - 1 before it; 0 for all."""
    SOFT_CAP: float = 0.0
    """Scores become SOFT_CAP * tanh(score / SOFT_CAP); 0 for as they are."""
    ALIBI: bool = False
    SINKS: bool = False
    SCALED: bool = False
    E4M3: bool = False
    MIN_TILES: int = 1
    """The least share of a program, in tiles of keys."""


class Cache(NamedTuple):
    """The keys and values of one row and KV head."""

    k: Any
    """Pointer to the head in block 0."""
    v: Any
    k_stride: Any
    """Elements from block to block."""
    v_stride: Any
    table: Any
    """Pointer to the row's block numbers."""
    context: Any
    """Number of tokens."""


class Lines(NamedTuple):
    """The lines of a tile: [BLOCK_M] each."""

    token: Any
    """Index in the step; int64."""
    head: Any
    position: Any
    inside: Any


@triton.jit
def cache_of(
    k_cache,
    v_cache,
    k_stride,
    v_stride,
    row_slot,
    block_table,
    table_stride,
    row,
    head,
    context,
    S: tl.constexpr,
):
    table = block_table + tl.load(row_slot + row).to(tl.int64) * table_stride
    first = head * (S.BLOCK_SIZE * S.HEAD_DIM)
    return Cache(k_cache + first, v_cache + first, k_stride, v_stride, table, context)


@triton.jit
def first_visible(position, S: tl.constexpr):
    """The first key that a token at `position` sees."""
    if S.WINDOW > 0:
        return tl.maximum(position + 1 - S.WINDOW, 0)
    else:
        return position * 0


@triton.jit
def lines_of(first_token, query, context, kv_head, m_tile, S: tl.constexpr):
    line = m_tile * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    token = line // S.GROUP
    head = kv_head * S.GROUP + line % S.GROUP
    return Lines(first_token.to(tl.int64) + token, head, context - query + token, token < query)


@triton.jit
def scales_of(scale, k_scale, v_scale, k_cache, S: tl.constexpr):
    """What scores in units of log2(e), and outputs, are multiplied by."""
    scale *= LOG2E
    # What `_load` leaves out where it reads bits.
    unit: tl.constexpr = 256.0 if k_cache.dtype.element_ty == tl.uint8 else 1.0
    of_v = unit
    if S.SCALED:
        scale *= tl.load(k_scale)
        of_v *= tl.load(v_scale)
    return scale * unit, of_v


@triton.jit
def slopes_of(slopes, lines, S: tl.constexpr):
    if S.ALIBI:
        return tl.load(slopes + lines.head).to(tl.float32) * LOG2E
    else:
        return lines.head


@triton.jit
def load_query(qkv, stride, lines, S: tl.constexpr):
    """[BLOCK_M, BLOCK_D] of the type that is computed in."""
    column = tl.arange(0, S.BLOCK_D)[None, :]
    at = qkv + (lines.token * stride + lines.head * S.HEAD_DIM)[:, None] + column
    q = tl.load(at, mask=lines.inside[:, None] & (column < S.HEAD_DIM), other=0.0)
    # Every number of e4m3 is one of float16, and to get there costs less than to bfloat16.
    return q.to(tl.float16) if S.E4M3 else q


@triton.jit
def _load(at, inside, TYPE: tl.constexpr):
    x = tl.load(at) if inside is None else tl.load(at, mask=inside, other=0.0)
    if at.dtype.element_ty == tl.uint8:
        # The bits of e4m3 for GPUs that cannot convert it, 2^-8 of its value.
        x = x.to(tl.uint16)
        x = ((x & 0x80) << 8 | (x & 0x7F) << 7).to(tl.float16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _blocks(cache, tile, S: tl.constexpr):
    """Numbers of the blocks of a tile's keys: [BLOCK_N, 1], or one where the tile lies in one block."""
    if S.BLOCK_N <= S.BLOCK_SIZE:
        key = tile * S.BLOCK_N
    else:
        key = (tile * S.BLOCK_N + tl.arange(0, S.BLOCK_N))[:, None]
    block = tl.load(cache.table + key // S.BLOCK_SIZE, mask=key < cache.context, other=0)
    return block.to(tl.int64)


@triton.jit
def attend(m, z, acc, q, cache, start, stop, lines, scale, slope, S: tl.constexpr, MASKED: tl.constexpr):
    """Takes tiles `start` to `stop` of BLOCK_N keys into the running maximum m, sum z and output acc.

    `scale` multiplies scores, in units of log2(e) like `slope`. Without MASKED every line sees every key.
    With it a key is visible to a line up to the line's position and within its window; keys and values
    beyond the context are zeros, because what lies there may be NaN.
    """
    column = tl.arange(0, S.BLOCK_D)[None, :]
    PADDED: tl.constexpr = S.HEAD_DIM != S.BLOCK_D
    # Known one tile ahead: a number loaded where it is used would take a pipeline stage from the keys.
    block = _blocks(cache, start, S)
    for tile in tl.range(start, stop):
        key = tile * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
        k_at, v_at = cache.k + block * cache.k_stride, cache.v + block * cache.v_stride
        offset = (key % S.BLOCK_SIZE)[:, None] * S.HEAD_DIM + column
        block = _blocks(cache, tile + 1, S)
        if MASKED and PADDED:
            inside = (key < cache.context)[:, None] & (column < S.HEAD_DIM)
        elif MASKED:
            inside = (key < cache.context)[:, None] & (column >= 0)
        elif PADDED:
            inside = (key >= 0)[:, None] & (column < S.HEAD_DIM)
        else:
            inside = None

        s = tl.dot(q, tl.trans(_load(k_at + offset, inside, q.dtype)), input_precision="tf32x3")
        UNIT_SCALE: tl.constexpr = S.SOFT_CAP == 0.0 and not S.ALIBI
        if S.SOFT_CAP > 0.0:
            # cap tanh(x / cap) as cap (1 - 2 / (exp(2 x / cap) + 1)), which an infinite exp leaves right.
            s = S.SOFT_CAP * LOG2E * (1.0 - 2.0 / (tl.exp2(s * (scale * (2.0 / S.SOFT_CAP))) + 1.0))
        elif S.ALIBI:
            s *= scale
        if S.ALIBI:
            s += slope[:, None] * (key[None, :] - lines.position[:, None]).to(tl.float32)
        if MASKED:
            visible = key[None, :] <= lines.position[:, None]
            if S.WINDOW > 0:
                visible &= key[None, :] > lines.position[:, None] - S.WINDOW
            s = tl.where(visible, s, float("-inf"))
        # The scale is positive: the maximum may be taken before it, which leaves one FMA per score.
        unit = scale if UNIT_SCALE else 1.0
        top = tl.maximum(m, tl.max(s, axis=1) * unit)
        base = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
        p = tl.exp2(s * unit - base[:, None])
        faded = tl.exp2(m - base)
        m = top
        z = z * faded + tl.sum(p, axis=1)
        v = _load(v_at + offset, inside, q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * faded[:, None], input_precision="tf32x3")
    return m, z, acc


@triton.jit
def store_output(out, stride, m, z, acc, lines, sinks, v_scale, S: tl.constexpr):
    """Divides by the sum and stores; zeros for a line that saw nothing."""
    if S.SINKS:
        sink = tl.load(sinks + lines.head).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        faded = tl.exp2(m - top)
        z = z * faded + tl.exp2(sink - top)
        acc *= faded[:, None]
    acc *= (v_scale / tl.where(z == 0.0, 1.0, z))[:, None]
    column = tl.arange(0, S.BLOCK_D)[None, :]
    at = out + (lines.token * stride + lines.head * S.HEAD_DIM)[:, None] + column
    tl.store(at, acc.to(out.dtype.element_ty), mask=lines.inside[:, None] & (column < S.HEAD_DIM))
