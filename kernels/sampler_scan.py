"""The sampler's first kernel: one pass over the logits, a program per tile of a row."""

import triton
import triton.language as tl

from .logit_row import GREEDY, field_f32, field_u64, raw_logits, row_of, shaped_logits
from .noise import gumbel, noise_key
from .slot_params import MIN_P, NUM_LOGPROBS, SEED, TEMPERATURE, TOP_K, TOP_P

__all__ = [
    "BEST",
    "BEST_ID",
    "FIELDS",
    "GROUP",
    "MAX",
    "RAW_MAX",
    "RAW_SUM",
    "SUM",
    "is_filtered",
    "scan_kernel",
]

GROUP = tl.constexpr(64)
"""Ids that share a maximum."""

# What is left of a tile, float32 each.
RAW_MAX = tl.constexpr(0)  # of x; NaN where the row cannot be drawn from
RAW_SUM = tl.constexpr(1)  # of exp(x - RAW_MAX), if log-probabilities are wanted
MAX = tl.constexpr(2)  # of y
SUM = tl.constexpr(3)  # of exp(y - MAX), if the row is filtered
BEST = tl.constexpr(4)  # the best score, if the row is not filtered
BEST_ID = tl.constexpr(5)  # its id, as bits
FIELDS = tl.constexpr(6)


@triton.jit
def is_filtered(row):
    """Whether top-k, top-p or min-p may leave ids out."""
    top_k = tl.load(row.record + TOP_K)
    cuts = (top_k > 0) & (top_k < row.vocab)
    cuts |= (field_f32(row.record, TOP_P) < 1.0) | (field_f32(row.record, MIN_P) > 0.0)
    return cuts & (field_f32(row.record, TEMPERATURE) >= GREEDY)


@triton.jit
def _sum_of_weights(values, largest):
    return tl.sum(tl.exp(values - tl.where(largest == float("-inf"), 0.0, largest)))


@triton.jit
def scan_kernel(
    logits, stride, vocab, records, slots, positions, tiles, maxima, num_tiles, BLOCK: tl.constexpr
):
    """Fills `tiles` [S, num_tiles, FIELDS] and `maxima` [S, 2, groups]: of raw logits x, and of y, which is
    drawn from."""
    tile, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + s)
    if slot < 0:
        return
    row = row_of(logits, stride, records, slot, positions, s, vocab)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = raw_logits(row, ids)
    y = shaped_logits(row, x, ids)

    GROUPS: tl.constexpr = BLOCK // GROUP
    tiles += (s * num_tiles + tile) * FIELDS
    maxima += s * 2 * num_tiles * GROUPS + tile * GROUPS + tl.arange(0, GROUPS)
    bad = (x != x) | (x == float("inf")) | (y != y) | (y == float("inf"))
    raw_largest, largest = tl.max(x), tl.max(y)
    tl.store(tiles + RAW_MAX, tl.where(tl.max(bad.to(tl.int32)) > 0, float("nan"), raw_largest))
    tl.store(tiles + MAX, largest)
    if tl.load(row.record + NUM_LOGPROBS) >= 0:
        tl.store(tiles + RAW_SUM, _sum_of_weights(x, raw_largest))
        tl.store(maxima, tl.max(tl.reshape(x, (GROUPS, GROUP)), axis=1))
    if is_filtered(row):
        tl.store(tiles + SUM, _sum_of_weights(y, largest))
        tl.store(maxima + num_tiles * GROUPS, tl.max(tl.reshape(y, (GROUPS, GROUP)), axis=1))
    else:
        if field_f32(row.record, TEMPERATURE) >= GREEDY:
            y += gumbel(noise_key(field_u64(row.record, SEED), row.position), ids)
        best, at = tl.max(y, axis=0, return_indices=True)
        tl.store(tiles + BEST, best)
        tl.store((tiles + BEST_ID).to(tl.pointer_type(tl.int32)), tile * BLOCK + at)
