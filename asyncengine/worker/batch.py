"""The persistent batch: what the worker knows of every slot, and the step's input arrays.

Everything is allocated once. A plan is a set of differences; in the pure decode case preparing a step
takes about ten small array operations, whatever the number of sequences.
"""

import struct
from typing import NamedTuple

import numpy as np
from msgspec import msgpack
from numpy.typing import NDArray

from ..wire.plan import PLAN_HEADER, RELAY, ROW_FIELDS, SAMPLE, VERIFY, SlotInit

__all__ = ["Batch", "Limits", "Plan", "parse_plan"]

Ints = NDArray[np.int32]

_HEADER = struct.Struct(f"<{PLAN_HEADER}i")
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
    if len(data) < _HEADER.size:
        raise ValueError(f"a plan of {len(data)} bytes has no header")
    epoch, step, rows, tokens, updates, copies, payload, _ = _HEADER.unpack_from(data)
    rows_end = PLAN_HEADER + ROW_FIELDS * rows
    updates_end = rows_end + 3 * updates
    copies_end = updates_end + 2 * copies
    end = copies_end + tokens
    if min(rows, tokens, updates, copies, payload) < 0 or len(data) != 4 * end + payload:
        raise ValueError(f"plan {step} has {len(data)} bytes, its header tells {4 * end + payload}")
    words = np.frombuffer(data, np.int32, end)
    return Plan(
        epoch,
        step,
        words[PLAN_HEADER:rows_end].reshape(rows, ROW_FIELDS),
        words[rows_end:updates_end].reshape(updates, 3),
        words[updates_end:copies_end].reshape(copies, 2),
        words[copies_end:],
        _INITS.decode(memoryview(data)[4 * end :]) if payload else [],
    )


class Limits(NamedTuple):
    """What a plan may ask for."""

    slots: int
    tokens: int
    length: int
    """Most positions of a sequence."""
    samples: int
    table_width: int
    num_blocks: int

    def check(self, plan: Plan, relayed: int, samples: int) -> None:
        """What is out of bounds is a defect of the host; it must not become a write to foreign memory."""
        slots, max_tokens, max_len, max_samples, table_width, num_blocks = self
        rows = plan.rows
        starts, counts = rows[:, 1], rows[:, 2]
        tokens = relayed + len(plan.tokens)
        sound = (
            len(rows) <= slots
            and tokens <= max_tokens
            and samples <= max_samples
            and _below(rows, slots, max_len, max_len + 1, SAMPLE + RELAY + VERIFY + 1)
            and _below(plan.updates, slots, table_width, num_blocks)
            and _below(plan.copies, num_blocks, num_blocks)
            and int(counts.sum()) == tokens
            and int(counts[:relayed].sum()) == relayed
            and (len(rows) == 0 or (int(counts.min()) > 0 and int((starts + counts).max()) <= max_len))
        )
        if not sound:
            raise ValueError(
                f"plan {plan.step} is out of bounds: it has {len(rows)} rows, {tokens} tokens and {samples}"
                f" samples; there are {slots} slots, {max_tokens} tokens and {max_samples} samples a step,"
                f" {max_len} positions and {num_blocks} blocks"
            )


class Batch:
    """Slot state and step inputs; the native step reads these very arrays."""

    def __init__(
        self, slots: int, max_tokens: int, max_len: int, max_samples: int, block_size: int, num_blocks: int
    ) -> None:
        width = -(-max_len // block_size)
        self._limits = Limits(slots, max_tokens, max_len, max_samples, width, num_blocks)
        self.block_table = np.zeros((slots, width), np.int32)
        self.last_token = np.zeros(slots, np.int32)
        self.token_ids = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.token_row = np.zeros(max_tokens, np.int32)
        self.query_start = np.zeros(slots + 1, np.int32)
        self.context_len = np.zeros(slots, np.int32)
        self.row_slot = np.zeros(slots, np.int32)
        self.sample_rows = np.zeros(max_samples, np.int32)
        self.num_tokens = 0
        self.num_rows = 0
        self.sample_slots: Ints = np.zeros(0, np.int32)
        """[samples] slot of each position that is sampled from."""
        self.sample_positions: Ints = np.zeros(0, np.int32)
        """[samples] position of the token that each of them draws."""
        self._count = np.arange(max(slots, max_tokens, max_samples) + 1, dtype=np.int32)

    @property
    def num_samples(self) -> int:
        return len(self.sample_slots)

    def prepare(self, plan: Plan) -> None:
        """Fills the step's inputs; raises ValueError where the plan does not fit the batch."""
        rows = len(plan.rows)
        slots, starts, counts, flags = plan.rows.T
        relayed = int(np.count_nonzero(flags & RELAY))
        tokens = relayed + len(plan.tokens)
        samples = np.where(flags & VERIFY, counts, flags & SAMPLE)
        self._limits.check(plan, relayed, int(samples.sum()))
        if len(plan.updates):
            slot, index, block = plan.updates.T
            self.block_table[slot, index] = block
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
            row = np.repeat(self._count[:rows], counts)
            self.token_row[:tokens] = row
            self.positions[:tokens] = (starts - self.query_start[:rows])[row] + self._count[:tokens]
            self.token_ids[relayed:tokens] = plan.tokens
        # A row's samples are its last positions, so many of them as it has samples.
        before = np.cumsum(samples)
        at = np.repeat(self.query_start[1 : rows + 1] - before, samples)
        at += self._count[: len(at)]
        self.sample_slots = slots[self.token_row[at]]
        self.sample_positions = self.positions[at] + 1
        self.sample_rows[: len(at)] = at


def _below(values: Ints, *limits: int) -> bool:
    """Whether 0 <= values[:, i] < limits[i]. Read as unsigned, a negative number is too large as well."""
    if len(values) == 0:
        return True
    largest = values.view(np.uint32).max(axis=0).tolist()
    return all(value < limit for value, limit in zip(largest, limits, strict=True))
