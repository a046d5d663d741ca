"""Native CPU backend; the contract of every op is `cpu/cpu.h`."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer as ReadableBuffer

Ints = NDArray[np.int32]

EMBED: int
RMS_NORM: int
LINEAR: int
ROPE_KV: int
ATTENTION: int
SELECT: int
ALL_REDUCE: int
ALL_GATHER: int
QUANTIZE: int
HEAD: int
TOKENS: int
SAMPLES: int
F32: int
BF16: int
Q8: int
Q4: int
Q16: int
I8: int
OPERATION_BYTES: int
PANEL: int
WHOLE: int
WHOLE16: int
ROUNDED: int
COMPACT: int
MOST_WHOLE: int
MOST_WHOLE16: int
F16: int

def levels() -> list[str]: ...

@final
class Codes:
    rows: int
    cols: int
    def __init__(
        self,
        layout: str,
        bits: int,
        rows: int,
        cols: int,
        group: int,
        codes: ReadableBuffer,
        scale_dtype: str,
        scales: ReadableBuffer,
        zeros: ReadableBuffer | None = None,
        zero_shift: int = 0,
        group_index: ReadableBuffer | None = None,
    ) -> None: ...

def source_bytes(src_dtype: str, count: int) -> int: ...
def source_format(src_dtype: str) -> tuple[int, bool] | None: ...
def quantized_row_bytes(k: int, group: int) -> int: ...
def rotation_norm(k: int) -> int: ...
def packed_bytes(n: int, k: int, dtype: str, group: int = 0, minimum: bool = False) -> int: ...
def pack_linear(
    team: Team,
    src_dtype: str,
    src: ReadableBuffer | int | Codes,
    rows: int,
    cols: int,
    dst: ReadableBuffer | int,
    dst_dtype: str,
    row_offset: int = 0,
    *,
    group: int = 0,
    minimum: bool = False,
    row_start: int = 0,
    col_start: int = 0,
    col_stop: int | None = None,
    panel_stride: int = 1,
    panel_offset: int = 0,
) -> None: ...
def compact(
    team: Team,
    packed: ReadableBuffer | int,
    n: int,
    k: int,
    dst: ReadableBuffer | int,
    first: int = 0,
    count: int | None = None,
) -> int: ...
def compact_bytes(weight: ReadableBuffer | int, n: int) -> int: ...
def convert(
    team: Team,
    src_dtype: str,
    src: ReadableBuffer | int | Codes,
    rows: int,
    cols: int,
    dst: ReadableBuffer | int,
    dst_dtype: str,
    row_offset: int = 0,
    *,
    row_start: int = 0,
    col_start: int = 0,
    col_stop: int | None = None,
) -> None: ...

@final
class Buffer:
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    def discard(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Team:
    num_threads: int
    level: str
    def __init__(self, num_threads: int, level: str | None = None) -> None: ...

@final
class StepInputs:
    epoch: int
    step: int
    num_rows: int
    num_tokens: int
    num_samples: int
    num_copies: int
    copies_at: int
    payload_at: int
    def __init__(
        self,
        *,
        block_table: ReadableBuffer,
        last_token: ReadableBuffer,
        token_ids: ReadableBuffer,
        positions: ReadableBuffer,
        token_row: ReadableBuffer,
        query_start: ReadableBuffer,
        context_len: ReadableBuffer,
        row_slot: ReadableBuffer,
        sample_rows: ReadableBuffer,
        sample_slots: ReadableBuffer,
        sample_positions: ReadableBuffer,
        max_len: int,
        num_blocks: int,
    ) -> None: ...
    def fill(self, plan: bytes) -> None: ...
    def keep(self, tokens: Ints) -> None: ...
    def result(self, tokens: Ints, payload: bytes, spent_us: int) -> bytes: ...

@final
class Step:
    def __init__(
        self,
        *,
        token_ids: ReadableBuffer,
        positions: ReadableBuffer,
        token_row: ReadableBuffer,
        query_start: ReadableBuffer,
        context_len: ReadableBuffer,
        row_slot: ReadableBuffer,
        block_table: ReadableBuffer,
        sample_rows: ReadableBuffer,
        head_k: ReadableBuffer | None = None,
        head_temperature: ReadableBuffer | None = None,
    ) -> None: ...
    def set_counts(self, num_tokens: int, num_seqs: int, num_samples: int) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_samples(self) -> int: ...

@final
class Program:
    team: Team
    def __init__(self, team: Team) -> None: ...
    def __len__(self) -> int: ...
    def add(
        self, code: int, rows: int, p: Sequence[int], n: Sequence[int] = (), f: Sequence[float] = ()
    ) -> int: ...
    def run(self, step: Step) -> None: ...
    def run_op(self, i: int, step: Step) -> None: ...

@final
class Comm:
    rank: int
    world: int
    def __init__(self, fd: int, rank: int, world: int, region_bytes: int) -> None: ...
    @staticmethod
    def bytes_needed(world: int, region_bytes: int) -> int: ...
    @property
    def address(self) -> int: ...
    def broadcast_tokens(self, tokens: ReadableBuffer) -> None: ...

# ---- sampling ----

def attention_workspace(
    num_threads: int, q_heads: int, kv_heads: int, head_dim: int, max_context: int
) -> int: ...
def head_bytes(num_threads: int, num_samples: int) -> int: ...
def sample_workspace(num_threads: int, vocab: int) -> int: ...

@final
class HeadDraws:
    def __init__(
        self,
        team: Team,
        vocab: int,
        workspace: int,
        *,
        head_k: ReadableBuffer,
        head_temperature: ReadableBuffer,
        whole_below: ReadableBuffer,
        temperature: ReadableBuffer,
        top_k: ReadableBuffer,
        top_p: ReadableBuffer,
        min_p: ReadableBuffer,
        seed: ReadableBuffer,
    ) -> None: ...
    def modes(self, slots: Ints, positions: Ints, k: Ints, temperature: NDArray[np.float32]) -> None: ...
    def draw(self, best: int, best_k: Ints, slots: Ints, positions: Ints, tokens: Ints) -> int: ...

def count_tokens(counts: ReadableBuffer, tokens: ReadableBuffer, vocab: int) -> None: ...
def kv_block_bytes(dtype: str, kv_heads: int, block_size: int, head_dim: int) -> int: ...
def sample(
    team: Team,
    logits: int,
    vocab: int,
    tokens: ReadableBuffer,
    *,
    head_k: ReadableBuffer | None = None,
    best: int = 0,
    workspace: int = 0,
    temperature: ReadableBuffer | None = None,
    top_k: ReadableBuffer | None = None,
    top_p: ReadableBuffer | None = None,
    min_p: ReadableBuffer | None = None,
    presence: ReadableBuffer | None = None,
    frequency: ReadableBuffer | None = None,
    repetition: ReadableBuffer | None = None,
    seed: ReadableBuffer | None = None,
    position: ReadableBuffer | None = None,
    counts: ReadableBuffer | None = None,
    prompt_mask: ReadableBuffer | None = None,
    banned_start: ReadableBuffer | None = None,
    banned: ReadableBuffer | None = None,
    num_logprobs: ReadableBuffer | None = None,
    logprob: ReadableBuffer | None = None,
    rank: ReadableBuffer | None = None,
    top_ids: ReadableBuffer | None = None,
    top_logprobs: ReadableBuffer | None = None,
) -> None: ...
def peaks(
    team: Team, read_bytes: int = 268435456, repeats: int = 131072, tries: int = 20
) -> dict[str, float]: ...
