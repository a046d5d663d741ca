"""Causal attention of many query tokens per row, bound by the tensor cores."""

import triton
import triton.language as tl

from .attention_tile import (
    ROWS,
    attend,
    cache_of,
    first_visible,
    lines_of,
    load_query,
    scales_of,
    slopes_of,
    store_output,
)

__all__ = ["prefill_kernel"]


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def prefill_kernel(
    qkv,
    qkv_stride,
    out,
    out_stride,
    k_cache,
    v_cache,
    k_stride,
    v_stride,
    query_start,
    context_len,
    row_slot,
    block_table,
    table_stride,
    first_row,
    num_rows,
    scale,
    slopes,
    sinks,
    k_scale,
    v_scale,
    S: tl.constexpr,
):
    """One program takes one tile of a row's queries. Row r's tiles begin with the one numbered
    r + floor(lines before the row / BLOCK_M), which leaves room for every row's incomplete tile."""
    query_start += first_row
    context_len += first_row
    row_slot += first_row
    # Last tiles see most keys: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    origin = tl.load(query_start)
    row = -1
    for some in range(0, num_rows, ROWS):
        index = some + tl.arange(0, ROWS)
        real = index < num_rows
        lines_before = (tl.load(query_start + index, mask=real, other=0) - origin) * S.GROUP
        row += tl.sum((real & (lines_before // S.BLOCK_M + index <= tile)).to(tl.int32))

    token = tl.load(query_start + row)
    query = tl.load(query_start + row + 1) - token
    m_tile = tile - row - (token - origin) * S.GROUP // S.BLOCK_M
    if m_tile * S.BLOCK_M >= query * S.GROUP:
        return
    context = tl.load(context_len + row)
    lines = lines_of(token, query, context, kv_head, m_tile, S)
    cache = cache_of(
        k_cache, v_cache, k_stride, v_stride, row_slot, block_table, table_stride, row, kv_head, context, S
    )
    q = load_query(qkv, qkv_stride, lines, S)
    scale, v_scale = scales_of(scale, k_scale, v_scale, k_cache, S)
    slope = slopes_of(slopes, lines, S)
    m = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    z = tl.full((S.BLOCK_M,), 0.0, tl.float32)
    acc = tl.full((S.BLOCK_M, S.BLOCK_D), 0.0, tl.float32)

    # All of the tile's tokens see the keys from the last token's first to the first token's last.
    before = context - query
    first_position = before + m_tile * S.BLOCK_M // S.GROUP
    last_position = tl.minimum(before + (m_tile * S.BLOCK_M + S.BLOCK_M - 1) // S.GROUP, context - 1)
    start = first_visible(first_position, S) // S.BLOCK_N
    full_stop = tl.maximum((first_position + 1) // S.BLOCK_N, start)
    full_start = start
    if S.WINDOW > 0:
        full_start = tl.minimum(tl.cdiv(first_visible(last_position, S), S.BLOCK_N), full_stop)
        m, z, acc = attend(m, z, acc, q, cache, start, full_start, lines, scale, slope, S, MASKED=True)
    m, z, acc = attend(m, z, acc, q, cache, full_start, full_stop, lines, scale, slope, S, MASKED=False)
    stop = last_position // S.BLOCK_N + 1
    m, z, acc = attend(m, z, acc, q, cache, full_stop, stop, lines, scale, slope, S, MASKED=True)
    store_output(out, out_stride, m, z, acc, lines, sinks, v_scale, S)
