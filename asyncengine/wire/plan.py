"""The messages that cross between the host and its workers.

Hot messages are blocks of little-endian int32 whose layout is drawn here; the native writer
(`_fast.slots`) and the worker's reader follow it. Everything rare is msgspec (array-like, so that
field order is the contract). Each ring record carries its kind beside the bytes.

Plan (host -> every rank), one step of the batch::

    header    PLAN_HEADER int32: epoch, step, rows, inline tokens, block updates, block copies,
              payload bytes, 0
    rows      rows x 4:  slot, start, count, flags
              positions [start, start + count) of the sequence in `slot` are computed. Decode rows
              (RELAY) come first. SAMPLE: the row's last position is sampled from.
              RELAY: count is 1 and the token is the slot's last sampled one, known to the worker.
              VERIFY: with SAMPLE, without RELAY. All positions are sampled from: the tokens after the
              first are drafts. What was drawn is not relayed.
    updates   updates x 3: slot, index, block    block_table[slot][index] = block, before the step
    copies    copies x 2: source, target         whole blocks, in order, before the step
    tokens    the inline tokens of the rows without RELAY, in row order
    payload   msgspec list[SlotInit]: sequences that enter a slot; applied before all else

Result (rank 0 -> host), one per plan, in order::

    header    RESULT_HEADER int32: epoch, step, samples, payload bytes, device microseconds, 0, 0, 0
    tokens    one int32 per sample, in order of rows and positions; -1 for one that failed
    payload   msgspec ResultDetails, absent in the common case
"""

import enum

import msgspec

PLAN_HEADER = 8
RESULT_HEADER = 8
ROW_FIELDS = 4

SAMPLE = 1
RELAY = 2
VERIFY = 4


class Kind(enum.IntEnum):
    """What a ring record holds."""

    PLAN = 1
    RESULT = 2
    COMMAND = 3
    REPLY = 4


class SlotInit(msgspec.Struct, array_like=True, frozen=True):
    """A sequence enters a slot: all the worker must know to sample for it."""

    slot: int
    seed: int
    """Key of the sequence's noise, an unsigned 64-bit integer."""
    prompt_len: int
    temperature: float
    top_k: int
    """0 is off."""
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int
    """Most likely tokens to report beside the sampled one; -1 reports nothing."""
    min_len: int
    """Sequence length (prompt included) below which `stop_ids` cannot be drawn."""
    stop_ids: list[int]
    history: list[int] | None
    """All known tokens, where penalties need them; None otherwise."""


class RowLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """The raw model distribution at one sample."""

    sampled: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class ResultDetails(msgspec.Struct, array_like=True, frozen=True):
    """What only some steps have to say. Keys count the step's samples from 0."""

    logprobs: dict[int, RowLogprobs]
    failures: dict[int, str]


class StageCommand(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Run one stage of the start; `payload` is that stage's own message."""

    stage: str
    payload: bytes


class Shutdown(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Leave the process in order."""


Command = StageCommand | Shutdown


class Progress(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """How far a stage is on this rank."""

    stage: str
    done: int
    total: int
    unit: str


class StageDone(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A stage has ended well on this rank; `payload` is its result."""

    stage: str
    payload: bytes


class Fault(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """This rank cannot go on. `error` names a class of `asyncengine.errors`, or is empty for a defect."""

    stage: str
    error: str
    message: str
    traceback: str


class LogRecord(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A log line of the worker, for the host's logger of that name."""

    name: str
    level: int
    message: str


Reply = Progress | StageDone | Fault | LogRecord
