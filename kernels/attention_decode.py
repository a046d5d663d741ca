"""Attention of few query tokens per row, bound by the bandwidth of the cache.

The work is all (row, KV head, tile of queries) one after the other, each as many steps long as it has
tiles of keys. Every program takes an equal share of the steps, wherever it begins and ends, so the grid
depends on nothing but the GPU and one captured launch serves all lengths. What a program does not see
from end to end it leaves as a partial result; the program that arrives last joins them.
"""

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

__all__ = ["decode_kernel"]


@triton.jit
def _work(query_start, context_len, row, num_rows, S: tl.constexpr):
    """Of rows: the first tile of keys, how many, and how many of queries.

    A row without context has one tile of keys, none of them visible, so that its output becomes zero.
    """
    real = row < num_rows
    query_stop = tl.load(query_start + row + 1, mask=real, other=0)
    query = query_stop - tl.load(query_start + row, mask=real, other=0)
    context = tl.load(context_len + row, mask=real, other=0)
    first = first_visible(context - query, S) // S.BLOCK_N
    return first, tl.maximum(tl.cdiv(context, S.BLOCK_N) - first, 1), tl.cdiv(query * S.GROUP, S.BLOCK_M)


@triton.jit
def _join(partial, partial_sums, first, last, second, lines, S: tl.constexpr):
    """Maximum, sum and output of what the programs `first` to `last` left; `first` did in its second place
    if `second`."""
    line = tl.arange(0, S.BLOCK_M)
    at = line[:, None] * S.BLOCK_D + tl.arange(0, S.BLOCK_D)[None, :]
    m = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    z = tl.full((S.BLOCK_M,), 0.0, tl.float32)
    acc = tl.full((S.BLOCK_M, S.BLOCK_D), 0.0, tl.float32)
    for program in tl.range(first, last + 1, num_stages=3):
        place = 2 * program + tl.where(program == first, second, 0)
        sums = partial_sums + place * (2 * S.BLOCK_M) + line
        other_m = tl.load(sums, cache_modifier=".cg")
        other_z = tl.load(sums + S.BLOCK_M, cache_modifier=".cg")
        of_place = partial + place.to(tl.int64) * (S.BLOCK_M * S.BLOCK_D) + at
        other = tl.load(of_place, mask=lines.inside[:, None], other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, other_m)
        base = tl.where(top == float("-inf"), 0.0, top)
        mine, its = tl.exp2(m - base), tl.exp2(other_m - base)
        m, z = top, z * mine + other_z * its
        acc = acc * mine[:, None] + other * its[:, None]
    return m, z, acc


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def decode_kernel(
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
    partial,
    partial_sums,
    counters,
    S: tl.constexpr,
):
    """Programs share all steps out; see above. P of them write `partial` [P, 2, BLOCK_M, BLOCK_D] and
    `partial_sums` [P, 2, 2, BLOCK_M], and count arrivals in `counters` [P]. A program can leave two parts: of
    the unit in whose midst it begins, and of the one in whose midst it ends."""
    query_start += first_row
    context_len += first_row
    row_slot += first_row
    program = tl.program_id(0)
    total = 0
    for some in range(0, num_rows, ROWS):
        _, tiles, m_tiles = _work(query_start, context_len, some + tl.arange(0, ROWS), num_rows, S)
        total += tl.sum(tiles * m_tiles)
    total *= S.KV_HEADS
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), S.MIN_TILES)
    begin = program * share
    end = tl.minimum(begin + share, total)
    if begin >= end:
        return

    # The row in which the share begins, and the steps before it.
    row, row_begin, seen = 0, 0, 0
    for some in range(0, num_rows, ROWS):
        index = some + tl.arange(0, ROWS)
        _, tiles, m_tiles = _work(query_start, context_len, index, num_rows, S)
        steps = tiles * m_tiles * S.KV_HEADS
        until = seen + tl.cumsum(steps)
        passed = (until <= begin) & (index < num_rows)
        row += tl.sum(passed.to(tl.int32))
        row_begin = tl.maximum(row_begin, tl.max(tl.where(passed, until, 0)))
        seen += tl.sum(steps)

    scale, v_scale = scales_of(scale, k_scale, v_scale, k_cache, S)
    at = begin
    while at < end:
        first, tiles, m_tiles = _work(query_start, context_len, row, num_rows, S)
        row_end = row_begin + tiles * m_tiles * S.KV_HEADS
        if at < row_end:
            unit = (at - row_begin) // tiles
            unit_begin = row_begin + unit * tiles
            unit_end = unit_begin + tiles
            stop = tl.minimum(end, unit_end)
            kv_head = unit // m_tiles
            token = tl.load(query_start + row)
            query = tl.load(query_start + row + 1) - token
            context = tl.load(context_len + row)
            lines = lines_of(token, query, context, kv_head, unit % m_tiles, S)
            cache = cache_of(
                k_cache,
                v_cache,
                k_stride,
                v_stride,
                row_slot,
                block_table,
                table_stride,
                row,
                kv_head,
                context,
                S,
            )
            q = load_query(qkv, qkv_stride, lines, S)
            m = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
            z = tl.full((S.BLOCK_M,), 0.0, tl.float32)
            acc = tl.full((S.BLOCK_M, S.BLOCK_D), 0.0, tl.float32)
            start = first + at - unit_begin
            slope = slopes_of(slopes, lines, S)
            # Masks cost nothing beside the loads; a loop without them would drain the loads before its end.
            m, z, acc = attend(
                m, z, acc, q, cache, start, start + stop - at, lines, scale, slope, S, MASKED=True
            )
            if stop - at == tiles:
                store_output(out, out_stride, m, z, acc, lines, sinks, v_scale, S)
            else:
                # First the part with which the share begins, then the one with which it ends.
                place = 2 * program + (at != begin).to(tl.int32)
                line = tl.arange(0, S.BLOCK_M)
                sums = partial_sums + place * (2 * S.BLOCK_M) + line
                tl.store(sums, m)
                tl.store(sums + S.BLOCK_M, z)
                here = line[:, None] * S.BLOCK_D + tl.arange(0, S.BLOCK_D)[None, :]
                here += place.to(tl.int64) * (S.BLOCK_M * S.BLOCK_D)
                tl.store(partial + here, acc, mask=lines.inside[:, None])
                # No program is the last of two units that are split, so the last one's counter is the unit's.
                first_program, last_program = unit_begin // share, (unit_end - 1) // share
                tl.debug_barrier()  # all threads have stored before one of them says so
                arrived = tl.atomic_add(counters + last_program, 1, sem="acq_rel")
                if arrived == last_program - first_program:
                    tl.store(counters + last_program, 0)
                    second = (unit_begin != first_program * share).to(tl.int32)
                    m, z, acc = _join(partial, partial_sums, first_program, last_program, second, lines, S)
                    store_output(out, out_stride, m, z, acc, lines, sinks, v_scale, S)
            at = stop
        if at == row_end:
            row_begin = row_end
            row += 1
