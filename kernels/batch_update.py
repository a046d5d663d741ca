"""A plan's differences, applied to the persistent batch on the device."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import get_config
from .slot_params import RECORD_WORDS

__all__ = ["DeviceBatch", "batch_update"]

HEADER = tl.constexpr(8)
SAMPLE = tl.constexpr(1)
RELAY = tl.constexpr(2)


class DeviceBatch(NamedTuple):
    """The batch's int32 arrays, allocated once. Those of slots persist; the others are a step's inputs."""

    block_table: torch.Tensor
    """[slots, stride]"""
    last_token: torch.Tensor
    """[slots] what the sampler drew last; -1 where it failed."""
    slot_params: torch.Tensor
    """[slots, RECORD_WORDS] records of `slot_params.py`."""
    token_ids: torch.Tensor
    """[tokens]"""
    positions: torch.Tensor
    """[tokens]"""
    token_row: torch.Tensor
    """[tokens]"""
    query_start: torch.Tensor
    """[rows + 1]"""
    context_len: torch.Tensor
    """[rows]"""
    row_slot: torch.Tensor
    """[rows]"""
    sample_rows: torch.Tensor
    """[rows] index of each sampled token."""
    sample_slots: torch.Tensor
    """[rows] slot of each sampled row; -1 for padding."""
    sample_positions: torch.Tensor
    """[rows] position of the token that each sampled row draws."""

    @classmethod
    def zeros(cls, slots: int, stride: int, tokens: int, device: torch.device) -> "DeviceBatch":
        """Of as many rows as slots."""

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            block_table=ints(slots, stride),
            last_token=ints(slots),
            slot_params=ints(slots, RECORD_WORDS),
            token_ids=ints(tokens),
            positions=ints(tokens),
            token_row=ints(tokens),
            query_start=ints(slots + 1),
            context_len=ints(slots),
            row_slot=ints(slots),
            sample_rows=ints(slots),
            sample_slots=ints(slots),
            sample_positions=ints(slots),
        )


@triton.jit
def batch_update_kernel(
    plan,
    block_table,
    table_stride,
    last_token,
    slot_params,
    token_ids,
    positions,
    token_row,
    query_start,
    context_len,
    row_slot,
    sample_rows,
    sample_slots,
    sample_positions,
    MAX_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r writes row r; block updates and records are dealt out to all programs.

    Every program sums over the rows before its own, which saves a second launch.
    """
    row = tl.program_id(0)
    programs = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    num_rows = tl.load(plan + 2)
    num_updates = tl.load(plan + 4)
    rows = plan + HEADER
    updates = rows + 4 * num_rows
    tokens = updates + 3 * num_updates + 2 * tl.load(plan + 5)
    records = tokens + tl.load(plan + 3)

    for first in range(row * BLOCK, num_updates, programs * BLOCK):
        update = first + lane
        inside = update < num_updates
        slot = tl.load(updates + 3 * update, mask=inside, other=0).to(tl.int64)
        index = tl.load(updates + 3 * update + 1, mask=inside, other=0)
        block = tl.load(updates + 3 * update + 2, mask=inside, other=0)
        tl.store(block_table + slot * table_stride + index, block, mask=inside)
    for i in range(row, tl.load(plan + 7), programs):
        word = tl.arange(0, WORDS)
        slot = tl.load(records + i * (WORDS + 1))
        tl.store(slot_params + slot * WORDS + word, tl.load(records + i * (WORDS + 1) + 1 + word))

    other = tl.arange(0, MAX_ROWS)
    flags = tl.load(rows + 4 * other + 3, mask=other < num_rows, other=0)
    counts = tl.load(rows + 4 * other + 2, mask=other < tl.minimum(row, num_rows), other=0)
    start = tl.sum(counts)
    if row == 0:
        tl.store(query_start, 0)
    if row < num_rows:
        slot = tl.load(rows + 4 * row)
        position = tl.load(rows + 4 * row + 1)
        count = tl.load(rows + 4 * row + 2)
        flag = tl.load(rows + 4 * row + 3)
        tl.store(query_start + row + 1, start + count)
        tl.store(context_len + row, position + count)
        tl.store(row_slot + row, slot)
        relayed = tl.sum((flags & RELAY) // RELAY)
        for first in range(0, count, BLOCK):
            offset = first + lane
            inside = offset < count
            if flag & RELAY:
                # A draw that failed must not be looked up; its sequence ends when the host hears of it.
                token = tl.maximum(tl.load(last_token + slot), 0) + tl.zeros_like(offset)
            else:
                token = tl.load(tokens + start - relayed + offset, mask=inside, other=0)
            tl.store(token_ids + start + offset, token, mask=inside)
            tl.store(positions + start + offset, position + offset, mask=inside)
            tl.store(token_row + start + offset, row + tl.zeros_like(offset), mask=inside)
        if flag & SAMPLE:
            sample = tl.sum(tl.where(other < row, flags & SAMPLE, 0))
            tl.store(sample_rows + sample, start + count - 1)
            tl.store(sample_slots + sample, slot)
            tl.store(sample_positions + sample, position + count)
    else:
        # Padding: one token that sees nothing, writes nothing and is not sampled from.
        token = start + row - num_rows
        tl.store(query_start + row + 1, token + 1)
        tl.store(context_len + row, 0)
        tl.store(row_slot + row, 0)
        tl.store(token_ids + token, 0)
        tl.store(positions + token, 0)
        tl.store(token_row + token, row)
    if row >= tl.sum(flags & SAMPLE):
        tl.store(sample_rows + row, 0)
        tl.store(sample_slots + row, -1)
        tl.store(sample_positions + row, 0)


def batch_update(batch: DeviceBatch, plan: torch.Tensor, rows: int) -> None:
    """Applies `plan` and fills the step's inputs for `rows` rows, those beyond the plan's as padding.

    `plan` int32, on the device: the words of `asyncengine/wire/plan.py` up to the payload, with word 7
    the number of slot records that follow them, each a slot and then RECORD_WORDS words. `rows` is at
    least the plan's and at least 1. Padding rows have a token each, after the plan's. No two updates or
    records of a plan are for the same place.
    """
    config = get_config("batch_update", plan.device)
    batch_update_kernel[(rows,)](
        plan,
        batch.block_table,
        batch.block_table.stride(0),
        batch.last_token,
        batch.slot_params,
        batch.token_ids,
        batch.positions,
        batch.token_row,
        batch.query_start,
        batch.context_len,
        batch.row_slot,
        batch.sample_rows,
        batch.sample_slots,
        batch.sample_positions,
        MAX_ROWS=triton.next_power_of_2(batch.context_len.shape[0]),
        WORDS=RECORD_WORDS,
        BLOCK=config.block["BLOCK"],
        **config.options,
    )
