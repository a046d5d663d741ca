"""The persistent batch on the device, and how a plan gets there: one copy and one kernel."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from asyncengine.kernels.batch_update import DeviceBatch, batch_update
from asyncengine.kernels.slot_params import pack_record

from ...wire.plan import PLAN_HEADER, RELAY, SAMPLE, VERIFY
from .device import Device
from .flights import Flight
from .kv_cache import KVCache
from .plan import Limits, Plan
from .slots import Slots

__all__ = ["Batch", "Shape", "Step"]


class Shape(NamedTuple):
    """How much a step computes; known to the host."""

    tokens: int
    rows: int
    samples: int
    decode_rows: int
    """The first rows, of one token each."""
    longest: int
    """Most tokens of one row."""

    @property
    def is_decode(self) -> bool:
        """Whether all rows have one token."""
        return self.decode_rows == self.rows


class Step(NamedTuple):
    """A step's inputs: the first so many elements of the batch's arrays, whose addresses never change."""

    shape: Shape
    token_ids: torch.Tensor
    positions: torch.Tensor
    token_row: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    row_slot: torch.Tensor
    sample_rows: torch.Tensor
    sample_slots: torch.Tensor
    sample_positions: torch.Tensor


class Batch:
    """Slot state and step inputs, allocated once."""

    limits: Limits
    """Of plans; the number of blocks is known last."""

    def __init__(self, device: Device, slots: Slots, limits: Limits) -> None:
        self._device = device
        self._slots = slots
        self.limits = limits
        self.arrays = DeviceBatch.zeros(limits.slots, limits.table_width, limits.tokens, device.place)
        default = torch.frombuffer(bytearray(pack_record()), dtype=torch.int32)
        self.arrays.slot_params.copy_(default.expand(limits.slots, -1))

    def shape_of(self, plan: Plan) -> Shape:
        """Raises ValueError where the plan does not fit the batch."""
        counts, flags = plan.rows[:, 2], plan.rows[:, 3]
        relayed = int(np.count_nonzero(flags & RELAY))
        samples = int(np.count_nonzero(flags & SAMPLE))
        self.limits.check(plan, relayed, samples)
        if (flags & VERIFY).any():
            raise ValueError(f"plan {plan.step} has drafts to verify, which this device does not do")
        tokens, rows = relayed + len(plan.tokens), len(counts)
        longest = int(counts.max()) if rows else 0
        return Shape(tokens, rows, samples, rows if longest <= 1 else relayed, longest)

    def apply(self, plan: Plan, flight: Flight, cache: KVCache, rows: int) -> None:
        """Sends `plan`, copies blocks, and fills the inputs of a step of `rows` rows, with padding."""
        records = self._slots.enter(plan.inits)
        updates = self._last_of_each(plan.updates)
        counts = len(plan.rows), len(plan.tokens), len(updates), len(plan.copies)
        header = np.array([plan.epoch, plan.step, *counts, 0, len(records)], np.int32)
        words = flight.stage((header, plan.rows, updates, plan.copies, plan.tokens, records))
        self._device.upload(flight.plan[:words], flight.staged[:words])
        if len(plan.copies):
            first = PLAN_HEADER + plan.rows.size + updates.size
            cache.copy_blocks(plan.copies, flight.plan[first : first + plan.copies.size].view(-1, 2))
        batch_update(self.arrays, flight.plan, max(rows, 1))

    def _last_of_each(self, updates: NDArray[np.int32]) -> NDArray[np.int32]:
        """The last update of each place: the device does them all at once."""
        places = updates[::-1, 0] * np.int64(self.limits.table_width) + updates[::-1, 1]
        unique, last = np.unique(places, return_index=True)
        return updates if len(unique) == len(updates) else updates[::-1][last]

    def step(self, shape: Shape) -> Step:
        """The inputs of a step."""
        tokens, rows, samples, *_ = shape
        arrays = self.arrays
        return Step(
            shape,
            token_ids=arrays.token_ids[:tokens],
            positions=arrays.positions[:tokens],
            token_row=arrays.token_row[:tokens],
            query_start=arrays.query_start[: rows + 1],
            context_len=arrays.context_len[:rows],
            row_slot=arrays.row_slot[:rows],
            sample_rows=arrays.sample_rows[:samples],
            sample_slots=arrays.sample_slots[:samples],
            sample_positions=arrays.sample_positions[:samples],
        )

    def decode_step(self, rows: int) -> Step:
        """The inputs of a step of so many rows of one token, all of them sampled from, or padding."""
        return self.step(Shape(rows, rows, rows, rows, 1))
