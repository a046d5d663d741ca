"""The persistent batch: what the worker knows of every slot, and the step's input arrays.

Everything is allocated once. A plan is a set of differences; in the pure decode case preparing a step
takes about ten small array operations, whatever the number of sequences.
"""

from typing import NamedTuple

import numpy as np
from msgspec import msgpack
from numpy.typing import NDArray

from ..wire.plan import PLAN_HEADER, RELAY, ROW_FIELDS, SAMPLE, SlotInit

__all__ = ["Batch", "Plan", "parse_plan"]

Ints = NDArray[np.int32]

_INITS = msgpack.Decoder(list[SlotInit])


class Plan(NamedTuple):
    """A plan's parts, as views of its bytes; the layout is drawn in `wire/plan.py`."""

    epoch: int
    step: int
    rows: Ints
    updates: Ints
    copies: Ints
    tokens: Ints
    inits: list[SlotInit]


def parse_plan(data: bytes) -> Plan:
    """Raises ValueError if `data` is not one whole plan: a defect of the host, not an input error."""
    if len(data) < 4 * PLAN_HEADER:
        raise ValueError(f"a plan of {len(data)} bytes has no header")
    epoch, step, rows, tokens, updates, copies, payload, _ = np.frombuffer(
        data, np.int32, PLAN_HEADER
    ).tolist()
    sizes = (PLAN_HEADER, rows * ROW_FIELDS, updates * 3, copies * 2, tokens)
    ends = np.cumsum(sizes).tolist()
    if min(*sizes, payload) < 0 or len(data) != 4 * ends[-1] + payload:
        raise ValueError(f"plan {step} has {len(data)} bytes, its header tells {4 * ends[-1] + payload}")
    words = np.frombuffer(data, np.int32, ends[-1])
    return Plan(
        epoch,
        step,
        words[ends[0] : ends[1]].reshape(rows, ROW_FIELDS),
        words[ends[1] : ends[2]].reshape(updates, 3),
        words[ends[2] : ends[3]].reshape(copies, 2),
        words[ends[3] :],
        _INITS.decode(memoryview(data)[4 * ends[-1] :]) if payload else [],
    )


class Batch:
    """Slot state and step inputs; the native step reads these very arrays."""

    def __init__(self, slots: int, max_tokens: int, blocks_per_slot: int) -> None:
        self.slots = slots
        self.max_tokens = max_tokens
        self.block_table = np.zeros((slots, blocks_per_slot), np.int32)
        self.last_token = np.zeros(slots, np.int32)
        self.token_ids = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.token_row = np.zeros(max_tokens, np.int32)
        self.query_start = np.zeros(slots + 1, np.int32)
        self.context_len = np.zeros(slots, np.int32)
        self.row_slot = np.zeros(slots, np.int32)
        self.sample_rows = np.zeros(slots, np.int32)
        self.num_tokens = 0
        self.num_rows = 0
        self.sample_slots: Ints = np.zeros(0, np.int32)
        """[samples] slot of each row that is sampled from."""
        self.sample_positions: Ints = np.zeros(0, np.int32)
        """[samples] position of the token that each of them draws."""
        self._count = np.arange(max(slots, max_tokens) + 1, dtype=np.int32)

    @property
    def num_samples(self) -> int:
        return len(self.sample_slots)

    def prepare(self, plan: Plan) -> None:
        """Fills the step's inputs; raises ValueError where the plan does not fit the batch."""
        if len(plan.updates):
            slot, index, block = plan.updates.T
            self.block_table[slot, index] = block
        rows = len(plan.rows)
        if rows > self.slots:
            raise ValueError(f"plan {plan.step} has {rows} rows for {self.slots} slots")
        slots, starts, counts, flags = plan.rows.T
        relayed = int(np.count_nonzero(flags & RELAY))
        tokens = relayed + len(plan.tokens)
        if tokens > self.max_tokens:
            raise ValueError(f"plan {plan.step} has {tokens} tokens for a budget of {self.max_tokens}")
        self.num_rows, self.num_tokens = rows, tokens
        self.row_slot[:rows] = slots
        ends = self.context_len[:rows]
        np.add(starts, counts, out=ends)
        self.token_ids[:relayed] = self.last_token[slots[:relayed]]
        if relayed == rows:
            # One token per row: the offsets are 0, 1, 2, ...
            self.query_start[: rows + 1] = self._count[: rows + 1]
            self.token_row[:tokens] = self._count[:tokens]
            self.positions[:tokens] = starts
        else:
            np.cumsum(counts, out=self.query_start[1 : rows + 1])
            if self.query_start[rows] != tokens or counts.min() < 1:
                raise ValueError(f"plan {plan.step} has {tokens} tokens, its rows {counts.sum()}")
            row = np.repeat(self._count[:rows], counts)
            self.token_row[:tokens] = row
            self.positions[:tokens] = (starts - self.query_start[:rows])[row] + self._count[:tokens]
            self.token_ids[relayed:tokens] = plan.tokens
        sampled = np.flatnonzero(flags & SAMPLE)
        self.sample_slots = slots[sampled]
        self.sample_positions = ends[sampled]
        self.sample_rows[: len(sampled)] = self.query_start[sampled + 1] - 1
