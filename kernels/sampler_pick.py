"""The sampler's second kernel: a program per row joins the tiles, filters, draws and reports."""

import triton
import triton.language as tl

from .candidates import END, find_cut, gather, read, weights_above
from .logit_row import field_f32, field_u64, key_of, kth_largest, raw_logits, row_of, value_of
from .noise import gumbel, noise_key
from .sampler_scan import BEST, BEST_ID, FIELDS, GROUP, MAX, RAW_MAX, RAW_SUM, SUM, is_filtered
from .slot_params import COUNTS, MIN_P, NUM_LOGPROBS, SEED, TOP_K, TOP_P

__all__ = ["pick_kernel"]

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The least finite float32."""


@triton.jit
def _kth_maximum(maxima, groups, k, largest, MAX_GROUPS: tl.constexpr):
    """A value that the k largest of the row are not below: k groups have a maximum at or above it."""
    least = tl.full((), float("-inf"), tl.float32)
    if k <= groups:
        group = tl.arange(0, MAX_GROUPS)
        values = tl.load(maxima + group, mask=group < groups, other=float("-inf"))
        least = kth_largest(values, k, largest)
    return least


@triton.jit
def _draw(candidates, cut, ties, largest, BLOCK: tl.constexpr):
    """The best score among what lies above the cut, the first `ties` ids at it, and min-p's threshold."""
    record = candidates.row.record
    key = noise_key(field_u64(record, SEED), candidates.row.position)
    min_p = field_f32(record, MIN_P)
    best, token, seen = float("-inf"), -1, 0
    for block in range(tl.cdiv(candidates.size, BLOCK)):
        y, ids = read(candidates, block, False, BLOCK)
        at_cut = (y == cut).to(tl.int32)
        order = seen + tl.cumsum(at_cut, 0)
        seen += tl.sum(at_cut)
        kept = (y > cut) | ((y == cut) & (order <= ties))
        kept &= tl.exp(y - largest) >= min_p
        score = tl.where(kept, y + gumbel(key, ids), float("-inf"))
        top = tl.max(score)
        if top > best:
            best = top
            token = tl.min(tl.where(score == top, ids, END))
    return token


@triton.jit
def _ties(missing, weight, most):
    """How many ids of equal weight supply the missing mass, at least one."""
    needed = tl.ceil(missing / weight.to(tl.float64))
    return tl.maximum(tl.minimum(needed, most.to(tl.float64)), 1.0).to(tl.int32)


@triton.jit
def _draw_filtered(
    row,
    listed,
    listed_ids,
    room,
    tiles,
    maxima,
    total,
    largest,
    BLOCK: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
):
    """`total` is the sum of exp(y - largest) over the row."""
    top_p, min_p = field_f32(row.record, TOP_P), field_f32(row.record, MIN_P)
    top_k = tl.load(row.record + TOP_K)
    by_k = (top_k > 0) & (top_k < row.vocab)
    # Masked ids are never listed: a grammar leaves few, and those shall fit.
    least = tl.full((), LOWEST, tl.float32)
    if by_k:
        groups = tl.cdiv(row.vocab, BLOCK) * (BLOCK // GROUP)
        least = tl.maximum(_kth_maximum(maxima, groups, top_k, largest, MAX_GROUPS), least)
    else:
        # All ids that weigh less than an n-th of what may be left out can be left out together.
        least_weight = tl.maximum((1.0 - top_p) * total / row.vocab, min_p) * 0.999
        if least_weight > 0.0:
            least = tl.maximum(largest + tl.log(least_weight), least)
    found = gather(row, listed, listed_ids, room, least, tiles + MAX, FIELDS, False, BLOCK)

    cut, ties = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
    if by_k:
        cut, above = find_cut(found, least, top_k.to(tl.float64), largest, True, BLOCK)
        ties = top_k - above.to(tl.int32)
    if top_p < 1.0:
        # Without top-k the cut is -inf and has no weight; what is not listed counts in the total alone.
        start = value_of(key_of(cut) + by_k)
        above = tl.sum(weights_above(found, tl.full((1,), 0.0, tl.float32) + start, largest, False, BLOCK))
        mass = above + ties * tl.exp(cut - largest).to(tl.float64)
        target = tl.minimum(top_p * tl.where(by_k, mass, total.to(tl.float64)), mass)
        of_k, ties_of_k = cut, ties
        cut, above = find_cut(found, tl.maximum(cut, least), target, largest, False, BLOCK)
        ties = _ties(target - above, tl.exp(cut - largest), row.vocab)
        if by_k & (cut == of_k):
            ties = tl.minimum(ties, ties_of_k)
    return _draw(found, cut, ties, largest, BLOCK)


@triton.jit
def _list_top(found, n, top_ids, top_logprobs, log_total, BLOCK: tl.constexpr):
    """The n largest of the candidates' raw logits, one after the other."""
    last, last_id = float("inf"), -1
    for i in range(n):
        best, best_id = tl.full((), float("-inf"), tl.float32), END
        for block in range(tl.cdiv(found.size, BLOCK)):
            x, ids = read(found, block, True, BLOCK)
            after = (x < last) | ((x == last) & (ids > last_id))
            top = tl.max(tl.where(after, x, float("-inf")))
            top_id = tl.min(tl.where(after & (x == top), ids, END))
            if (top > best) | ((top == best) & (top_id < best_id)):
                best, best_id = top, top_id
        tl.store(top_ids + i, tl.where(best_id == END, -1, best_id))
        tl.store(top_logprobs + i, (best.to(tl.float64) - log_total).to(tl.float32))
        last, last_id = best, best_id


@triton.jit
def _rank(row, token, value, raw_max, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    rank = 1
    for tile in range(tl.cdiv(row.vocab, BLOCK)):
        if tl.load(raw_max + tile * FIELDS) >= value:
            ids = tile * BLOCK + tl.arange(0, BLOCK)
            x = raw_logits(row, ids)
            rank += tl.sum(((x > value) | ((x == value) & (ids < token))).to(tl.int32))
    return rank


@triton.jit
def pick_kernel(
    logits,
    stride,
    vocab,
    records,
    slots,
    positions,
    tiles,
    maxima,
    num_tiles,
    listed,
    listed_ids,
    room,
    last_token,
    tokens,
    logprob,
    rank,
    top_ids,
    top_logprobs,
    NUM_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_TILES: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + s)
    if slot < 0:
        return
    row = row_of(logits, stride, records, slot, positions, s, vocab)
    groups = num_tiles * (BLOCK // GROUP)
    tiles += s * num_tiles * FIELDS
    maxima += s * 2 * groups
    listed += s * room
    listed_ids += s * room

    lane = tl.arange(0, MAX_TILES)
    of_tile, inside = tiles + lane * FIELDS, lane < num_tiles
    raw_max = tl.load(of_tile + RAW_MAX, mask=inside, other=float("-inf"))
    tile_max = tl.load(of_tile + MAX, mask=inside, other=float("-inf"))
    is_sound = tl.max((raw_max != raw_max).to(tl.int32)) == 0
    largest = tl.max(tile_max)
    token = -1
    if is_sound & (largest > float("-inf")):
        if is_filtered(row):
            sums = tl.load(of_tile + SUM, mask=inside, other=0.0)
            total = tl.sum(sums * tl.exp(tile_max - largest))
            token = _draw_filtered(
                row, listed, listed_ids, room, tiles, maxima + groups, total, largest, BLOCK, MAX_GROUPS
            )
        else:
            best = tl.load(of_tile + BEST, mask=inside, other=float("-inf"))
            at = tl.argmax(best, axis=0)
            token = tl.load((tiles + at * FIELDS + BEST_ID).to(tl.pointer_type(tl.int32)))
    tl.store(tokens + s, token)
    tl.store(last_token + slot, token)

    n = tl.minimum(tl.load(row.record + NUM_LOGPROBS), NUM_TOP)
    top_ids += s * NUM_TOP
    top_logprobs += s * NUM_TOP
    if (n >= 0) & (token < 0):
        tl.store(logprob + s, float("nan"))
        tl.store(rank + s, 0)
        for i in range(n):
            tl.store(top_ids + i, -1)
            tl.store(top_logprobs + i, float("nan"))
    elif n >= 0:
        raw_largest = tl.max(raw_max)
        sums = tl.load(of_tile + RAW_SUM, mask=inside, other=0.0)
        total = tl.sum(sums * tl.exp(raw_max - raw_largest)).to(tl.float64)
        log_total = raw_largest.to(tl.float64) + tl.log(total)
        value = raw_logits(row, token)
        tl.store(logprob + s, (value.to(tl.float64) - log_total).to(tl.float32))
        tl.store(rank + s, _rank(row, token, value, tiles + RAW_MAX, FIELDS, BLOCK))
        if n > 0:
            least = _kth_maximum(maxima, groups, n, raw_largest, MAX_GROUPS)
            found = gather(row, listed, listed_ids, room, least, tiles + RAW_MAX, FIELDS, True, BLOCK)
            _list_top(found, n, top_ids, top_logprobs, log_total, BLOCK)

    counts = field_u64(row.record, COUNTS)
    if (counts != 0) & (token >= 0):
        count = counts.to(tl.pointer_type(tl.int32)) + token
        tl.store(count, tl.load(count) + 1)
