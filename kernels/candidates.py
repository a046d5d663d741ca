"""The ids of a row that may be drawn or reported, listed or, where they do not fit, the whole row again."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logit_row import Row, key_of, raw_logits, shaped_logits, value_of

__all__ = ["END", "Candidates", "find_cut", "gather", "read", "weights_above"]

END = tl.constexpr(0x7FFFFFFF)
"""In place of an id past the last one."""

WAYS = tl.constexpr(8)


class Candidates(NamedTuple):
    """Values and ids in blocks of BLOCK, ids ascending; the members are Triton's values."""

    row: Row
    listed: Any
    """Pointer to the listed values."""
    listed_ids: Any
    """Pointer to their ids."""
    is_listed: Any
    """Whether they fit the list; otherwise the row is read."""
    size: Any
    """Listed ids, or the vocabulary."""


@triton.jit
def gather(
    row,
    listed,
    listed_ids,
    room,
    least,
    tile_max,
    FIELDS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The candidates whose value is at least `least`; `tile_max` points to the first tile's maximum.

    RAW takes raw logits, else what is drawn from.
    """
    found = 0
    tl.debug_barrier()  # whoever read the list before is done
    for tile in range(tl.cdiv(row.vocab, BLOCK)):
        if tl.load(tile_max + tile * FIELDS) >= least:
            at = tile * BLOCK + tl.arange(0, BLOCK)
            value = raw_logits(row, at)
            if not RAW:
                value = shaped_logits(row, value, at)
            keep = (value >= least) & (at < row.vocab)
            place = found + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(listed + place, value, mask=keep & (place < room))
            tl.store(listed_ids + place, at, mask=keep & (place < room))
            found += tl.sum(keep.to(tl.int32))
    tl.debug_barrier()  # the list is read by other threads than wrote it
    return Candidates(row, listed, listed_ids, found <= room, tl.where(found <= room, found, row.vocab))


@triton.jit
def read(candidates, block, RAW: tl.constexpr, BLOCK: tl.constexpr):
    """(values, ids) of a block; -inf and a large id past the end."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < candidates.size
    if candidates.is_listed:
        value = tl.load(candidates.listed + at, mask=inside, other=float("-inf"))
        ids = tl.load(candidates.listed_ids + at, mask=inside, other=END)
    else:
        value = raw_logits(candidates.row, at)
        if not RAW:
            value = shaped_logits(candidates.row, value, at)
        ids = tl.where(inside, at, END)
    return value, ids


@triton.jit
def weights_above(candidates, cuts, largest, counting, BLOCK: tl.constexpr):
    """For each of the cuts how many candidates are at least as large; if not counting, the sum of their
    exp(y - largest). Float64."""
    totals = tl.zeros_like(cuts).to(tl.float64)
    for block in range(tl.cdiv(candidates.size, BLOCK)):
        y, _ = read(candidates, block, False, BLOCK)
        weight = tl.where(counting, 1.0, tl.exp(y - largest))
        totals += tl.sum(tl.where(y[:, None] >= cuts[None, :], weight[:, None], 0.0), axis=0).to(tl.float64)
    return totals


@triton.jit
def find_cut(candidates, least, target, largest, counting, BLOCK: tl.constexpr):
    """(cut, above): the largest value down to which the candidates weigh at least `target`, and the weight
    of what is larger. `least` is not above that value.

    Each pass over the candidates splits the interval of floats in eight.
    """
    low, high = key_of(least), key_of(largest) + 1
    above = tl.full((), 0.0, tl.float64)
    while high - low > 1:
        step = tl.maximum((high - low) // WAYS, 1)
        keys = tl.minimum(low + step * (1 + tl.arange(0, WAYS)), high)
        totals = weights_above(candidates, value_of(keys), largest, counting, BLOCK)
        low += step * tl.sum((totals >= target).to(tl.int64))
        high = tl.minimum(low + step, high)
        above = tl.max(tl.where(totals < target, totals, above))
    return value_of(low), above
