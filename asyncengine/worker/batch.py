"""The persistent batch: what the worker knows of every slot, and the step's input arrays.

Everything is allocated once. A plan is a set of differences, which native code writes into the arrays: a step
leaves nothing in the caches, and Python that does a little work there waits for memory most of the time.
"""

import numpy as np
from msgspec import msgpack
from numpy.typing import NDArray

from asyncengine._fast.cpu import StepInputs

from ..wire.plan import SlotInit

__all__ = ["Batch"]

Ints = NDArray[np.int32]

_INITS = msgpack.Decoder(list[SlotInit])
_NO_COPIES = np.zeros((0, 2), np.int32)
_STEP_ARRAYS = (
    *("token_ids", "positions", "token_row", "query_start", "context_len"),
    *("row_slot", "block_table", "sample_rows"),
)


class Batch:
    """Slot state and step inputs; the native step reads these very arrays."""

    def __init__(
        self, slots: int, max_tokens: int, max_len: int, max_samples: int, block_size: int, num_blocks: int
    ) -> None:
        self.block_table = np.zeros((slots, -(-max_len // block_size)), np.int32)
        self.last_token = np.zeros(slots, np.int32)
        self.token_ids = np.zeros(max_tokens, np.int32)
        self.positions = np.zeros(max_tokens, np.int32)
        self.token_row = np.zeros(max_tokens, np.int32)
        self.query_start = np.zeros(slots + 1, np.int32)
        self.context_len = np.zeros(slots, np.int32)
        self.row_slot = np.zeros(slots, np.int32)
        self.sample_rows = np.zeros(max_samples, np.int32)
        self._sample_slots = np.zeros(max_samples, np.int32)
        self._sample_positions = np.zeros(max_samples, np.int32)
        self.inputs = StepInputs(
            **self.step_arrays(),
            last_token=self.last_token.data,
            sample_slots=self._sample_slots.data,
            sample_positions=self._sample_positions.data,
            max_len=max_len,
            num_blocks=num_blocks,
        )
        """Knows the last plan's number, and how many rows, tokens and samples it has."""

    def step_arrays(self) -> dict[str, memoryview]:
        """What the native step reads, by the names that it has there (`Step`)."""
        return {name: getattr(self, name).data for name in _STEP_ARRAYS}

    @property
    def sample_slots(self) -> Ints:
        """[samples] slot of each position that is sampled from."""
        return self._sample_slots[: self.inputs.num_samples]

    @property
    def sample_positions(self) -> Ints:
        """[samples] position of the token that each of them draws."""
        return self._sample_positions[: self.inputs.num_samples]

    def prepare(self, data: bytes) -> tuple[Ints, list[SlotInit]]:
        """Fills the step's inputs; the plan's copies [copies, 2], and who enters a slot.

        ValueError where `data` is not one whole plan, or does not fit the batch: a defect of the host.
        """
        inputs = self.inputs
        inputs.fill(data)
        copies = _NO_COPIES
        if inputs.num_copies:
            copies = np.frombuffer(data, np.int32, 2 * inputs.num_copies, inputs.copies_at).reshape(-1, 2)
        if len(data) == inputs.payload_at:
            return copies, []
        return copies, _INITS.decode(memoryview(data)[inputs.payload_at :])
