"""A plan's parts as views of its bytes, and their bounds. (On a CPU native code reads plans.)"""

import struct
from typing import NamedTuple

import numpy as np
from msgspec import msgpack
from numpy.typing import NDArray

from ...wire.plan import PLAN_HEADER, RELAY, ROW_FIELDS, SAMPLE, VERIFY, SlotInit

__all__ = ["Limits", "Plan", "parse_plan"]

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


def _below(values: Ints, *limits: int) -> bool:
    """Whether 0 <= values[:, i] < limits[i]. Read as unsigned, a negative number is too large as well."""
    if len(values) == 0:
        return True
    largest = values.view(np.uint32).max(axis=0).tolist()
    return all(value < limit for value, limit in zip(largest, limits, strict=True))
