"""One row of logits as the sampler sees it, and the order of its values."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .slot_params import (
    ALLOWED,
    BANNED,
    BIAS,
    COUNTS,
    FREQUENCY,
    MIN_LEN,
    PRESENCE,
    PROMPT,
    RECORD_WORDS,
    REPETITION,
    TEMPERATURE,
)

__all__ = [
    "GREEDY",
    "Row",
    "field_f32",
    "field_u64",
    "key_of",
    "kth_largest",
    "raw_logits",
    "row_of",
    "shaped_logits",
    "value_of",
]

GREEDY = tl.constexpr(1e-5)
WORDS = tl.constexpr(RECORD_WORDS)


class Row(NamedTuple):
    """What a kernel passes on about a row; the members are Triton's values."""

    logits: Any
    """Pointer to the first of them."""
    record: Any
    """Pointer to the slot's record."""
    position: Any
    """Of the token to be drawn."""
    vocab: Any


@triton.jit
def row_of(logits, stride, params, slot, positions, s, vocab):
    return Row(logits + s * stride, params + slot.to(tl.int64) * WORDS, tl.load(positions + s), vocab)


@triton.jit
def field_f32(record, index):
    return tl.load(record + index).to(tl.float32, bitcast=True)


@triton.jit
def field_u64(record, index):
    return tl.load(record.to(tl.pointer_type(tl.uint64)) + index)


@triton.jit
def _bits(address, ids, inside):
    words = address.to(tl.pointer_type(tl.int32))
    return ((tl.load(words + (ids >> 5), mask=inside, other=0) >> (ids & 31)) & 1) != 0


@triton.jit
def raw_logits(row, ids):
    """Float32; -inf beyond the vocabulary."""
    return tl.load(row.logits + ids, mask=ids < row.vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def shaped_logits(row, x, ids):
    """What is drawn from: the raw logits x of the ids after penalties, bias, masks and temperature."""
    record = row.record
    inside = ids < row.vocab
    y = x
    counts, prompt = field_u64(record, COUNTS), field_u64(record, PROMPT)
    if (counts != 0) | (prompt != 0):
        times = tl.zeros_like(ids)
        seen = times > 0
        if counts != 0:
            times = tl.load(counts.to(tl.pointer_type(tl.int32)) + ids, mask=inside, other=0)
        if prompt != 0:
            seen = _bits(prompt, ids, inside)
        repetition = field_f32(record, REPETITION)
        scaled = tl.where(y > 0.0, tl.math.div_rn(y, tl.zeros_like(y) + repetition), y * repetition)
        y = tl.where(seen | (times > 0), scaled, y)
        present = tl.where(times > 0, field_f32(record, PRESENCE), 0.0)
        y -= field_f32(record, FREQUENCY) * times.to(tl.float32) + present
    bias = field_u64(record, BIAS)
    if bias != 0:
        y += tl.load(bias.to(tl.pointer_type(tl.float32)) + ids, mask=inside, other=0.0)
    allowed = field_u64(record, ALLOWED)
    if allowed != 0:
        y = tl.where(_bits(allowed, ids, inside), y, float("-inf"))
    banned = field_u64(record, BANNED)
    if (banned != 0) & (row.position < tl.load(record + MIN_LEN)):
        y = tl.where(_bits(banned, ids, inside), float("-inf"), y)
    temperature = field_f32(record, TEMPERATURE)
    if temperature >= GREEDY:
        y = tl.math.div_rn(y, tl.zeros_like(y) + temperature)
    return y


@triton.jit
def key_of(x):
    """Floats as int64 in the same order, with no gap between neighbours."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(values, k, largest):
    """The k-th largest of a block of values, of which there are at least k."""
    low, high = key_of(tl.full((), float("-inf"), tl.float32)), key_of(largest) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum((values >= value_of(middle)).to(tl.int32)) >= k:
            low = middle
        else:
            high = middle
    return value_of(low)
